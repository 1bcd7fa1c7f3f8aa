"""The training loop: update, log, evaluate, checkpoint, until the last update; then test the best checkpoint.

A run can be killed at any moment. Run the same command again: it goes on from the newest sound checkpoint with the
same data order and random state, so the losses are those of a run that was never stopped.

Several ranks run the same loop on their shares of the data. Rank 0 alone writes (the others have null objects), and
what decides how it goes on is agreed on by all: when to stop, which checkpoint is the best.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from floatline.errors import FloatlineError, MemoryExceededError, NonFiniteError, RankLostError
from floatline.observe import peak_memory, reset_peak_memory
from floatline.step import GradientMonitor
from floatline.train import rng
from floatline.train.checkpoint import checkpoint_path, find_fault, prune, save_checkpoint
from floatline.train.data import token_counts
from floatline.train.evaluate import Evaluation
from floatline.train.findings import Findings
from floatline.train.identity import is_same_recipe, refuse_other_recipe
from floatline.train.launch import joined, note_lost_rank
from floatline.train.manifest import Manifest, now
from floatline.train.position import Position
from floatline.train.progress import make_view
from floatline.train.recipe import Recipe
from floatline.train.rundir import open_run_directory
from floatline.train.setup import Run, prepare
from floatline.train.stopper import Stopper
from floatline.train.telemetry import Telemetry


class Interrupted(Exception):
    """The user or the system asked the run to end; a checkpoint was written first."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        path: The run directory.
        rank: Of the process; several report the same run.
        status: "finished", "already finished" or "interrupted".
        evaluation: The last evaluation: of the test split where there is one, else of validation.
    """

    path: Path
    status: str
    evaluation: dict[str, Any] | None
    rank: int = 0


def train(recipe: Recipe, *, command: str = "", console: Console | None = None) -> RunResult:
    """Train what `recipe` describes, from the newest checkpoint in its run directory or from the start.

    Args:
        recipe: What to train; see `load_recipe`.
        command: Noted in run.json.
        console: Where progress goes, stderr by default.

    Raises:
        FloatlineError: Anything in recipe, data, model or disk that is not right; NonFiniteError when the guard stops
            the run.
    """
    with joined(recipe) as ranks, Stopper() as stopper, open_run_directory(recipe.run.dir, ranks) as rundir:
        console = Console(quiet=True) if ranks.rank else console or Console(stderr=True)
        manifest = Manifest(rundir)
        before = ranks.on_first(lambda: _finished_before(manifest, recipe))
        if before is not None:
            return RunResult(rundir.path, "already finished", before["result"], ranks.rank)
        manifest.begin(command)
        try:
            with ranks.watching():
                say = partial(console.print, markup=False, highlight=False)
                run = prepare(recipe, rundir, manifest, say, ranks)
                result = Loop(run, console, stopper).run()
        except (Interrupted, KeyboardInterrupt):
            manifest.end("stopped", "interrupted; run the same command again to go on")
            return RunResult(rundir.path, "interrupted", None, ranks.rank)
        except torch.OutOfMemoryError as error:
            _note_end(manifest, "failed", error)
            raise _explain_memory(error, recipe) from error
        except RankLostError as error:
            note_lost_rank(rundir, error)
            raise
        except Exception as error:
            _note_end(manifest, "stopped" if isinstance(error, NonFiniteError) else "failed", error)
            if isinstance(error, NonFiniteError):  # all ranks stop for the same reason
                error.told = ranks.rank > 0
            raise
        manifest.end("finished")
        return RunResult(rundir.path, "finished", result, ranks.rank)


def _finished_before(manifest: Manifest, recipe: Recipe) -> dict[str, Any] | None:
    """Return what an earlier run of this recipe found here, None where there is something left to do.

    Raises:
        RunDirectoryError: The directory is another recipe's.
    """
    tree = recipe.model_dump(mode="json")
    refuse_other_recipe(manifest, tree)
    if manifest.values.get("status") == "finished" and is_same_recipe(manifest, tree):
        return {"result": manifest.values.get("result")}
    return None


def _note_end(manifest: Manifest, status: str, error: Exception) -> None:
    try:
        manifest.end(status, str(error))
    except FloatlineError:  # a full disk: the error on the screen is all there is
        return


def _explain_memory(error: torch.OutOfMemoryError, recipe: Recipe) -> MemoryExceededError:
    micro = recipe.train.micro_batch_size or recipe.train.batch_size
    smaller = f"train.micro_batch_size={micro // 2} (the update stays the same)" if micro > 1 else "smaller images"
    return MemoryExceededError(f"out of GPU memory: {str(error).splitlines()[0]}", hint=f"try {smaller}")


class Loop:
    """One process's part of a run."""

    def __init__(self, run: Run, console: Console, stopper: Stopper | None = None) -> None:
        self.run_ = run
        self.recipe = run.recipe
        self.step = run.step
        self.steps = run.recipe.train.steps or 0
        state = run.state or {}
        self.best: dict[str, Any] | None = state.get("best")
        self.stopper = stopper or Stopper()
        self.ranks = run.ranks
        self._asked_to_stop = False
        run.rundir.cut_metrics(self.step.updates, state.get("logged"))
        view = make_view(console, self.steps, self.step.updates)
        log_every = run.recipe.run.log_every or 1
        self.telemetry = Telemetry(run.rundir, run.step, view, log_every, self.steps, self.step.updates)
        self.position = Position(run.loader, state.get("position"))
        self.step.rollback.extras["data"] = self.position
        self.findings = Findings(run.rundir, run.step, view.say, run.change_recipe)
        self.findings.load(state.get("findings", {}))
        self.findings.attach()
        self._monitor_gradients(state.get("gradients"))

    def _monitor_gradients(self, kept: dict[str, Any] | None) -> None:
        """Let the step feed a monitor with the norms that it takes anyway; extremes are looked at now and then."""
        every = self.recipe.run.gradients_every
        if every is None:
            return
        self.step.monitor = GradientMonitor(
            self.step.model,
            self.recipe.train.max_grad_norm,
            every=every,
            elements_every=every,
            lag=self.step.device.type == "cuda",
            warn=False,
        )
        if kept:
            self.step.monitor.load_state_dict(kept)

    def _write_gradients(self) -> None:
        if self.step.monitor is not None:
            self.run_.rundir.write_json("gradients.json", self.step.monitor.record())

    def run(self) -> dict[str, Any] | None:
        """Train to the end, then test; returns the last evaluation's record."""
        self._note_start()
        try:
            with self.stopper.deferring():
                for batch in self._batches():
                    self._update(batch)
                self.telemetry.flush()
            return self._finish()
        finally:
            self.telemetry.close()

    def _note_start(self) -> None:
        reset_peak_memory(self.step.device)
        parameters = list(self.step.model.parameters())
        values = self.run_.manifest.values
        resumed = values.get("resumed", [])
        if self.run_.state is not None:
            resumed = [*resumed, {"at_step": self.step.updates, "time": now()}]
        self.run_.manifest.update(
            resumed=resumed,
            ranks=self.ranks.size,
            parameters={
                "total": sum(p.numel() for p in parameters),
                "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            },
        )

    def _batches(self) -> Iterator[Any]:
        """Yield one update's data after the other, from where a checkpoint, or a rollback, left off."""
        if self.run_.state is not None:
            self.run_.loader.load_state_dict(self.run_.state["loader"])
        while self.step.updates < self.steps:
            before = rng.capture() if self.position.moved else None
            iterator = iter(self.run_.loader)
            if self.run_.state is not None:  # after the iterator was made: making one draws random numbers
                rng.restore_rank(self.run_.state["rng"], self.ranks.rank)
                self.run_.state = None
            elif before is not None:
                rng.restore(before)
            self.step.rollback.begin()
            for batch in self.position.counted(iterator):
                yield batch
                if self.step.updates >= self.steps:
                    return
                if self.position.moved:
                    break

    def _update(self, batch: Any) -> None:
        """One update and what is due after it."""
        targets, tokens, self._asked_to_stop = self._sum_up(batch)
        lr, update = self.step.optimizer.param_groups[0]["lr"], self.step.updates + 1
        output = self.step(batch)
        done = self.step.updates
        back = output.rolled_back_to
        if back is None and self._rests_on(done):
            back = self.step.read_verdict()
        if back is not None:
            self._went_back(back, update)
            return
        record = {
            "step": done,
            "epoch": done * self.recipe.train.batch_size / len(self.run_.datasets["train"]),
            "lr": lr,
            "samples": self.recipe.train.batch_size,
            "target_tokens": targets,
            "tokens": tokens,
        }
        self.telemetry.add(output, record)
        self._after_update(done)

    def _rests_on(self, done: int) -> bool:
        """Say whether an evaluation, a checkpoint or the result is made from what update `done` has left."""
        due = done == self.steps or done % (self.recipe.train.checkpoint_every or self.steps) == 0
        return due or self._evaluation_due(done) or self._asked_to_stop

    def _went_back(self, to: int, update: int) -> None:
        """The guard has put weights and data position back; what was logged since is made again.

        Args:
            to: The snapshot's update.
            update: The one whose batch was handed out last.
        """
        self.telemetry.flush()
        if self.findings.leave_out:
            self.position.leave_out(behind=update - self.step.sentinel.skips[-1].step)
        self.telemetry.view.say(f"went back to update {to}")
        self.telemetry.restart_clock()
        if self._asked_to_stop:
            if not checkpoint_path(self.run_.rundir.checkpoints, to).exists():
                self._save()
            raise Interrupted

    def _sum_up(self, batch: Any) -> tuple[int, int, bool]:
        """Return the targets and tokens of all ranks, and whether any of them was asked to stop."""
        micro_batches = batch if isinstance(batch, list) else [batch]
        targets, tokens = map(sum, zip(*(token_counts(micro) for micro in micro_batches), strict=True))
        told = self.ranks.tell([int(targets), int(tokens), self.stopper.asked])
        all_targets, all_tokens, asked = (sum(numbers) for numbers in zip(*told, strict=True))
        return int(all_targets), int(all_tokens), asked > 0

    def _after_update(self, done: int) -> None:
        last = done == self.steps
        due = done % (self.recipe.train.checkpoint_every or self.steps) == 0
        improved = self._evaluate(done) if self._evaluation_due(done) else False
        if due or improved or last or self._asked_to_stop:
            self.telemetry.flush()
            self._save()
        if self._asked_to_stop and not last:
            raise Interrupted
        if due or improved or last:
            self.telemetry.restart_clock()

    def _evaluation_due(self, done: int) -> bool:
        if "validation" not in self.run_.datasets:
            return False
        return done == self.steps or done % (self.recipe.eval.every or self.steps) == 0

    def _evaluate(self, done: int) -> bool:
        """Evaluate on validation; say whether this is the best so far."""
        self.telemetry.flush()
        dataset = self.run_.datasets["validation"]
        evaluation = self.run_.evaluator.evaluate(dataset, "validation", generate=self.recipe.eval.generate)
        evaluation = self.ranks.on_first(lambda: evaluation)  # what is the best must be the same for all
        self.telemetry.evaluation(evaluation, done)
        self._write_answers(evaluation)
        self.telemetry.restart_clock()
        return self._note_best(evaluation, done)

    def _note_best(self, evaluation: Evaluation, done: int) -> bool:
        metric = self.recipe.eval.metric or "loss"
        value = evaluation.accuracy if metric == "accuracy" else evaluation.loss
        if value is None or not math.isfinite(value):
            return False
        rank = [value if metric == "accuracy" else -value, -evaluation.loss]  # equal accuracy: the lower loss
        if self.best is not None and rank <= self.best["rank"]:
            return False
        self.best = {"best_step": done, "metric": metric, "value": value, "rank": rank}
        return True

    def _save(self) -> None:
        """Write a checkpoint of this moment and prune old ones."""
        run = self.run_
        state = {
            "step": self.step.state_dict(),
            "rng": self.ranks.collect(rng.capture()),  # before the loader, which after a rollback makes an iterator
            "loader": run.loader.state_dict(),
            "best": self.best,
            "position": self.position.kept(),
            "findings": self.findings.state(),
            "logged": run.rundir.logged(),
            "gradients": self.step.monitor.state_dict() if self.step.monitor is not None else None,
        }
        self._write_gradients()
        plain, shards = run.weights.split(state)
        directory = run.rundir.checkpoints
        save_checkpoint(directory, self.step.updates, plain, lambda path: run.weights.write(path, shards), self.ranks)
        self.step.rollback.at_checkpoint()
        keep = {self.best["best_step"]} if self.best else set()
        self.ranks.on_first(lambda: prune(directory, keep_last=self.recipe.train.keep_last, keep=keep))
        run.manifest.update(best=self.best, peak_memory_bytes=peak_memory(self.step.device))

    def _write_answers(self, evaluation: Evaluation) -> None:
        lines = [json.dumps(asdict(answer)) + "\n" for answer in evaluation.answers]
        self.run_.rundir.write_text("samples.jsonl", "".join(lines))

    def _finish(self) -> dict[str, Any] | None:
        """Test the best checkpoint where there is test data; note the result."""
        run = self.run_
        result = {key: value for key, value in self.best.items() if key != "rank"} if self.best else None
        if "test" in run.datasets:
            step = self._load_best()
            evaluation = run.evaluator.evaluate(run.datasets["test"], "test", generate=self.recipe.eval.generate)
            self.telemetry.evaluation(evaluation, step)
            self._write_answers(evaluation)
            result = {**(result or {}), **evaluation.record(step)}
        facts = self.step.stack.facts()
        run.manifest.update(result=result, peak_memory_bytes=peak_memory(self.step.device), technique_facts=facts)
        return result

    def _load_best(self) -> int:
        """Put the best checkpoint's weights into the model; returns its update."""
        if self.best is None or self.best["best_step"] == self.step.updates:
            return self.step.updates
        path = checkpoint_path(self.run_.rundir.checkpoints, self.best["best_step"])
        fault = self.ranks.on_first(lambda: find_fault(path))
        if fault is not None:
            self.telemetry.view.say(f"the best checkpoint is damaged ({fault}); the last weights are tested instead")
            return self.step.updates
        self.run_.weights.read(path)
        return int(self.best["best_step"])
