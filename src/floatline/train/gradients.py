"""The gradient monitor of a run: fed by the step with norms that it takes anyway, written to gradients.json."""

from __future__ import annotations

from typing import Any

from floatline.step import GradientMonitor
from floatline.train.setup import Run


def make_monitor(run: Run, kept: dict[str, Any] | None) -> GradientMonitor | None:
    """Return the monitor that the recipe asks for, None where it asks for none.

    Args:
        run: On CUDA its monitor reports an update late, so that nothing waits.
        kept: A monitor's state, of a checkpoint.
    """
    every = run.recipe.run.gradients_every
    if every is None:
        return None
    monitor = GradientMonitor(
        run.step.model,
        run.recipe.train.max_grad_norm,
        every=every,
        elements_every=every,  # magnitudes read the gradients twice more
        lag=run.step.device.type == "cuda",
        warn=False,
    )
    if kept:
        monitor.load_state_dict(kept)
    return monitor


def write_gradients(run: Run) -> None:
    """Write what the monitor knows, if there is one."""
    if run.step.monitor is not None:
        run.rundir.write_json("gradients.json", run.step.monitor.record())
