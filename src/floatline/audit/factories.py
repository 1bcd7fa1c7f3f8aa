"""Let functions that make tensors say their format: `torch.linspace(0, 1, 9)` becomes `..., dtype=torch.float32)`.

A meter that runs each op again in fp64 finds the format to change among the op's arguments. A factory that is called
without one takes the default dtype, in every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FLOATING = frozenset(
    {"zeros", "ones", "empty", "eye", "linspace", "logspace", "rand", "randn", "hann_window", "hamming_window",
     "blackman_window", "bartlett_window", "kaiser_window"}
)  # fmt: skip
_BY_ARGUMENTS = frozenset({"arange", "full"})
"""Floating where one of their arguments is."""


class SaidDtype(TorchFunctionMode):
    """The mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        floating = name in _FLOATING or (
            name in _BY_ARGUMENTS and any(isinstance(value, float) for value in (*args, *kwargs.values()))
        )
        if floating and getattr(torch, name, None) is func and kwargs.get("dtype") is None and "out" not in kwargs:
            kwargs = {**kwargs, "dtype": torch.get_default_dtype()}
        return func(*args, **kwargs)
