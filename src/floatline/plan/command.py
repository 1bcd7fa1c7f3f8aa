"""What `floatline plan` does, without what it prints: a `PlanRequest` becomes a `PlanReport`.

A request holds the command's options as the user gave them. `answer` loads the model, plans, and adds what people want
to see beside a plan: the table by component, and the largest sizes that still fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from floatline.errors import ConfigError
from floatline.hardware import Hardware, target
from floatline.plan.allocator import AllocatorSettings
from floatline.plan.estimate import Estimate, estimate
from floatline.plan.export import accelerate_config, fsdp_config, not_expressible, trainer_arguments
from floatline.plan.largest import Largest, largest
from floatline.plan.parallel import ALONE, Alone, Helpers
from floatline.plan.plan import Plan, Progress, plan
from floatline.plan.room import room
from floatline.plan.shape import Shape
from floatline.plan.sources import Source, load_source
from floatline.plan.table import columns, component_table, trials_of_table
from floatline.plan.traces import TraceCache
from floatline.precision import resolve as resolve_precision
from floatline.techniques import make_technique

SETTINGS: Mapping[str, Callable[[Plan], dict[str, Any]]] = {
    "trainer": trainer_arguments,
    "accelerate": accelerate_config,
    "fsdp": fsdp_config,
}
"""What a plan can be exported as, and what does it."""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What is asked of `floatline plan`; the fields are its options.

    Args:
        model: As for `load_source`.
        hardware: A name; "all" is for `compare` (side_by_side.py).
        vram: Memory of the GPU as text; see `floatline.hardware.target`.
        capability: Its compute capability as text.
        shape: Sizes of the batch, but for how many rows it has.
        batch: Rows of a micro-batch where `global_batch` is given too, else of an update.
        global_batch: Rows of an update.
        task: As for `load_source`.
        mode: "train" or "inference".
        precision: A policy's string, or "auto".
        techniques: Texts of techniques that stay.
        exclude: Names of techniques not to use.
        exact: Use only what leaves the numbers as they are.
        expandable_segments: Simulate the allocator with them.
        quick: Leave out the table, the largest sizes and advice.

    Raises:
        ConfigError: Options that contradict each other.
    """

    model: str
    hardware: str = "auto"
    vram: str | None = None
    capability: str | None = None
    shape: Shape = field(default_factory=Shape)
    batch: int | None = None
    global_batch: int | None = None
    task: str | None = None
    mode: str = "train"
    precision: str = "auto"
    techniques: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    exact: bool = False
    expandable_segments: bool = False
    quick: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("train", "inference"):
            raise ConfigError(f"mode is {self.mode!r}", hint="allowed: train, inference")
        Shape(batch=self.batch)
        if self.global_batch is not None:
            _check_batches(self.batch, self.global_batch, self.techniques)
        if self.mode == "inference":
            given = {"--technique": self.techniques, "--exclude": self.exclude, "--exact": self.exact,
                     "--global-batch": self.global_batch}  # fmt: skip
            for option in (option for option, value in given.items() if value):
                raise ConfigError(f"{option} is for training, and --mode is inference", hint=f"leave {option} out")

    @property
    def whole_shape(self) -> Shape:
        """The batch of one update."""
        return replace(self.shape, batch=self.global_batch or self.batch)

    @property
    def fixed(self) -> tuple[str, ...]:
        """Techniques that stay: the user's, and the cut of the batch where both sizes are given."""
        if self.batch is None or self.global_batch is None or self.batch == self.global_batch:
            return self.techniques
        return (*self.techniques, f"accumulation(micro_batches={self.global_batch // self.batch})")

    @property
    def left_out(self) -> tuple[str, ...]:
        """Techniques that the search must not use; with both sizes given and equal, the batch stays whole."""
        whole = self.batch is not None and self.batch == self.global_batch and "accumulation" not in self.exclude
        return (*self.exclude, "accumulation") if whole else self.exclude

    @property
    def allocator(self) -> AllocatorSettings:
        """The allocator's settings."""
        return AllocatorSettings(expandable_segments=self.expandable_segments)


