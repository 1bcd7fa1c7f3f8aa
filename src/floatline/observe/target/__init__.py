"""The rules of a target GPU, applied to code that runs on (fake) CPU tensors.

Fake tensors of the `cuda` device need a GPU, so a step is traced on fake CPU tensors. What a GPU does differently
with the same program is put on here, one rule a file: autocast's lists, the attention kernel and what it saves,
dropout and softmax, RMS norm, LSTMs, optimizers' foreach form. `workspaces` tells what cuBLAS takes besides,
`attention_scratch` what attention takes inside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from floatline.hardware import Hardware
from floatline.observe.target.attention import target_attention
from floatline.observe.target.attention_choice import Choice, chosen_kernel
from floatline.observe.target.attention_scratch import attention_scratch
from floatline.observe.target.autocast import cuda_autocast
from floatline.observe.target.dropout import target_pointwise
from floatline.observe.target.norms import target_norms
from floatline.observe.target.optimizers import target_optimizers
from floatline.observe.target.recurrent import target_recurrent
from floatline.observe.target.workspaces import workspaces

__all__ = [
    "Choice",
    "attention_scratch",
    "chosen_kernel",
    "cuda_autocast",
    "on_target",
    "target_attention",
    "target_norms",
    "target_optimizers",
    "target_pointwise",
    "target_recurrent",
    "workspaces",
]


@contextmanager
def on_target(hardware: Hardware) -> Iterator[Counter[Choice]]:
    """Run what is inside by the rules of `hardware`: on CPU tensors, as it would run there on CUDA's.

    For a CPU it does nothing. Contexts nest; the innermost one's GPU counts, and each takes off exactly what it put on.
    The rules hold for the whole process, other threads included.

    Yields:
        How often attention took which kernel, and why not one before it in the order.

    >>> import torch
    >>> from floatline.hardware import lookup
    >>> with on_target(lookup("t4")), torch.autocast("cpu", dtype=torch.float16):
    ...     torch.ones(2, dtype=torch.float16).exp().dtype
    torch.float32
    """
    taken: Counter[Choice] = Counter()
    with ExitStack() as stack:
        if hardware.kind == "cuda":
            stack.enter_context(cuda_autocast())
            taken = stack.enter_context(target_attention(hardware))
            stack.enter_context(target_pointwise())
            stack.enter_context(target_norms())
            stack.enter_context(target_recurrent())
            stack.enter_context(target_optimizers())
        yield taken
