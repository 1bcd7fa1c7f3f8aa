"""torch's optimizers and gradient clipping on CPU tensors by the implementation that they take on CUDA.

An optimizer that is not told takes `foreach` on CUDA: all parameters of a group go through each operation together,
and the intermediate results exist for all of them at once. That is one temporary of the size of the parameters for
Adam, and can be the peak of the step. On a CPU the same optimizer loops over its parameters and needs one parameter's
worth. What the caller sets (`foreach=`, `fused=`) holds, as torch looks at its default only where both are None;
optimizers without a foreach form (SparseAdam, LBFGS, Adafactor by default) stay as they are. So do sharded
parameters, which torch leaves to the loop on CUDA too.

The default is decided by device and type; here the CPU is one of the devices, and fake tensors one of the types. The
same types decide how `clip_grad_norm_` goes about it.

Not covered: an optimizer whose parameters a technique keeps on the host would loop there. Its temporaries are the
host's.

Source: torch/optim/optimizer.py (`_default_to_fused_or_foreach`), torch/utils/_foreach_utils.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib import import_module

from torch._subclasses import FakeTensor

from floatline.observe.target.shared_patch import Replacement, SharedPatch

_DEVICES = "_get_foreach_kernels_supported_devices"
_TYPES = "_foreach_supported_types"


def target_optimizers() -> AbstractContextManager[None]:
    """Let optimizers over CPU tensors, real or fake, default to foreach as over CUDA's, while the context is open."""
    return _PATCH.held()


def _replacements() -> list[Replacement]:
    optimizer, averaging, foreach = map(
        import_module, ("torch.optim.optimizer", "torch.optim.swa_utils", "torch.utils._foreach_utils")
    )
    devices = getattr(optimizer, _DEVICES)

    def with_cpu() -> list[str]:
        return [*devices(), "cpu"]

    types = [(module, _TYPES, [*getattr(module, _TYPES), FakeTensor]) for module in (optimizer, foreach)]
    return [(optimizer, _DEVICES, with_cpu), (averaging, _DEVICES, with_cpu), *types]


_PATCH = SharedPatch(_replacements)
