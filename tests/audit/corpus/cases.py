"""The corpus's two lists, the decorators that fill them, and a witness that knows nothing of the audit.

A fault is a function `build(faulty)` that returns a `Program`: with `faulty=False` the same model without the fault,
for which nothing may be asked. The label stands in the decorator. A line that is to be named ends with `# HERE`.

The witness runs the program as a user would, in fp64 and under the policy, and compares what comes out.
"""

import copy
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from floatline.observe.target import cuda_autocast
from floatline.step.batch import call_model

FAULTS: list["Fault"] = []
HEALTHY: list["Healthy"] = []
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Program:
    """What is given to the audit.

    Attributes:
        model: Any module.
        batch: Its batch.
        loss: (model, batch) -> tensor; None for the model's own or its output.
        optimizer: A factory; None where updates are not looked at.
    """

    model: nn.Module
    batch: Any
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None
    optimizer: Any = None


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A program with one planted fault, and what is to be found.

    Attributes:
        build: (faulty) -> Program.
        format: "bf16" or "fp16".
        mode: "mixed" or "true".
        hardware: Whose autocast lists hold.
        modules: Any one of them is right: where the fault is, or where its victim is that has to be kept high.
        failure: "range", "rounding" or "stagnation"; a tuple where either is a true description.
        phase: "forward", "backward", "buffer" or "optimizer".
        curable: A policy with fp32 islands is safe. Not so at the top, nor where coordinates come rounded into the
            module, for cast weights round between modules.
        witness: "outcome": a plain run in the format is off or not finite; "gradient": a parameter's gradient is;
            "buffer": a buffer is; "later": this host's kernels or one step do not show it, a test of its own does.
    """

    build: Callable[[bool], Program]
    format: str
    mode: str
    hardware: str
    modules: tuple[str, ...]
    failure: tuple[str, ...]
    phase: str
    curable: bool
    witness: str

    @property
    def name(self) -> str:
        return self.build.__name__

    @property
    def line(self) -> int | None:
        lines, first = inspect.getsourcelines(self.build)
        marked = [first + place for place, line in enumerate(lines) if line.rstrip().endswith("# HERE")]
        assert len(marked) <= 1, self.name
        return marked[0] if marked else None


@dataclass(frozen=True, kw_only=True)
class Healthy:
    """A program with nothing wrong, in these (format, mode, hardware)."""

    build: Callable[[], Program]
    settings: tuple[tuple[str, str, str], ...]

    @property
    def name(self) -> str:
        return self.build.__name__


def fault(format, mode, failure, modules, phase="forward", *, hardware="cpu", curable=True, witness="outcome"):
    """Decorator: this program goes wrong so."""

    def tuple_of(value):
        return (value,) if isinstance(value, str) else tuple(value)

    def enlist(build):
        FAULTS.append(Fault(build=build, format=format, mode=mode, hardware=hardware, modules=tuple_of(modules),
                            failure=tuple_of(failure), phase=phase, curable=curable, witness=witness))  # fmt: skip
        return build

    return enlist


ALL = (
    ("bf16", "mixed", "cpu"),
    ("bf16", "mixed", "a100-40gb"),
    ("fp16", "mixed", "a100-40gb"),
    ("bf16", "true", "cpu"),
    ("fp16", "true", "cpu"),
)
"""Cast weights run without autocast, so the target's lists make no difference there; fp16 is not for a CPU."""


LARGE = (("bf16", "mixed", "a100-40gb"), ("fp16", "mixed", "a100-40gb"), ("bf16", "true", "cpu"))
"""For models that take long."""


def healthy(build=None, *, settings=ALL):
    """Decorator: there is nothing wrong with this program."""

    def enlist(made):
        HEALTHY.append(Healthy(build=made, settings=settings))
        return made

    return enlist if build is None else enlist(build)


# The witness


def outcome(program, dtype, mode, hardware, scale=1.0):
    """Return value, gradients and buffers of a plain step with all of it in `dtype`, as fp64."""
    model, batch = copy.deepcopy(program.model), program.batch
    if mode == "true" or dtype in (torch.float64, torch.float32):
        model = model.to(dtype)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and dtype in DTYPES.values():
                module.float()
        batch = tree_map(lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t, batch)
    lists = cuda_autocast() if hardware != "cpu" else nullcontext()
    low = dtype in DTYPES.values() and mode == "mixed"
    torch.manual_seed(0)
    with lists, torch.autocast("cpu", dtype=dtype) if low else nullcontext():
        value = program.loss(model, batch) if program.loss else _first(call_model(model, batch))
    total = (
        value
        if value.numel() == 1
        else value.to(torch.float64)
        * torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        / value.numel()
    )
    if value.requires_grad:
        (total.to(torch.float64).sum() * scale).backward()
    gradients = {n: p.grad.double() / scale for n, p in model.named_parameters() if p.grad is not None}
    buffers = {n: b.double() for n, b in model.named_buffers() if b.is_floating_point()}
    return value.detach().double(), gradients, buffers


def _first(output):
    if getattr(output, "loss", None) is not None:
        return output.loss
    leaves = tree_leaves(dict(output) if hasattr(output, "items") else output)
    return next(leaf for leaf in leaves if leaf.is_floating_point())


def off(value, exact):
    """Return the relative error; infinite where it is not finite."""
    if not bool(torch.isfinite(value).all()):
        return float("inf")
    size = float(exact.norm())
    return float((value - exact).norm()) / size if size else float(value.norm() > 0)


def witness_of(case, faulty):
    """Return how far a plain run is off, in what the label says shows it."""
    program = case.build(faulty)
    exact = outcome(program, torch.float64, case.mode, case.hardware)
    scale = 2.0**16 if case.format == "fp16" and case.witness == "gradient" else 1.0
    low = outcome(program, DTYPES[case.format], case.mode, case.hardware, scale)
    while scale > 1 and not all(bool(torch.isfinite(g).all()) for g in low[1].values()):  # as a scaler does
        scale /= 2
        low = outcome(program, DTYPES[case.format], case.mode, case.hardware, scale)
    if case.witness == "outcome":
        return off(low[0], exact[0])
    if case.witness == "gradient":
        return max(off(low[1][n], exact[1][n]) for n in exact[1] if float(exact[1][n].norm()))
    start = {n: b.double() for n, b in program.model.named_buffers() if b.is_floating_point()}
    return max(off(low[2][n] - start[n].to(DTYPES[case.format]).double(), exact[2][n] - start[n]) for n in exact[2])
