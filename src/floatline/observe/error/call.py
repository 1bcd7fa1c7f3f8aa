"""One call of an op, and the way to run it again in another format, on exact inputs."""

from __future__ import annotations

from typing import Any

import torch

from floatline.observe.error.exact_kernels import EXACT_KERNELS
from floatline.observe.error.measures import HALVES, overflows, sampled
from floatline.observe.error.shadows import Shadows
from floatline.observe.finite.ran import written
from floatline.observe.real import tensors_in


class Call:
    """One call of an op: its tensors before it ran, and the way to run it again in another format.

    Args:
        func: The op.
        name: Its aten name.
        args: What it is given.
        kwargs: Likewise.
        shadows: For the exact inputs.
    """

    def __init__(self, func: Any, name: str, args: Any, kwargs: Any, shadows: Shadows) -> None:
        self.func = func
        self.name = name
        self.args = args
        self.kwargs = kwargs
        self.reads = [t for t in tensors_in([args, kwargs]) if t.layout == torch.strided]
        self.writes = written(func, args, kwargs)
        over = {id(tensor) for tensor in self.writes}
        self.exact: dict[int, torch.Tensor] = {}
        self.given: dict[int, torch.Tensor] = {}
        self.decisions: dict[int, torch.Tensor] = {}
        for tensor in self.reads:
            if tensor.is_floating_point():
                values = shadows.of(tensor)
                self.exact[id(tensor)] = values.clone() if id(tensor) in over else values
            elif not tensor.is_complex():
                decided = shadows.decided(tensor)
                if decided is not None:
                    self.decisions[id(tensor)] = decided.clone() if id(tensor) in over else decided
                elif id(tensor) in over:
                    self.given[id(tensor)] = tensor.clone()
        self.exact_by_given_decisions = self.exact
        self.exact = {**self.exact, **self.decisions}

    @property
    def draws(self) -> bool:
        """Whether it takes random numbers; attention does where it drops out."""
        if torch.Tag.nondeterministic_seeded not in self.func.tags:
            return False
        schema = self.func._schema.arguments
        given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
        given.update(zip((argument.name for argument in schema), self.args), **self.kwargs)
        return bool(given.get("dropout_p", 1.0))

    @property
    def decides(self) -> bool:
        """Whether integers or booleans come of floating inputs."""
        return any(tensor.is_floating_point() for tensor in self.reads)

    def does_not_fit(self) -> bool:
        """Say whether a finite exact input lies beyond the end of the half format that it was given in."""
        return any(
            t.dtype in HALVES and overflows(self.exact[id(t)], t.dtype) for t in self.reads if id(t) in self.exact
        )

    def named(self, values: dict[int, torch.Tensor]) -> list[Any]:
        """Return its positional arguments with `values` in the tensors' places."""
        return [values.get(id(value), value) for value in self.args]

    def results(self, out: Any) -> list[torch.Tensor]:
        """Return what it gave and what it wrote, each once; not what is sparse."""
        return _each_once([*tensors_in(out), *self.writes])

    def wanted(self, results: list[torch.Tensor]) -> bool:
        """Say whether shadows have to be kept for the results."""
        return bool(self.decisions) or any(t.is_floating_point() for t in [*self.reads, *results])

    def lowered(self, results: list[torch.Tensor]) -> bool:
        """Say whether the op has to do with a half format."""
        return any(tensor.dtype in HALVES for tensor in [*self.reads, *results])

    def cast_of(self, results: list[torch.Tensor]) -> torch.Tensor | None:
        """Return what it casts to another floating format: exact values stay what they are; None for other ops."""
        given = self.args[0] if self.name == "_to_copy" else None
        if given is None or id(given) not in self.exact or given.dtype == torch.float64:
            return None
        there = [(t.shape, t.device, t.is_floating_point()) for t in results]
        return given if there == [(given.shape, given.device, True)] else None

    def sampled(self, results: list[torch.Tensor]) -> Call:
        """Return a cast of a sample of its input."""
        given = self.args[0]
        few = sampled(given)
        call = Call(self.func, self.name, (few,), {"dtype": results[0].dtype}, Shadows())
        if id(given) in self.exact:
            call.exact[id(few)] = sampled(self.exact[id(given)])
        return call

    def _takes(self, name: str) -> bool:
        return any(argument.name == name for argument in self.func._schema.arguments)

    def again(self, values: dict[int, torch.Tensor], dtype: torch.dtype | None) -> list[torch.Tensor] | None:
        """Run it once more.

        Args:
            values: The exact inputs.
            dtype: fp64: all floats in it; fp32: half formats in it; None: in the formats that it was given.

        Returns:
            As `results`; None where it does not run so.
        """
        made: dict[int, torch.Tensor] = {}

        def tensor_of(tensor: torch.Tensor) -> torch.Tensor:
            key = id(tensor)
            if key not in made:
                if key in values:
                    exact = values[key]
                    goal = exact.dtype if not exact.is_floating_point() else _format(tensor.dtype, dtype)
                    made[key] = exact.to(goal, copy=any(tensor is other for other in self.writes))
                else:
                    made[key] = self.given[key].clone() if key in self.given else tensor
            return made[key]

        def changed(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return tensor_of(value)
            if isinstance(value, torch.dtype):
                return _format(value, dtype) if value.is_floating_point else value
            return type(value)(map(changed, value)) if isinstance(value, (list, tuple)) else value

        args = [changed(value) for value in self.args]
        kwargs = {key: changed(value) for key, value in self.kwargs.items()}
        if dtype is not None and not self.reads and kwargs.get("dtype") is None and self._takes("dtype"):
            kwargs["dtype"] = dtype  # a factory that was called without one
        if dtype is not None and self.name in ("_softmax", "_log_softmax"):
            args[2] = False  # half_to_float
        func = EXACT_KERNELS.get(self.name, self.func) if dtype is torch.float64 else self.func
        try:
            out = func(*args, **kwargs)
        except Exception:  # no kernel for it, or no memory
            return None
        return _each_once([*tensors_in(out), *(tensor_of(t) for t in self.writes)])


def fit(values: list[torch.Tensor], results: list[torch.Tensor]) -> bool:
    """Say whether two runs of an op gave results of the same shapes."""
    return len(values) == len(results) and all(v.shape == r.shape for v, r in zip(values, results))


def _format(given: torch.dtype, goal: torch.dtype | None) -> torch.dtype:
    if goal is None or (goal is torch.float32 and given not in HALVES):
        return given
    return goal


def _each_once(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the strided ones of the tensors; an in-place op returns the object that it was given."""
    return [tensor for tensor in {id(tensor): tensor for tensor in tensors}.values() if tensor.layout == torch.strided]
