"""The workspaces that cuBLAS takes from torch's caching allocator, and keeps.

Before the first matrix product on a stream, torch gives the thread's cuBLAS handle a workspace of a fixed size and
keeps it for the life of the process, so it lies under every peak. Backward runs in a thread of its own, with a handle
of its own: a training step has two workspaces, an inference one.

Not covered: more streams (each has its own), and cuBLASLt's share where a user splits the two
(TORCH_CUBLASLT_UNIFIED_WORKSPACE=0).
"""

from __future__ import annotations

import re

from floatline.errors import ConfigError
from floatline.hardware import Hardware

KIB = 2**10
_BEFORE_HOPPER = (2 * 4096 + 8 * 16) * KIB
_HOPPER = 8 * 4096 * KIB


def workspaces(hardware: Hardware, *, training: bool = True, config: str | None = None) -> int:
    """Return the bytes of cuBLAS workspaces in torch's allocator.

    Args:
        hardware: The target; a CPU has none.
        training: Whether there is a backward, whose thread has a workspace of its own.
        config: What CUBLAS_WORKSPACE_CONFIG will be set to, as ":4096:8" (KiB, count; pairs add up); None is
            torch's default: 8,519,680 bytes, from capability 9.0 on 32 MiB.

    Raises:
        ConfigError: The config has another form.

    Source: at::cuda::getChosenWorkspaceSize (ATen/cuda/CublasHandlePool.cpp); cuBLAS documentation, "Results
    reproducibility".

    >>> from floatline.hardware import lookup
    >>> workspaces(lookup("t4")), workspaces(lookup("h100"), training=False)
    (17039360, 33554432)
    """
    if hardware.kind != "cuda":
        return 0
    default = _HOPPER if (hardware.capability or (0, 0)) >= (9, 0) else _BEFORE_HOPPER
    return (default if config is None else _parse(config)) * (2 if training else 1)


def _parse(config: str) -> int:
    if not re.fullmatch(r"(:\d+:\d+)+", config):
        raise ConfigError(
            f"CUBLAS_WORKSPACE_CONFIG={config!r} is not a list of :KiB:count",
            hint="write it as :4096:8 (deterministic) or :4096:2:16:8",
        )
    numbers = [int(number) for number in config[1:].split(":")]
    return sum(size * count for size, count in zip(numbers[::2], numbers[1::2])) * KIB
