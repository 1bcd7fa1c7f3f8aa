"""What kernels allocate inside of one op and free again before they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from floatline.hardware import Hardware


def scratch_of(hardware: Hardware) -> Callable[[Any, Any, Any, Any], int]:
    """Return (op, args, kwargs, result) -> bytes of scratch on `hardware`."""
    return lambda func, args, kwargs, out: 0
