"""The training loop: update, log, evaluate, checkpoint, until the last update; then test the best checkpoint.

A run can be killed at any moment. Run the same command again: it goes on from the newest sound checkpoint with the
same data order and random state, so the losses are those of a run that was never stopped.

Several ranks run the same loop on their shares of the data. Rank 0 alone writes (the others have null objects), and
what decides how it goes on is agreed on by all: when to stop, which checkpoint is the best.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console

from floatline.errors import NonFiniteError
from floatline.observe import peak_memory, reset_peak_memory
from floatline.step.soundness import not_finite
from floatline.train import rng
from floatline.train.best import Best
from floatline.train.checkpoint import checkpoint_path, find_fault, prune, save_checkpoint
from floatline.train.data import token_counts
from floatline.train.evaluate import Evaluation
from floatline.train.findings import Findings
from floatline.train.gradients import make_monitor, write_gradients
from floatline.train.manifest import now
from floatline.train.position import Position
from floatline.train.progress import make_view
from floatline.train.setup import Run
from floatline.train.stopper import Interrupted, Stopper
from floatline.train.telemetry import Telemetry


class Loop:
    """One process's part of a run."""

    def __init__(self, run: Run, console: Console, stopper: Stopper | None = None) -> None:
        self.run_ = run
        self.recipe = run.recipe
        self.step = run.step
        self.steps = run.recipe.train.steps or 0
        state = run.state or {}
        self.best = Best(run.recipe.eval.metric or "loss", state.get("best"))
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
        self.step.monitor = make_monitor(run, state.get("gradients"))

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
        return self.best.note(evaluation, done)

    def _save(self) -> None:
        """Write a checkpoint of this moment and prune old ones; none while the guard counts updates of such weights.

        Raises:
            NonFiniteError: The optimizer has made something of it that is not finite.
        """
        run = self.run_
        if self._is_poisoned():
            return
        state = {
            "step": self.step.state_dict(),
            "rng": self.ranks.collect(rng.capture()),  # before the loader, which after a rollback makes an iterator
            "loader": run.loader.state_dict(),
            "best": self.best.kept,
            "position": self.position.kept(),
            "findings": self.findings.state(),
            "logged": run.rundir.logged(),
            "gradients": self.step.monitor.state_dict() if self.step.monitor is not None else None,
        }
        write_gradients(run)
        plain, shards = run.weights.split(state)
        directory = run.rundir.checkpoints
        save_checkpoint(directory, self.step.updates, plain, lambda path: run.weights.write(path, shards), self.ranks)
        self.step.rollback.at_checkpoint()
        keep = {self.best.step} if self.best.step is not None else set()
        self.ranks.on_first(lambda: prune(directory, keep_last=self.recipe.train.keep_last, keep=keep))
        run.manifest.update(best=self.best.kept, peak_memory_bytes=peak_memory(self.step.device))

    def _is_poisoned(self) -> bool:
        """Say whether weights are not finite that the guard knows of: it has condemned the last update."""
        bad = not_finite(self.step.model, self.step.optimizer)
        if not self.step.agreement.any(bool(bad)):
            return False
        if self.step.sentinel.faults_in_a_row:
            return True
        what = bad or "a share of another rank"
        raise NonFiniteError(
            f"stopped before the checkpoint of update {self.step.updates}: {what} is not finite, though loss and "
            "gradients were: the optimizer made it so",
            hint="earlier checkpoints are sound; look at its eps, betas and lr, or fl.diagnose(..., optimizer)",
        )

    def _write_answers(self, evaluation: Evaluation) -> None:
        lines = [json.dumps(asdict(answer)) + "\n" for answer in evaluation.answers]
        self.run_.rundir.write_text("samples.jsonl", "".join(lines))

    def _finish(self) -> dict[str, Any] | None:
        """Test the best checkpoint where there is test data; note the result."""
        run = self.run_
        result = self.best.record()
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
        if self.best.step is None or self.best.step == self.step.updates:
            return self.step.updates
        path = checkpoint_path(self.run_.rundir.checkpoints, self.best.step)
        fault = self.ranks.on_first(lambda: find_fault(path))
        if fault is not None:
            self.telemetry.view.say(f"the best checkpoint is damaged ({fault}); the last weights are tested instead")
            return self.step.updates
        self.run_.weights.read(path)
        return self.best.step
