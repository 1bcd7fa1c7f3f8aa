"""A monitor of gradients for anybody's loop: one look after backward, before clipping.

    monitor = GradientMonitor(model, max_grad_norm=1.0)
    for batch in batches:
        model(**batch).loss.backward()
        report = monitor.check()
        if not report:
            print(report, report.hint)
        if report.finite:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad()
    print(monitor.advice())
    monitor.save("gradients.json")

How it works. The 2-norm, the largest and the sum of magnitudes of every gradient are taken on the device, in fp32
whatever the gradients' format, and read by the host together: one wait an update on CUDA, where a monitor that
asks each parameter for isnan, isinf, max and mean waits four times a parameter. A NaN or Inf shows in its parameter's
norm, so elements are counted only when something is wrong. With `lag=True` nothing waits: each `check()` returns
the report of the update before, which is what a loop that must not wait can act on.

Loss scaling. Call `scaler.unscale_(optimizer)` first, or give the scaler (or the scale) to `check(scale=...)`, which
divides what is recorded and leaves the gradients alone.

Several ranks. Under FSDP2 and DTensor all numbers are those of the whole gradients, the same on every rank; every rank
must call `check()`. Under DDP gradients are alike after backward. Sparse gradients count by their values.

Parameters are found when the monitor is made: make it after adapters and sharding. Frozen ones and those without a
gradient are passed over; a gradient that is there counts, as it does for `clip_grad_norm_`. An update in which no
parameter has a gradient is reported, and left out of the history.

Not covered: gradients that no parameter holds after backward (an optimizer that steps in the backward), activations.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal

from torch import nn

from floatline.errors import ConfigError, FloatlineWarning, did_you_mean
from floatline.step.clip_advice import ClipAdvice
from floatline.step.gradient_log import GradientLog, write_gradients
from floatline.step.gradient_look import Look
from floatline.step.gradient_report import GradientReport
from floatline.step.gradient_rows import GradientRows
from floatline.step.norm import GradientNorms, norms_of

_PER = ("layer", "parameter")


class GradientMonitor:
    """Judges and records the gradients of every update.

    Args:
        model: The model, with adapters and shards on it.
        max_grad_norm: What you clip to; None if you do not. A norm above ten times it is reported, the first time as a
            warning.
        every: Updates between rows of norms by layer or parameter. The totals are kept of every update.
        per: "layer" sums up the parameters of each repeated layer, and of each other module; "parameter" does not.
        elements_every: Updates between looks at largest and mean magnitude, which read the gradients twice more; the
            total norm and NaN and Inf are seen in every update.
        history: Points to keep over the whole run (a quarter as many rows by layer); older ones are merged.
        lag: Return the report of the update before, so that the host never waits for the device.
        warn: Warn of the first large norm; False where the caller looks at the reports.

    Raises:
        ConfigError: A setting is out of range, or `model` is no module or has no parameters.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1, bias=False)
        >>> monitor = GradientMonitor(model, max_grad_norm=1.0)
        >>> model(torch.tensor([3.0, 4.0])).backward()
        >>> monitor.check().norm
        5.0
        >>> model(torch.tensor([3.0, float("nan")])).backward()
        >>> print(monitor.check())
        update 2: 1 of 1 gradients is not finite: weight: 1 NaN of 2 elements
    """

    def __init__(
        self,
        model: nn.Module,
        max_grad_norm: float | None = 1.0,
        every: int = 10,
        per: Literal["layer", "parameter"] = "layer",
        elements_every: int = 1,
        history: int = 1000,
        lag: bool = False,
        warn: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"model is a {type(model).__name__}", hint="give the torch.nn.Module that is being trained"
            )
        if max_grad_norm is not None and not _is_limit(max_grad_norm):
            raise ConfigError(f"max_grad_norm is {max_grad_norm!r}", hint="give a positive number, or None")
        for name, value in (("every", every), ("elements_every", elements_every)):
            if not _is_count(value, 1):
                raise ConfigError(f"{name} is {value!r}", hint="give 1 (look at every update) or more")
        if not _is_count(history, 8):
            raise ConfigError(f"history is {history!r}", hint="give 8 points or more")
        if per not in _PER:
            raise ConfigError(f"per is {per!r}", hint=did_you_mean(str(per), _PER))
        self.model = model
        self.max_grad_norm = max_grad_norm
        self.per = per
        self.lag = lag
        self.warn = warn
        self.elements_every = elements_every
        self.step = 0
        self.history = GradientLog(per=per, every=every, history=history, max_grad_norm=max_grad_norm)
        self._waiting: Look | None = None
        self._last = GradientReport(0, math.nan)
        self.refresh()

    def refresh(self) -> None:
        """Find the model's parameters again, after adapters were added or layers replaced.

        Raises:
            ConfigError: The model has no parameters.
        """
        self._named = list(self.model.named_parameters())
        if not self._named:
            raise ConfigError(
                f"{type(self.model).__name__} has no parameters", hint="give the module that is being trained"
            )
        self._rows = GradientRows(self.model, self.per)

    def check(self, norms: GradientNorms | None = None, *, scale: Any = None) -> GradientReport:
        """Look at the gradients as they are now: after backward, before clipping.

        Args:
            norms: What `norms_of` has computed for clipping already, so that it is not done twice; None computes it
                from the model's parameters.
            scale: Loss scale that the gradients still carry: a number, a 0-d tensor or a GradScaler; None if they carry
                none.

        Returns:
            The report of this update; with `lag=True` that of the update before.

        Raises:
            ConfigError: `scale` is no positive number, or `norms` something else.
        """
        if norms is not None and not isinstance(norms, GradientNorms):
            raise ConfigError(f"norms is a {type(norms).__name__}", hint="give what floatline.step.norms_of returned")
        self.step += 1
        if norms is None and not any(p.grad is not None for _, p in self._named):
            self.refresh()  # they may have been replaced since
            if not any(p.grad is not None for _, p in self._named):
                return self._report_none()
        norms = norms or norms_of(self._named)
        look = Look.start(self.step, self._named, norms, scale, (self.step - 1) % self.elements_every == 0)
        if not self.lag:
            return self._finish(look, norms)
        waiting, self._waiting = self._waiting, look
        return self._finish(waiting) if waiting else self._last

    def flush(self) -> GradientReport:
        """Read the update that is still on its way (`lag=True`) and return the report of the last one."""
        waiting, self._waiting = self._waiting, None
        return self._finish(waiting) if waiting else self._last

    def advice(self) -> ClipAdvice:
        """Say what the run's own norms tell of clip values."""
        self.flush()
        return self.history.advice()

    def record(self) -> dict[str, Any]:
        """Return all that is known of the run's gradients, as JSON can hold it: the content of `gradients.json`."""
        self.flush()
        return self.history.record(self.step)

    def save(self, path: str | Path) -> Path:
        """Write `record()` as JSON; the file appears complete or not at all.

        Args:
            path: A file, or a directory that gets a `gradients.json`.

        Returns:
            The file written. `floatline report` shows the one in a run directory.

        Raises:
            RunDirectoryError: It cannot be written.
        """
        return write_gradients(self.record(), path)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole history, for a checkpoint: plain numbers, lists and texts, bounded in size."""
        self.flush()
        return self.history.state_dict(self.step)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            ConfigError: It is of another version, or has norms per parameter where this monitor has them per layer.
        """
        self.history.load_state_dict(state)
        self.step = state["step"]
        self._waiting = None

    def _finish(self, look: Look, norms: GradientNorms | None = None) -> GradientReport:
        """Read, report and record one update; `norms` where its gradients are still there to be counted."""
        report, each = look.report(norms, self.max_grad_norm)
        self._record(report, each)
        return report

    def _report_none(self) -> GradientReport:
        self.flush()
        missing = tuple(name for name, parameter in self._named if parameter.requires_grad)
        report = GradientReport(self.step, math.nan, missing=missing, max_grad_norm=self.max_grad_norm)
        self._last = report
        return report

    def _record(self, report: GradientReport, each: dict[str, float]) -> None:
        self._last = report
        self.history.add(report, lambda: self._rows.norms(each))
        if self.warn and report.large and self.history.large_updates == 1:
            warnings.warn(f"{report}; {report.hint}", FloatlineWarning, stacklevel=4)


def _is_limit(value: Any) -> bool:
    return isinstance(value, Real) and 0 < float(value) < math.inf


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and int(value) >= least