def _check_batches(batch: int | None, whole: int, techniques: tuple[str, ...]) -> None:
    if whole < 1:
        raise ConfigError(f"--global-batch {whole} is not 1 or more", hint="give the rows of one update")
    if batch is None:
        return
    if whole % batch:
        cuts = [rows for rows in range(1, whole + 1) if whole % rows == 0]
        near = [*[rows for rows in cuts if rows < batch][-1:], *[rows for rows in cuts if rows > batch][:1]]
        raise ConfigError(
            f"--global-batch {whole} is no multiple of --batch {batch}",
            hint=f"an update of {whole} rows can be cut into micro-batches of {' or '.join(map(str, near))}",
        )
    if any(make_technique(text).name == "accumulation" for text in techniques):
        raise ConfigError(
            "--batch and --global-batch set the micro-batches, and so does --technique accumulation",
            hint="leave one of them out",
        )


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """The answer for one device.

    Attributes:
        source: The model and its batch.
        hardware: The device.
        estimate: What the run takes, with the plan's techniques where there is a plan.
        precision_reason: Why the precision is what it is.
        plan: How to train; None for inference.
        table: (mode, precision) -> estimate of the plain step; empty where it was not asked for.
        largest: The largest sizes that fit; empty where it was not asked for.
        settings: The plan as other programs' settings: name -> keys and values.
        gaps: What those programs cannot say of the plan: name -> what -> what to do instead.
    """

    source: Source
    hardware: Hardware
    estimate: Estimate
    precision_reason: str
    plan: Plan | None = None
    table: Mapping[tuple[str, str], Estimate]
    largest: tuple[Largest, ...] = ()
    settings: Mapping[str, Mapping[str, Any]]
    gaps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether the answer is yes."""
        return bool(self.estimate.fit)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        decided = self.plan.as_dict() if self.plan else {"verdict": self.estimate.verdict}
        return {
            **decided,
            "hardware": self.hardware.name,
            "precision": self.estimate.precision,
            "precision_reason": self.precision_reason,
            "estimate": self.estimate.as_dict(),
            "source": _source_dict(self.source),
            "table": [{"mode": mode, **found.as_dict()} for (mode, _), found in self.table.items()],
            "largest": [vars(found) for found in self.largest],
            "settings": dict(self.settings),
            "settings_cannot_say": dict(self.gaps),
        }


def _source_dict(source: Source) -> dict[str, Any]:
    return {
        "name": source.name,
        "kind": source.kind,
        "task": source.task,
        "origin": source.origin,
        "shape": {name: value for name, value in vars(source.shape).items() if value is not None},
        "facts": dict(source.facts),
        "choices": [vars(choice) for choice in source.choices],
        "notes": list(source.notes),
    }


def load(request: PlanRequest) -> Source:
    """Return the model and batch that a request names.

    Raises:
        ConfigError: A shape or task that the model does not take.
        ModelError: No such model.
    """
    return load_source(request.model, request.whole_shape, task=request.task)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from remarks about configs and losses while a plan builds models that never train."""
    try:
        from transformers.utils import logging
    except ImportError:
        yield
        return
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@quiet()
def answer(request: PlanRequest, progress: Progress = lambda what, done: None) -> PlanReport:
    """Plan for one device.

    Args:
        request: The options.
        progress: Called before each trial with what is tried and how many are done.

    Raises:
        ConfigError: An option that cannot be.
        ModelError: A model that cannot be loaded or run without values.
    """
    hardware = target(request.hardware, vram=request.vram, capability=request.capability)
    resolve_precision(request.precision, hardware)  # a precision that cannot be is told before the model is loaded
    source = load(request)
    with helpers_of(request, source, hardware) as helpers:
        if not request.quick:
            helpers.prepare(
                *list(trials_of_table(hardware, request.allocator).values())[:-1]
            )  # the last is the bottom rung
        make = _inference if request.mode == "inference" else _training
        return make(request, source, hardware, progress, helpers)


def helpers_of(request: PlanRequest, source: Source, hardware: Hardware) -> Alone:
    """Return who makes estimates beside this process; see parallel.py for who may not."""
    count = room() if source.kind != "module" and hardware.kind == "cuda" else 0
    return Helpers((request.model, request.whole_shape, request.task), count) if count else ALONE


def _training(
    request: PlanRequest, source: Source, hardware: Hardware, progress: Progress, helpers: Alone
) -> PlanReport:
    traces = TraceCache(source.work)
    decided = planned(request, source, hardware, traces, progress, helpers=helpers)
    helpers.foresee()  # what the search might have tried is of no use any more
    sizes: tuple[Largest, ...] = ()
    if not request.quick:
        sizes = largest(source, decided, progress, allocator=request.allocator, helpers=helpers)
    table = _table(request, source, hardware, progress, traces, helpers)  # last: helpers had time for it
    return PlanReport(
        source=source,
        hardware=hardware,
        estimate=decided.estimate,
        precision_reason=decided.precision_reason,
        plan=decided,
        table=table,
        largest=sizes,
        settings=settings_of(decided),
        gaps=not_expressible(decided),
    )


def _table(
    request: PlanRequest, source: Source, hardware: Hardware, progress: Progress, traces: TraceCache, helpers: Alone
) -> dict[tuple[str, str], Estimate]:
    if request.quick:
        return {}
    return component_table(source.work, hardware, progress, allocator=request.allocator, traces=traces, helpers=helpers)


def inference_precision(request: PlanRequest, hardware: Hardware) -> tuple[str, str]:
    """Return the precision of inference on a device, and why.

    Raises:
        PrecisionError: The one that was asked for is illegal there.
    """
    if request.precision != "auto":
        return request.precision, resolve_precision(request.precision, hardware).reason
    half = [name for mode, name in columns(hardware) if mode == "inference"][-1]
    return half, "no weight is updated, so none needs more than the format that is multiplied"


def _inference(
    request: PlanRequest, source: Source, hardware: Hardware, progress: Progress, helpers: Alone
) -> PlanReport:
    precision, reason = inference_precision(request, hardware)
    progress(f"inference on {hardware.name}", 0)
    found = estimate(source.work, hardware, precision, mode="inference", allocator=request.allocator)
    table = _table(request, source, hardware, progress, TraceCache(source.work), helpers)
    return PlanReport(
        source=source,
        hardware=hardware,
        estimate=found,
        precision_reason=reason,
        table=table,
        largest=() if request.quick else largest(source, found, progress, allocator=request.allocator),
        settings={},
    )


def planned(
    request: PlanRequest, source: Source, hardware: Hardware, traces: TraceCache, progress: Progress, **changes: Any
) -> Plan:
    """Return the plan of a request for one device."""
    given: dict[str, Any] = {"advice": not request.quick, **changes}
    return plan(
        source.work,
        hardware,
        precision=request.precision,
        techniques=request.fixed,
        exclude=request.left_out,
        exact=request.exact,
        allocator=request.allocator,
        traces=traces,
        progress=progress,
        **given,
    )


def settings_of(decided: Plan) -> dict[str, dict[str, Any]]:
    """Return a plan as the settings of other programs."""
    return {name: function(decided) for name, function in SETTINGS.items()}
