"""Low-bit optimizer state in state dicts: as plain tensors, and back to fp32.

torchao keeps a quantised tensor as a tensor subclass: codes, one fp32 scale a block, and a table of the values that
the codes stand for. A checkpoint with subclasses can only be read where torchao was imported before, and a plain
optimizer fails on them. So a state dict holds for each a dict of plain tensors (the table is a constant and left out),
which `decode` makes whole again bit for bit, and `plain_state` turns into fp32 for an optimizer without the technique.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

from floatline.errors import ConfigError

KIND = "low_bit"
"""Key that marks an encoded tensor; its value names the kind: "8", "4" or "fp8"."""

INSTALL = 'pip install "floatline[techniques]"'


@cache
def quiet_torchao() -> None:
    """Let torchao be imported (transformers does so too, where it is installed) without its talk of CUDA libraries.

    It warns of each compiled extension that this build of torch cannot load and of none that is used here, and torch
    of how torchao registers two enums.
    """
    logging.getLogger("torchao").addFilter(lambda record: not record.getMessage().startswith("Failed to load"))
    logging.getLogger("torch.utils._pytree").addFilter(lambda record: "is an Enum subclass" not in record.getMessage())


def torchao_optim() -> Any:
    """Import and return `torchao.optim`.

    Raises:
        ConfigError: It is not installed.
    """
    quiet_torchao()
    try:
        import torchao.optim
    except ImportError as error:
        raise ConfigError(f"low-bit optimizer state needs torchao: {error}", hint=INSTALL) from error
    return torchao.optim


@cache
def state_classes() -> dict[str, Any]:
    """Return torchao's classes of quantised state by kind."""
    torchao_optim()
    from torch._subclasses.fake_tensor import unset_fake_temporarily
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit
    from torchao.optim.subclass_fp8 import OptimStateFp8

    with unset_fake_temporarily():  # torchao computes its tables once, by reading tensors: not possible on fake ones
        for cls in (OptimState8bit, OptimState4bit):
            for signed in (True, False):
                cls.zeros((2,), signed, 2, "cpu")
    return {"8": OptimState8bit, "4": OptimState4bit, "fp8": OptimStateFp8}


def encode(value: Any) -> Any:
    """Return quantised state as a dict of plain tensors; anything else as it is."""
    kind = next((kind for kind, cls in state_classes().items() if isinstance(value, cls)), None)
    if kind is None:
        return value
    encoded = {KIND: kind, "codes": value.codes, "scale": value.scale, "dtype": value.dtype}
    if kind == "fp8":
        return encoded
    return {**encoded, "signed": value.signed, "shape": tuple(value.shape)}


def decode(value: Any) -> Any:
    """Return what was encoded, in memory of its own; anything else as it is."""
    if not is_encoded(value):
        return value
    cls = state_classes()[value[KIND]]
    codes, scale = value["codes"].clone(), value["scale"].clone()
    if value[KIND] == "fp8":
        return cls(codes, scale, dtype=value["dtype"])
    block_size = (1 if value[KIND] == "8" else 2) * codes.numel() // scale.numel()
    table = cls.zeros((block_size,), value["signed"], block_size, codes.device).qmap
    shape = () if value[KIND] == "8" else (value["shape"],)
    return cls(codes, scale, table, value["signed"], *shape, dtype=value["dtype"])


def is_encoded(value: Any) -> bool:
    """Say whether a state value is a dict that `encode` made."""
    return isinstance(value, dict) and KIND in value


def is_quantised(value: Any) -> bool:
    """Say whether a state value is a quantised tensor of torchao."""
    return isinstance(value, tuple(state_classes().values()))


def plain_state(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state dict with its low-bit state as fp32 tensors, for the optimizer without the technique.

    The values are those that the codes stand for; the bits that quantising took stay lost. A state dict without
    low-bit state comes back as it is.
    """
    if not any(is_encoded(value) for state in state_dict["state"].values() for value in state.values()):
        return state_dict
    state = {
        key: {name: decode(v).dequantize() if is_encoded(v) else v for name, v in values.items()}
        for key, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state}
