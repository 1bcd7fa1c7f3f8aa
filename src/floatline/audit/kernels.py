"""What this host cannot tell about the target: kernels that compute otherwise there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from floatline.audit.judging import Judged
from floatline.hardware import Hardware
from floatline.observe.error import Reading


class Ran(Protocol):
    """A format that something has run in, with a meter on every op."""

    @property
    def name(self) -> str: ...
    @property
    def on_cuda(self) -> bool: ...
    @property
    def judged(self) -> Sequence[tuple[Reading, Judged]]: ...


_DIFFERENT = {
    "cumsum": "cumsum keeps its running total in fp32 here and in the result's format on CUDA (rows say what is lost)",
    "mm": "CUDA may add up partial sums of fp16 products in fp16 (torch.backends.cuda.matmul."
    "allow_fp16_reduced_precision_reduction); this host adds them in fp32",
    "attention": "the attention kernel is this host's; CUDA's flash and memory-efficient kernels round the "
    "probabilities to the half format before the second product",
    "convolution": "cuDNN may use TF32 in fp32 convolutions (torch.backends.cudnn.allow_tf32)",
    "scatter": "scatter_add and index_add run in no fixed order on CUDA: rounding differs from run to run",
}
_ALIASES = {
    "addmm": "mm",
    "bmm": "mm",
    "baddbmm": "mm",
    "_scaled_dot_product_flash_attention_for_cpu": "attention",
    "_scaled_dot_product_attention_math": "attention",
    "convolution_backward": "convolution",
    "mkldnn_convolution": "convolution",
    "scatter_add": "scatter",
    "index_add": "scatter",
    "embedding_dense_backward": "scatter",
}


def host_cannot_tell(lowered: Sequence[Ran], target: Hardware) -> list[str]:
    """Return sentences about ops of the step whose kernels differ between this host and the target."""
    if target.kind != "cuda" or all(low.on_cuda for low in lowered):
        if target.kind == "cpu":
            return ["audited by this CPU's autocast lists and kernels; hardware='t4' (or any GPU) gives CUDA's lists"]
        return []
    seen = {_ALIASES.get(reading.ran, reading.ran) for low in lowered for reading, _ in low.judged}
    if all(low.name != "fp16" for low in lowered):
        seen.discard("mm")
    return [
        f"audited on a CPU, by CUDA's autocast lists for {target.name}; what its kernels do cannot be seen here",
        *(text for key, text in _DIFFERENT.items() if key in seen),
    ]
