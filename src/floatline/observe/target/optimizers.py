"""torch's optimizers and gradient clipping on CPU tensors by the implementation that they take on CUDA.

An optimizer that is not told takes `foreach` on CUDA: all parameters of a group go through each operation together, and the
intermediate results exist for all of them at once. That is one temporary of the size of the parameters for Adam,
and can be the peak of the step. On a CPU the same optimizer loops over its parameters and needs one parameter's worth.
What the caller sets (`foreach=`, `fused=`) holds, as torch looks at its default only where both are None; optimizers
without a foreach form (SparseAdam, LBFGS, Adafactor by default) stay as they are. So do sharded parameters, which
torch leaves to the loop on CUDA too.

The default is decided by device and type; here the CPU is one of the devices, and fake tensors one of the types. The same
types decide how `clip_grad_norm_` goes about it.

Not covered: an optimizer whose parameters a technique keeps on the host would loop there. Its temporaries are the host's.

Source: torch/optim/optimizer.py (`_default_to_fused_or_foreach`), torch/utils/_foreach_utils.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from torch._subclasses import FakeTensor

_DEVICES = "_get_foreach_kernels_supported_devices"
_TYPES = "_foreach_supported_types"


@contextmanager
def target_optimizers() -> Iterator[None]:
    """Let optimizers over CPU tensors, real or fake, default to foreach as over CUDA's, while the context is open."""
    optimizer, averaging, foreach = map(
        import_module, ("torch.optim.optimizer", "torch.optim.swa_utils", "torch.utils._foreach_utils")
    )
    devices = getattr(optimizer, _DEVICES)

    def with_cpu() -> list[str]:
        return [*devices(), "cpu"]

    with ExitStack() as stack:
        for module in (optimizer, averaging):
            stack.enter_context(_set(module, _DEVICES, with_cpu))
        for module in (optimizer, foreach):
            stack.enter_context(_set(module, _TYPES, [*getattr(module, _TYPES), FakeTensor]))
        yield


@contextmanager
def _set(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
