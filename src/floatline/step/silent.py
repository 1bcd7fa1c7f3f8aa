"""Trouble that no NaN shows: weights that do not move, updates that are rounded away, a loss that jumps.

    gradients zero      the gradient norm is 0, several updates in a row
    loss spike          the loss is far above its recent median: robust z-score (x - median) / (1.4826 MAD)
    updates swallowed   most sampled weights of a half format keep their bits: the update is below half an ulp
    no weight changed   no sampled weight has other bits than at the last look
    loss scale floor    the loss scale has fallen to 1
    little headroom     an activation is within a factor of 2 of its format's end
    buffer not finite   a buffer that no forward writes holds NaN

The first two look at every update, at numbers that the host has read anyway. The others look every N updates, at a
sample: up to 64 elements of each parameter, and the outputs of all leaf modules in one forward. On CUDA what they
measure is read a step later (readback.py).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from floatline.step.live_buffers import LiveBuffers
from floatline.step.readback import Readback
from floatline.step.spikes import Spikes
from floatline.step.verdict import Alarm

ZEROS_IN_A_ROW = 3
SWALLOWED = 0.5
"""Share of sampled weights that keep their bits, above which an update counts as swallowed."""
PACE = 0.01
"""Share of the highest learning rate so far, below which nobody expects weights to move."""
FLOOR = 1.0
HEADROOM_BITS = 1.0
SAMPLE = 64
"""Elements of a parameter that are looked at."""
_HALVES = (torch.float16, torch.bfloat16)


class SilentTrouble:
    """Looks for it; raises alarms.

    Args:
        model: The model.
        every: Updates between looks at samples; None never looks.
        alarm: Called with each alarm.
        buffers: For those that no forward writes.
        carries: The optimizer keeps what rounding cuts off, so a weight that keeps its bits is no sign.

    Attributes:
        headroom: Module -> bits to overflow of its output, from the last look; only of modules that answer in a half
            format.
        measured: The last 16 looks at it, each its update and `headroom`.
        looks: How many there were.
        swallowed: Share of sampled weights that kept their bits at the last look; None before.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int | None,
        alarm: Callable[[Alarm], None],
        buffers: LiveBuffers,
        carries: bool = False,
    ) -> None:
        self.model = model
        self.every = every
        self.headroom: dict[str, float] = {}
        self.measured: deque[tuple[int, dict[str, float]]] = deque(maxlen=16)
        self.looks = 0
        self.swallowed: float | None = None
        self._raise = alarm
        self._buffers = buffers
        self._carries = carries
        self._spikes = Spikes()
        self._zeros = 0
        self._quiet_until: dict[str, int] = {}
        self._before: list[torch.Tensor] | None = None
        self._highest_rate = 0.0
        self._last: torch.Tensor | None = None
        self._waiting: list[tuple[int, Readback, Callable[[int, list[float]], None]]] = []

    # Every update

    def number(self, step: int, loss: float, grad_norm: float) -> None:
        """Look at the loss and gradient norm of an update, as the host reads them."""
        self._zeros = self._zeros + 1 if grad_norm == 0.0 else 0
        if self._zeros == ZEROS_IN_A_ROW:
            self._alarm(
                step,
                "gradients zero",
                f"all gradients were 0 in {ZEROS_IN_A_ROW} updates in a row",
                "look for detach(), a dead activation, a loss scale or learning signal that underflows",
            )
        z = self._spikes.score(loss)
        if z is not None:
            self._alarm(
                step,
                "loss spike",
                f"the loss {loss:.4g} is {z:.0f} robust deviations above its recent median",
                "look at the batch; lower the learning rate or clip harder if it comes again",
            )
        self._read()

    # Every N updates

    def due(self, step: int) -> bool:
        """Say whether update `step` is one at which samples are looked at."""
        return self.every is not None and step % self.every == 0

    def before_update(self, parameters: list[torch.Tensor]) -> None:
        """Take the bits of sampled weights whose gradient is not 0; call it between backward and update."""
        trained = [p for p in parameters if p.grad is not None and p.numel() and not p.grad.is_sparse]
        self._before = [torch.cat([_sample(p).float() for p in trained]) if trained else torch.zeros(0)]
        if trained:
            moved = torch.cat([(_sample(p.grad) != 0).to(p.device) for p in trained if p.grad is not None])
            self._before.append(moved)

    def after_update(
        self,
        step: int,
        parameters: list[torch.Tensor],
        groups: list[dict[str, Any]],
        scale: Any,
        finite: torch.Tensor | bool = True,
    ) -> None:
        """Compare with the bits from before the update, and look at the loss scale and the buffers.

        Args:
            step: The update.
            parameters: What the optimizer steps.
            groups: Its groups, for their learning rates.
            scale: The loss scale, 0-d; None without one.
            finite: The verdict; an update that was not made moves nothing.
        """
        before, self._before = self._before, None
        if before is not None and len(before) == 2 and self._is_at_pace(groups):
            trained = [p for p in parameters if p.grad is not None and p.numel() and not p.grad.is_sparse]
            now = torch.cat([_sample(p).float() for p in trained])
            kept = ((now == before[0]) & before[1]).sum()
            same = (now == self._last).all() if self._last is not None and self._last.shape == now.shape else None
            moving = torch.where(torch.as_tensor(finite).to(kept.device), before[1].sum(), 0)
            numbers = [kept.float(), moving.float(), *([same.float()] if same is not None else [])]
            self._last = now
            rounds = not self._carries and any(p.dtype in _HALVES for p in trained)  # fp32 keeps its bits on converging
            self._waiting.append((step, Readback.of(numbers), lambda s, values: self._moved(s, values, rounds)))
        if scale is not None:
            self._waiting.append((step, Readback.of([scale]), self._scale))
        for name in self._buffers.bad() if self._is_on_cpu() else ():
            self._alarm(step, "buffer not finite", f"{name} holds NaN", "load it from a good checkpoint, or reset it")

    def _is_at_pace(self, groups: list[dict[str, Any]]) -> bool:
        """Say whether the learning rate is worth an update; at the end of a schedule it is meant not to be."""
        rate = max((float(group.get("lr", 1.0)) for group in groups), default=0.0)
        self._highest_rate = max(self._highest_rate, rate)
        return rate > PACE * self._highest_rate

    def _is_on_cpu(self) -> bool:
        return next((p.device.type == "cpu" for p in self.model.parameters()), True)

    def _moved(self, step: int, values: list[float], rounds: bool) -> None:
        kept, with_gradient, *same = values
        if not with_gradient:
            return
        self.swallowed = kept / with_gradient
        if same and same[0] == 1.0:
            self._alarm(
                step,
                "no weight changed",
                f"no sampled weight has changed in the last {self.every} updates",
                "look at the learning rate and at which parameters the optimizer has",
            )
        elif rounds and self.swallowed > SWALLOWED:
            self._alarm(
                step,
                "updates swallowed",
                f"{self.swallowed:.0%} of the sampled weights that have a gradient did not change: rounding takes the "
                "update away",
                "keep fp32 weights (-mixed), or use the technique master_weights, kahan or stochastic_rounding",
            )

    def _scale(self, step: int, values: list[float]) -> None:
        if values[0] <= FLOOR:
            self._alarm(
                step,
                "loss scale floor",
                f"the loss scale is {values[0]:g}",
                "the overflow is not the scale's: diagnose it, or use bf16",
            )

    @contextmanager
    def measuring(self, step: int) -> Iterator[None]:
        """Measure the headroom of each leaf module's output in the forwards inside."""
        found: dict[str, tuple[torch.dtype, torch.Tensor]] = {}

        def hook_of(name: str) -> Callable[..., None]:
            def look(module: nn.Module, args: Any, output: Any) -> None:
                if isinstance(output, torch.Tensor) and output.dtype in _HALVES and output.numel():
                    largest = output.detach().abs().amax().float()
                    known = found.get(name)
                    found[name] = output.dtype, largest if known is None else torch.maximum(known[1], largest)

            return look

        leaves = [(name, module) for name, module in self.model.named_modules() if not any(module.children())]
        hooks = [module.register_forward_hook(hook_of(name)) for name, module in leaves]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if found:
            names, dtypes = list(found), [kind for kind, _ in found.values()]
            reading = Readback.of([largest for _, largest in found.values()])
            self._waiting.append((step, reading, lambda s, values: self._headroom(s, names, dtypes, values)))

    def _headroom(self, step: int, names: list[str], dtypes: list[torch.dtype], values: list[float]) -> None:
        self.headroom = {
            name: math.log2(torch.finfo(kind).max / value)
            for name, kind, value in zip(names, dtypes, values, strict=True)
            if value > 0 and math.isfinite(value)
        }
        if not self.headroom:
            return
        self.measured.append((step, self.headroom))
        self.looks += 1
        name, bits = min(self.headroom.items(), key=lambda item: item[1])
        if bits < HEADROOM_BITS:
            self._alarm(
                step,
                "little headroom",
                f"the output of {name} is {bits:.1f} bits below overflow",
                f"compute it in fp32: precision '...; {name}=32'",
            )

    # Alarms

    def _read(self) -> None:
        waiting, self._waiting = self._waiting, []
        for step, reading, tell in waiting:
            tell(step, reading.tolist())

    def _alarm(self, step: int, name: str, text: str, remedy: str) -> None:
        """Raise an alarm, unless the same one was raised not long ago."""
        if step < self._quiet_until.get(name, 0):
            return
        self._quiet_until[name] = step + 10 * (self.every or 100)
        self._raise(Alarm(step, name, text, remedy))


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Return up to `SAMPLE` elements, evenly spread, as a copy; of a shard those of this rank."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    flat = local.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE].clone()
