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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from floatline.errors import ConfigError, FloatlineWarning, did_you_mean
from floatline.step.clip_advice import ClipAdvice
from floatline.step.gradient_log import GradientLog, write_gradients
from floatline.step.gradient_report import BadGradient, GradientReport
from floatline.step.magnitudes import magnitudes_of, nonfinite_counts
from floatline.step.norm import GradientNorms, norms_of
from floatline.step.readback import Readback
from floatline.techniques.layers import repeated_layers

_PER = ("layer", "parameter")


@dataclass(frozen=True)
class _Look:
    """One update's numbers, perhaps still on their way."""

    step: int
    names: tuple[str, ...]
    sizes: list[int]
    missing: tuple[str, ...]
    numbers: Readback
    looked: bool
    scale: float | None


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
        ConfigError: A setting is out of range, or the model has no parameters.

    Example:
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
        if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
            raise ConfigError(f"max_grad_norm is {max_grad_norm}", hint="give a positive number, or None")
        for name, value in (("every", every), ("elements_every", elements_every)):
            if value < 1:
                raise ConfigError(f"{name} is {value}", hint="give 1 (look at every update) or more")
        if history < 8:
            raise ConfigError(f"history is {history}", hint="give 8 points or more")
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
        self._waiting: _Look | None = None
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
        layers = tuple(repeated_layers(self.model)) if self.per == "layer" else ()
        self._row_of = {name: _row(name, layers, self.per) for name, _ in self._named}

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
            ConfigError: `scale` is no positive number.
        """
        self.step += 1
        if norms is None and not any(p.grad is not None for _, p in self._named):
            self.refresh()  # they may have been replaced since
            if not any(p.grad is not None for _, p in self._named):
                return self._report_none()
        norms = norms or norms_of(self._named)
        look = self._start(norms, scale)
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

    @torch.no_grad()
    def _start(self, norms: GradientNorms, scale: Any) -> _Look:
        """Compute on the device, and start to read."""
        columns = [norms.each]
        looked = (self.step - 1) % self.elements_every == 0
        if looked:
            columns += magnitudes_of(norms)
        factor = _factor(scale)
        if isinstance(factor, torch.Tensor):  # read with the others
            columns.append(factor.detach().to(norms.each.device, torch.float32).reshape(1))
        known = set(norms.names)
        missing = tuple(n for n, p in self._named if p.grad is None and p.requires_grad and n not in known)
        sizes = [size for group in norms.groups for size in group.sizes]
        known_scale = None if scale is None or isinstance(factor, torch.Tensor) else float(factor)
        return _Look(self.step, norms.names, sizes, missing, Readback(torch.cat(columns)), looked, known_scale)

    def _finish(self, look: _Look, norms: GradientNorms | None = None) -> GradientReport:
        """Read, judge and record one update; `norms` where its gradients are still there to be counted."""
        numbers = look.numbers.tolist()
        count = len(look.names)
        scale_read = len(numbers) > (3 if look.looked else 1) * count
        factor = 1.0 / (numbers.pop() if scale_read else look.scale or 1.0)
        each = [value * factor for value in numbers[:count]]
        total = math.sqrt(sum(norm * norm for norm in each))
        report = GradientReport(
            step=look.step,
            norm=total,
            largest=_largest(numbers[count : 2 * count]) * factor if look.looked else None,
            mean=sum(numbers[2 * count :]) * factor / sum(look.sizes) if look.looked else None,
            bad=() if math.isfinite(total) else self._bad(look, each, norms),
            missing=look.missing,
            parameters=count,
            max_grad_norm=self.max_grad_norm,
            scaled=scale_read or look.scale is not None,
        )
        self._record(report, dict(zip(look.names, each, strict=True)))
        return report

    def _bad(self, look: _Look, each: list[float], norms: GradientNorms | None) -> tuple[BadGradient, ...]:
        sick = [place for place, norm in enumerate(each) if not math.isfinite(norm)]
        counts = nonfinite_counts(norms, {look.names[place] for place in sick}) if norms is not None else {}
        found = []
        for place in sick:
            nan, inf = counts.get(look.names[place], (None, None))
            found.append(BadGradient(look.names[place], nan, inf, look.sizes[place], each[place]))
        return tuple(found)

    def _report_none(self) -> GradientReport:
        self.flush()
        missing = tuple(name for name, parameter in self._named if parameter.requires_grad)
        report = GradientReport(self.step, math.nan, missing=missing, max_grad_norm=self.max_grad_norm)
        self._last = report
        return report

    def _record(self, report: GradientReport, each: dict[str, float]) -> None:
        self._last = report
        self.history.add(report, lambda: self._by_row(each))
        if self.warn and report.large and self.history.large_updates == 1:
            warnings.warn(f"{report}; {report.hint}", FloatlineWarning, stacklevel=4)

    def _by_row(self, each: dict[str, float]) -> dict[str, float]:
        """Return norms by layer, or by parameter, in the model's order."""
        if self.per == "parameter":
            return each
        squares: dict[str, float] = {}
        for name in self._in_order(each):
            row = self._row_of.get(name, name)
            squares[row] = squares.get(row, 0.0) + each[name] * each[name]
        return {row: math.sqrt(square) for row, square in squares.items()}

    def _in_order(self, each: dict[str, float]) -> Iterator[str]:
        yield from (name for name in self._row_of if name in each)
        yield from (name for name in each if name not in self._row_of)


def _row(name: str, layers: tuple[str, ...], per: str) -> str:
    """Return what a parameter's norm is summed up under: its layer, or else its module."""
    if per == "parameter":
        return name
    return next((layer for layer in layers if name.startswith(f"{layer}.")), name.rpartition(".")[0] or name)


def _factor(scale: Any) -> Any:
    """Return the loss scale as a number, or a 0-d tensor that is still on the device.

    Raises:
        ConfigError: It is no positive number.
    """
    if isinstance(scale, torch.amp.GradScaler):
        on_device = getattr(scale, "_scale", None)  # get_scale() would wait for it
        return scale.get_scale() if on_device is None or not scale.is_enabled() else on_device
    if isinstance(scale, torch.Tensor) and scale.numel() == 1:
        return scale
    if scale is None or (isinstance(scale, int | float) and 0 < scale < math.inf):
        return scale
    raise ConfigError(f"scale is {scale!r}", hint="give the GradScaler, its scale as a positive number, or nothing")


def _largest(values: list[float]) -> float:
    """Return the largest of magnitudes, NaN if one is: Python's max keeps or drops it by its place."""
    return math.nan if any(value != value for value in values) else max(values)
