"""The run's numbers: one record an update, in metrics.jsonl, as TensorBoard events and on the screen.

Loss and gradient norm of several updates are read from the device together (`run.log_every`), because each read makes
the host wait for a GPU. Non-finite values are logged as what they are. metrics.jsonl has every update; TensorBoard,
which shows no more than a thousand points of a curve and whose writer thread competes with the loop for the
interpreter, gets about that many.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from floatline.observe import peak_memory
from floatline.step import Skip, StepOutput, TrainStep
from floatline.train.evaluate import Evaluation
from floatline.train.progress import ProgressView
from floatline.train.rundir import RunDirectory

_TENSORBOARD_POINTS = 1000
_TIGHTEST = 16
"""Modules whose headroom is logged: those with the least."""
_TENSORBOARD_KEYS = ("loss", "grad_norm", "lr", "loss_scale", "tokens_per_s", "memory_bytes")


@dataclass
class Telemetry:
    """Collects step outputs and writes them out.

    Args:
        rundir: Where metrics.jsonl and TensorBoard events go.
        step: The step whose loss scale and skipped updates are reported.
        view: What the person sees.
        log_every: Updates between reads from the device.
        steps: Updates of the whole run.
        first_step: Updates made before, so that TensorBoard drops what a resumed run writes again.
    """

    rundir: RunDirectory
    step: TrainStep
    view: ProgressView
    log_every: int
    steps: int
    first_step: int
    _waiting: list[tuple[StepOutput, dict[str, Any]]] = field(default_factory=list)
    _reported: int = 0
    _alarmed: int = 0
    _looked: int = 0

    def __post_init__(self) -> None:
        self._reported, self._alarmed = self.step.sentinel.noted, self.step.sentinel.alarmed
        self._looked = self.step.silent.looks
        self.writer: Any = self.rundir.event_writer(self.first_step)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out what happened since the last update (evaluation, checkpoint) from its step time."""
        self._last = time.perf_counter()

    def add(self, output: StepOutput, record: dict[str, Any]) -> None:
        """Take the output of one update, with what the host knows of it (step, epoch, lr, samples, tokens)."""
        self._waiting.append((output, record))
        if len(self._waiting) >= self.log_every:
            self.flush()

    def flush(self) -> None:
        """Read and write all waiting records."""
        if not self._waiting:
            self._write_skips()
            return
        outputs = [output for output, _ in self._waiting]
        values = _read([tensor for o in outputs for tensor in (o.loss, o.grad_norm, o.applied)])
        now = time.perf_counter()
        seconds = (now - self._last) / len(outputs)
        self._last = now
        shared = {
            "step_s": seconds,
            "loss_scale": self.step.scaling.current(),
            "memory_bytes": peak_memory(self.step.device),
        }
        for index, (_, record) in enumerate(self._waiting):
            loss, grad_norm, applied = values[3 * index : 3 * index + 3]
            self._write(
                {"kind": "step", "loss": loss, "grad_norm": grad_norm, "applied": bool(applied)} | record | shared
            )
        self._waiting.clear()
        self._write_skips()

    def _write(self, record: dict[str, Any]) -> None:
        record["tokens_per_s"] = record["tokens"] / record["step_s"]
        self.rundir.log(record)
        if record["step"] % max(1, self.steps // _TENSORBOARD_POINTS) == 0:
            self._add_scalars("train", {key: record[key] for key in _TENSORBOARD_KEYS}, record["step"])
        self.view.show(record, self.step.sentinel.skipped)

    def _add_scalars(self, group: str, values: dict[str, float | None], step: int) -> None:
        """Write TensorBoard events; when the disk refuses them, say so once and do without."""
        if self.writer is None:
            return
        try:
            for key, value in values.items():
                if value is not None:
                    self.writer.add_scalar(f"{group}/{key}", value, step)
        except OSError as error:
            self.writer = None
            self.view.say(f"TensorBoard events stop here: {error}; metrics.jsonl has all the numbers")

    def _write_skips(self) -> None:
        """Write what the guard has noted since: nothing is hidden."""
        sentinel = self.step.sentinel
        for skip in _newest(sentinel.skips, sentinel.noted - self._reported):
            self._write_skip(skip)
        for alarm in _newest(sentinel.alarms, sentinel.alarmed - self._alarmed):
            self.rundir.log({"kind": "alarm", "step": alarm.step, "what": alarm.name, "text": alarm.text,
                             "remedy": alarm.remedy})  # fmt: skip
            self.view.say(f"warning: {alarm}")
        self._reported, self._alarmed = sentinel.noted, sentinel.alarmed
        self._write_headroom()

    def _write_headroom(self) -> None:
        """Write how near to overflow the nearest modules came, where that was looked at since."""
        silent = self.step.silent
        for step, headroom in _newest(silent.measured, silent.looks - self._looked):
            least = sorted(headroom.items(), key=lambda item: item[1])[:_TIGHTEST]
            bits = {name: round(value, 2) for name, value in least}
            self.rundir.log({"kind": "headroom", "step": step, "modules": len(headroom), "bits": bits})
        self._looked = silent.looks

    def _write_skip(self, skip: Skip) -> None:
        action = "rollback" if skip.rolled_back_to is not None else "leave out" if skip.made else "skip"
        record = {"kind": "fault", "step": skip.step, "what": skip.what.value, "action": action, "reason": skip.reason,
                  "parameters": list(skip.parameters[:20]), "micro_batches": list(skip.micro_batches)}  # fmt: skip
        if skip.rolled_back_to is not None:
            record["to"] = skip.rolled_back_to
        self.rundir.log(record)
        self.view.say(skip.reason if skip.made else f"skipped update {skip.step}: {skip.reason}")

    def evaluation(self, evaluation: Evaluation, step: int) -> None:
        """Log an evaluation."""
        self.rundir.log(evaluation.record(step))
        self._add_scalars(evaluation.split, {"loss": evaluation.loss, "accuracy": evaluation.accuracy}, step)
        self.view.say(describe_evaluation(evaluation, step))

    def close(self) -> None:
        """Flush what waits, skipped updates that stopped the run included, and close the files."""
        try:
            self.flush()
            self._write_skips()
            if self.writer is not None:
                self.writer.close()
        except OSError as error:
            self.view.say(f"TensorBoard events are incomplete: {error}")
        finally:
            self.view.close()


def _newest(kept: Sequence[Any], number: int) -> list[Any]:
    """Return the last `number` of what is kept, as far as it is still kept."""
    return list(kept)[max(0, len(kept) - number) :]


def _read(tensors: list[torch.Tensor]) -> list[float]:
    """Return 0-d tensors as numbers; from a GPU all of them with one wait."""
    if tensors[0].is_cuda:
        return torch.stack([tensor.float() for tensor in tensors]).tolist()
    return [float(tensor) for tensor in tensors]


def describe_evaluation(evaluation: Evaluation, step: int) -> str:
    """Return an evaluation as one line."""
    kinds = [f"{kind} {g['correct'] / g['total']:.1%}" for kind, g in sorted(evaluation.groups.items())]
    accuracy = "" if evaluation.accuracy is None else f"  accuracy {evaluation.accuracy:.1%} ({', '.join(kinds)})"
    return (
        f"{evaluation.split} at update {step}: loss {evaluation.loss:.4f}{accuracy}"
        f"  [{evaluation.samples} samples, {evaluation.seconds:.1f} s]"
    )
