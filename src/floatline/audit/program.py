"""The function that is audited with what it is called on, run in one format after another.

Each run gets fresh copies of the inputs and the same random numbers. What it returned is flattened to named tensors:
"output", "output[0]", "output['edges']"; with a backward the gradients of the floating inputs come after them.

In mode "true" floating inputs are cast and new tensors take the lower format too (the default dtype is set); in mode
"mixed" everything stays fp32 and autocast decides op by op. With fp32 lines (fp32_lines.py) the inputs stay fp32, and
lines that are not chosen cast them where they use them.

The backward starts at a floating scalar if the function returns just that (a loss), else at all floating outputs times
a fixed random direction. fp16 is given a loss scale, as training gives it one: 2^16, less where gradients overflow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from floatline.audit.fp16_products import FP16Products
from floatline.audit.fp32_lines import FP32Lines, Line
from floatline.audit.leaves import backward_alone
from floatline.audit.outputs import Tensors, outputs_of, path_name
from floatline.audit.random_numbers import seeded
from floatline.audit.subject import SCALE, Passes
from floatline.errors import ConfigError, ModelError
from floatline.hardware import Hardware
from floatline.observe.error import ErrorMeter, Reading, metering
from floatline.observe.target import cuda_autocast

GRADIENT = "gradient of "


@dataclass(frozen=True, kw_only=True)
class Format:
    """A lower format and how it is put on.

    Attributes:
        name: "bf16" or "fp16".
        mode: "true" or "mixed".
    """

    name: str
    mode: str

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.name == "bf16" else torch.float16


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run gave.

    Attributes:
        values: Name -> output or gradient (divided by the scale).
        exact: The same in fp64, of a run with a meter.
        readings: Ops that have to do with a lower format, of a run with a meter.
        unmeasured: Ops without an exact result.
        scale: Loss scale of the backward.
    """

    values: Tensors
    exact: Tensors
    readings: tuple[Reading, ...] = ()
    unmeasured: Mapping[str, int]
    scale: float = 1.0


