"""Trace two updates of the one step, or one inference, on fake tensors: the planner's eyes.

The model is built, techniques and precision are applied, and `TrainStep` runs, all of it the program that will train;
only the tensors have no data. The second update is the one that counts: in the first, optimizer state does not exist
yet. A recorder writes down what would be allocated (recorder.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from floatline.errors import ConfigError
from floatline.hardware import Hardware, resolve
from floatline.observe.events import Phase, Trace
from floatline.observe.failures import explained
from floatline.observe.fake import faking
from floatline.observe.fake_model import fake_batch, fake_model
from floatline.observe.recorder import Recorder, module_names
from floatline.observe.scratch import scratch_of
from floatline.observe.target import Choice, on_target
from floatline.precision import Policy, apply_precision
from floatline.precision import resolve as resolve_precision
from floatline.precision.apply import TARGET_NAMES
from floatline.step import TrainStep, Workload
from floatline.step.batch import call_model
from floatline.techniques import Technique
from floatline.techniques.distributed.standing_in import leaving_out_shadows
from floatline.techniques.placement import watching

MODES = ("train", "inference")
TWO_UPDATES = frozenset({"optimizer_offload", "sharding", "master_weights", "kahan", "stochastic_rounding"})
"""Techniques whose first update allocates otherwise than the later ones."""
MOST_TRACED = 2
"""Micro-batches of one update that are run."""


def trace(
    work: Workload,
    *,
    hardware: str | Hardware = "auto",
    precision: str | Policy = "auto",
    techniques: Sequence[Technique | str] = (),
    mode: str = "train",
    max_grad_norm: float | None = 1.0,
    quick: bool = False,
) -> Trace:
    """Return what two updates of `work` would allocate on `hardware`, without its memory or the GPU.

    Args:
        work: What to train; factories are called under fake tensors, modules and batches are copied without data.
        hardware: Whose rules apply: a catalog name, facts, or "auto" for this machine.
        precision: As for `TrainStep`.
        techniques: As for `TrainStep`.
        mode: "train" or "inference" (forward without gradients).
        max_grad_norm: As for `TrainStep`.
        quick: Run one update and take the second to go the same way, with what the first one left in place. Half the
            time; techniques that do something else in a first update (`TWO_UPDATES`) run both all the same.

    Raises:
        ConfigError: An unknown mode, or what `TrainStep` refuses.
        ModelError: The program fails (failures.py), or cannot run without values (fake.py).
    """
    if mode not in MODES:
        raise ConfigError(f"mode is {mode!r}", hint=f"allowed: {', '.join(MODES)}")
    hardware = resolve(hardware)
    with explained(), _recording(hardware) as recorder:
        model = fake_model(work, recorder)
        batch = _built_batch(work)
        if mode == "inference":
            _infer(recorder, model, batch, precision, hardware)
        else:
            step = TrainStep(
                model,
                work.optimizer,
                precision,
                work.loss,
                max_grad_norm,
                techniques=techniques,
                hardware=hardware,
            )
            recorder.trace.notes += step.stack.notes
            names = {applied.technique.name for applied in step.stack.applied}
            once = quick and not names & TWO_UPDATES
            _update(recorder, step, batch, 1 if once else 2)
            recorder.trace.notes += step.precision.notes
            if once:
                recorder.trace.repeat()
    return recorder.trace


@contextmanager
def _recording(hardware: Hardware) -> Iterator[Recorder]:
    with ExitStack() as stack:
        scratch = scratch_of(hardware)
        recorder = stack.enter_context(faking(lambda mode: Recorder(mode, scratch)))
        assert isinstance(recorder, Recorder)
        taken = stack.enter_context(on_target(hardware))
        stack.enter_context(watching(recorder))
        if torch.distributed.is_initialized():
            stack.enter_context(leaving_out_shadows())
        yield recorder
        recorder.trace.assumptions = list(recorder.assumptions)
        recorder.trace.notes += [_told(choice) for choice in taken if choice.name == "math" and choice.reasons]


def _told(choice: Choice) -> str:
    """Return why attention stores the matrix of all pairs of tokens: what a user would want to change."""
    why = "; ".join(choice.reasons)
    return f"attention falls back to the {choice.name} kernel, which keeps all pairs of tokens: {why}"


def _built_batch(work: Workload) -> Any:
    """The batch is made for real: it is small, and making it may need other libraries."""
    with _disable_current_modes(), unset_fake_temporarily():
        return work.build_batch()


def _start(recorder: Recorder, model: nn.Module) -> None:
    """Begin the record with the model in its place."""
    recorder.restart()
    recorder.enroll_model(model)
    recorder.vocabulary = _vocabulary(model)


def _vocabulary(model: nn.Module) -> int:
    """Return the width of the logits of a language model, 0 for other models."""
    ask: Any = getattr(model, "get_output_embeddings", None)
    head = ask() if ask is not None else None
    weight = getattr(head, "weight", None)
    if weight is not None:
        return int(weight.shape[0])
    return int(getattr(getattr(model, "config", None), "vocab_size", 0) or 0)


def _update(recorder: Recorder, step: TrainStep, batch: Any, updates: int) -> None:
    """Run the updates. Of many micro-batches two are run, in the last: from the second on all find the same memory."""
    model = step.model
    _start(recorder, model)
    with module_names(model, recorder):
        for update in range(updates):
            recorder.begin(update)
            ready = fake_batch(batch, recorder)
            recorder.enroll_batch(ready)
            parts = ready if isinstance(ready, list) else step.stack.split(ready)
            recorder.enroll_batch(parts)
            last = update == updates - 1
            step(parts[: MOST_TRACED if last else 1])
            recorder.trace.micro_batches = len(parts)
            recorder.phase = Phase.BETWEEN
            recorder.enroll_state(step.optimizer)
            recorder.enroll_model(model)
            if not last:
                del ready, parts
        recorder.finish()
    traced = min(MOST_TRACED, recorder.trace.micro_batches)
    recorder.trace.stretch(recorder.trace.micro_batches / traced)


def _infer(recorder: Recorder, model: nn.Module, batch: Any, precision: Any, hardware: Hardware) -> None:
    policy = resolve_precision(precision, hardware).policy
    applied = apply_precision(model.eval(), policy, hardware)
    _start(recorder, model)
    with module_names(model, recorder), torch.no_grad(), applied.autocast():
        recorder.begin(0)
        ready = fake_batch(_unlabelled(model, batch), recorder)
        recorder.enroll_batch(ready)
        output = call_model(model, ready)
        recorder.phase = Phase.BETWEEN
        del output
        recorder.finish()


def _unlabelled(model: nn.Module, batch: Any) -> Any:
    """Return a batch without what only a loss needs; a decoder that is fed the labels keeps them."""
    fed = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not isinstance(batch, dict) or (fed and not any(key.startswith("decoder_input") for key in batch)):
        return batch
    return type(batch)({key: value for key, value in batch.items() if key not in TARGET_NAMES})