class Program:
    """A function and its inputs.

    Args:
        fn: Called with a tuple's items as positions or a dict's as keywords.
        inputs: Tensors and whatever else it takes; also nested.
        hardware: Whose autocast lists hold.
        backward: Also run the backward.
        seed: Of random numbers that it draws.

    Raises:
        ConfigError: Inputs that are no tuple or dict, or hold no floating tensor.
    """

    def __init__(
        self, fn: Callable[..., Any], inputs: Any, hardware: Hardware, backward: bool | str, seed: int
    ) -> None:
        self.fn = fn
        self.name = getattr(fn, "__name__", type(fn).__name__)
        self.hardware = hardware
        self.backward = backward is True
        self.seed = seed
        self.passes = Passes()
        self._inputs, self._structure = _flattened(inputs)
        self.floats = [name for name, value in self._inputs.items() if _is_float(value)]
        self.device = next(self._inputs[name].device for name in self.floats)
        if backward == "auto":
            self.backward = self._is_loss()

    def given(self) -> Tensors:
        """Return the floating inputs by name, as they were given."""
        return {name: self._inputs[name].detach() for name in self.floats}

    def plain(self, seed: int) -> Tensors:
        """Return what the function gives in fp32, without a backward."""
        return self._run("checks", None, None, seed=seed, backward=False).values

    def exact(self) -> Result:
        """Run it in fp32 with shadows."""
        return self._run("exact", None, None, local=False)

    def read(self, fmt: Format, lines: frozenset[Line] | None, scale: float) -> Result:
        """Run it in a format with a meter on every op."""
        return self._run("metered", fmt, lines, local=True, scale=scale)

    def run(self, fmt: Format, lines: frozenset[Line] | None, *, shadows: bool = False) -> Result:
        """Run it in a format, with less loss scale where a gradient overflows.

        Args:
            fmt: The format.
            lines: Those in fp32; None for none at all, which casts the inputs once.
            shadows: Also follow the exact values of this run (for functions that draw random numbers).
        """
        scale = SCALE if self.backward and fmt.name == "fp16" else 1.0
        while True:
            result = self._run("joint", fmt, lines, local=False if shadows else None, scale=scale)
            finite = all(bool(torch.isfinite(v).all()) for n, v in result.values.items() if n.startswith(GRADIENT))
            if scale == 1.0 or finite:
                return result
            scale /= 16.0

    # One run

    def _run(self, what: str, fmt: Format | None, lines: frozenset[Line] | None, *, local: bool | None = None,
             scale: float = 1.0, seed: int | None = None, backward: bool | None = None) -> Result:  # fmt: skip
        backward = self.backward if backward is None else backward
        self.passes.add(what)
        with ExitStack() as stack:
            stack.enter_context(self._started(fmt, self.seed if seed is None else seed))
            inputs = self._made(fmt if lines is None else None, backward)
            meter = None
            if local is not None:
                meter = stack.enter_context(metering(local=local))
                for name in self.floats:
                    meter.shadows.set(inputs[name], self._inputs[name].detach().to(torch.float64, copy=True))
                meter.enter("forward")
            stack.enter_context(torch.enable_grad() if backward else torch.no_grad())
            with self._in_format(fmt, lines, sys._getframe(), inputs):
                args = tree_unflatten(list(inputs.values()), self._structure)
                out = self.fn(**args) if isinstance(args, dict) else self.fn(*args)
            values = outputs_of(out, self.name)
            if backward:
                values |= self._backward(values, inputs, scale, meter)
            exact = {name: _shadow(meter, value) for name, value in values.items()} if meter is not None else {}
        return Result(
            values={name: _unscaled(name, value, scale) for name, value in values.items()},
            exact={name: _unscaled(name, value, scale) for name, value in exact.items()},
            readings=tuple(meter.readings) if meter is not None else (),
            unmeasured=dict(meter.unmeasured) if meter is not None else {},
            scale=scale,
        )

    def _made(self, fmt: Format | None, backward: bool) -> dict[str, Any]:
        """Return fresh inputs, the floating ones in fp32 or, where all is cast, in the lower format."""
        dtype = fmt.dtype if fmt is not None and fmt.mode == "true" else torch.float32
        made: dict[str, Any] = {}
        for name, value in self._inputs.items():
            if not isinstance(value, torch.Tensor):
                made[name] = value
            elif value.is_floating_point():
                made[name] = value.detach().to(torch.float32).to(dtype, copy=True).requires_grad_(backward)
            else:
                made[name] = value.detach().clone()
        return made

    @contextmanager
    def _started(self, fmt: Format | None, seed: int) -> Iterator[None]:
        """Context with the target's autocast lists, the seed, and the format as the default of new tensors."""
        default = torch.get_default_dtype()
        with ExitStack() as stack:
            stack.enter_context(seeded(seed, [self.device]))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            on_cuda = self.device.type == "cuda"
            if self.hardware.kind == "cuda" and not on_cuda:
                stack.enter_context(cuda_autocast())
            if fmt is not None and fmt.name == "fp16" and not on_cuda:
                stack.enter_context(FP16Products())
            stack.callback(torch.set_default_dtype, default)
            torch.set_default_dtype(fmt.dtype if fmt is not None and fmt.mode == "true" else torch.float32)
            yield

    @contextmanager
    def _in_format(
        self, fmt: Format | None, lines: frozenset[Line] | None, root: FrameType, inputs: Mapping[str, Any]
    ) -> Iterator[None]:
        if fmt is None:
            yield
            return
        with ExitStack() as stack:
            if fmt.mode == "mixed":
                stack.enter_context(torch.autocast(self.device.type, dtype=fmt.dtype))
            if lines is not None:
                lower = fmt.dtype if fmt.mode == "true" else None
                mode = FP32Lines(lines, lower, root, self.device.type)
                for name in self.floats:
                    mode.widen(inputs[name])
                stack.enter_context(mode)
            yield

    def _backward(self, values: Tensors, inputs: Mapping[str, Any], scale: float, meter: ErrorMeter | None) -> Tensors:
        """Run the backward, and return the gradients of the floating inputs."""
        floats = [value for value in values.values() if value.is_floating_point() and value.requires_grad]
        if not floats:
            raise ModelError(
                f"no gradient arrives: no output of {self.name} depends on an input in a way that can be derived",
                hint="leave backward=False; or look for detach(), no_grad(), comparisons and casts to integers",
            )
        alone = len(values) == 1 and floats[0].numel() == 1
        total = floats[0].float().reshape(()) if alone else sum((v.float() * self._direction(v)).sum() for v in floats)
        assert isinstance(total, torch.Tensor)
        if meter is not None:
            meter.enter("backward")
        backward_alone(total * scale, (inputs[name] for name in self.floats))
        found = {name: inputs[name].grad for name in self.floats}
        return {GRADIENT + name: gradient for name, gradient in found.items() if gradient is not None}

    def _direction(self, value: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        made = torch.randn(value.shape, generator=generator, dtype=torch.float32) / max(value.numel(), 1)
        return made.to(value.device)

    def _is_loss(self) -> bool:
        """Say whether the function returns just one floating scalar that can be derived."""
        with self._started(None, self.seed), torch.enable_grad():
            self.passes.add("checks")
            inputs = self._made(None, True)
            args = tree_unflatten(list(inputs.values()), self._structure)
            out = self.fn(**args) if isinstance(args, dict) else self.fn(*args)
        return isinstance(out, torch.Tensor) and out.is_floating_point() and out.numel() == 1 and out.requires_grad


def _flattened(inputs: Any) -> tuple[dict[str, Any], Any]:
    """Return the inputs by name, detached, and the structure to build them up again."""
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if isinstance(inputs, list):
        inputs = tuple(inputs)
    if not isinstance(inputs, (tuple, dict)):
        raise ConfigError(
            f"inputs is a {type(inputs).__name__}", hint="give a tuple of the function's arguments, or a dict by name"
        )
    leaves, structure = tree_flatten_with_path(inputs)
    named = {path_name(path, "inputs"): leaf for path, leaf in leaves}
    tensors = [value for value in named.values() if isinstance(value, torch.Tensor)]
    if not tensors:
        kinds = ", ".join(sorted({type(value).__name__ for value in named.values()})) or "nothing"
        raise ConfigError(f"inputs holds no tensor ({kinds})", hint="convert arrays first: torch.as_tensor(array)")
    if any(tensor.is_meta for tensor in tensors):
        raise ConfigError("inputs holds a tensor on the meta device", hint="give it values")
    if not any(map(_is_float, tensors)):
        kinds = ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors}))
        raise ConfigError(
            f"inputs holds no floating tensor ({kinds}): there is no precision to audit",
            hint="convert outside of the function, e.g. image.float() / 255",
        )
    return named, structure


def _shadow(meter: ErrorMeter, value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    if value.is_floating_point():
        return meter.shadows.of(value).clone()
    decided = meter.shadows.decided(value)
    return (value if decided is None else decided).clone()


def _unscaled(name: str, value: torch.Tensor, scale: float) -> torch.Tensor:
    value = value.detach()
    return value.double() / scale if name.startswith(GRADIENT) and scale != 1.0 else value


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
