"""Two runs of an optimizer, in fp64 and in a low format, and what is read off them for each parameter.

The first run starts as training would and gives the movement of the weights. The second one starts with second moments
where gradients of this size bring them in the long run, and halves the gradients: do the moments follow?
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from floatline.audit.movement import Movement, Track
from floatline.audit.optimizer_twin import Cut, Twin, make_twin
from floatline.audit.update_report import UpdateRow, judge
from floatline.formats import FORMATS

RUN_LONG = 100_000
"""Updates after which bias corrections are gone, and an optimizer's own schedule of beta2 is at its end."""
SUMMED = 1000
"""Updates whose squares an optimizer without decay (Adagrad) has summed."""
SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum")
"""Keys of a mean of squared gradients: Adam and its kin; RMSprop and Adadelta; Adagrad, which has their sum."""
FALL = 0.5
"""What gradients fall to in the second run."""


class UpdateRun:
    """The two runs of a pair of twins, and what is read off them."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        cuts: Sequence[Cut],
        gradients: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        steps: int,
        noise: float,
        seed: int,
    ) -> None:
        self.optimizer, self.cuts, self.dtype, self.steps, self.noise = optimizer, cuts, dtype, steps, noise
        self.gradients = [cut.of(gradients[cut.name].to(cut.parameter.device)).double() for cut in cuts]
        self.generator = torch.Generator().manual_seed(seed)
        self.group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}

    def rows(self, unseen: dict[str, str]) -> list[UpdateRow]:
        exact, low = self._twins()
        tracks = [Track(_weight(exact, index), _weight(low, index)) for index in range(len(self.cuts))]
        self._step(exact, low, tracks, self.steps, 1.0)
        if low.is_quantised:
            reason = f"{type(self.optimizer).__name__} keeps its state in quantised blocks"
            unseen.update({cut.name: reason for cut in self.cuts})
            return []
        moments = self._second_moments()
        rows = []
        for index, track in enumerate(tracks):
            row = self._row(index, track.movement(), exact, low, moments[index])
            if row is None:
                unseen[self.cuts[index].name] = "its weights leave fp64 as well: the learning rate is too large"
            else:
                rows.append(row)
        return rows

    def _twins(self) -> tuple[Twin, Twin]:
        return (
            make_twin(self.optimizer, self.cuts, torch.float64, start=self.dtype),
            make_twin(self.optimizer, self.cuts, self.dtype),
        )

    def _step(self, exact: Twin, low: Twin, tracks: Sequence[Track | None], steps: int, scale: float) -> None:
        for _ in range(steps):
            drawn = [self._draw(gradient).mul_(scale).to(self.dtype) for gradient in self.gradients]
            exact.step(drawn)
            low.step(drawn)
            for track in tracks:
                if track is not None:
                    track.look()

    def _draw(self, gradient: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(gradient.shape, generator=self.generator).to(gradient.device)
        return gradient * drawn.double().mul_(self.noise).add_(1.0)

    def _second_moments(self) -> list[dict[str, Any]]:
        """Let the second moments of an optimizer that has run long follow gradients that fall to a half."""
        exact, low = self._twins()
        self._step(exact, low, [], 1, 1.0)
        for twin in (exact, low):
            twin.age(RUN_LONG)
        tracks: list[Track | None] = []
        facts: list[dict[str, Any]] = []
        for index, gradient in enumerate(self.gradients):
            key = next((key for key in SECOND_MOMENTS if low.state(index, key) is not None), None)
            facts.append({} if key is None else self._settle(exact, low, index, key, gradient))
            tracks.append(None if key is None else Track(_state_of(exact, index, key), _state_of(low, index, key)))
        if any(tracks):
            self._step(exact, low, tracks, self.steps, FALL)
        for index, track in enumerate(tracks):
            if track is not None:
                facts[index] |= {"second_moment": track.movement(), "second_moment_ratio": track.median_ratio()}
        return facts

    def _settle(self, exact: Twin, low: Twin, index: int, key: str, gradient: torch.Tensor) -> dict[str, Any]:
        """Put both second moments where gradients of this size bring them, and say what the format loses of it."""
        settled = gradient.square() * (1 + self.noise**2) * (SUMMED if key == "sum" else 1)
        here, there = low.state(index, key), exact.state(index, key)
        assert here is not None and there is not None
        here.copy_(settled)
        there.copy_(here)
        lost = (settled != 0) & ((here == 0) | ~here.isfinite())
        return {
            "state_format": _name_of(here.dtype),
            "second_moment_lost": _share(lost, settled != 0),
            "infinite": bool((~here.isfinite()).any()),
        }

    def _row(self, index: int, movement: Movement, exact: Twin, low: Twin, moment: dict[str, Any]) -> UpdateRow | None:
        there, here = exact.weights[index].detach(), low.weights[index].detach()
        if not there.isfinite().all():
            return None
        cut, gradient = self.cuts[index], self.gradients[index]
        group = self.group_of[id(cut.parameter)]
        state_format = moment.get("state_format", _name_of(self.dtype))
        rounded = gradient.to(self.dtype)
        infinite = moment.pop("infinite", False)
        row: dict[str, Any] = {
            "name": cut.name,
            "elements": min(there.numel(), cut.parameter.numel()),
            "lr": _number(group.get("lr")),
            "weights": movement,
            **moment,
            "state_format": state_format,
            "eps_lost": _loses_eps(group, state_format),
            "non_finite": _share(~here.isfinite(), torch.ones_like(here, dtype=torch.bool)),
            "gradients_lost": _share((gradient != 0) & ((rounded == 0) | ~rounded.isfinite()), gradient != 0),
        }
        return UpdateRow(**row, found=judge(UpdateRow(**row), infinite=infinite))


def _weight(twin: Twin, index: int) -> Callable[[], torch.Tensor]:
    return lambda: twin.carried(index)


def _state_of(twin: Twin, index: int, key: str) -> Callable[[], torch.Tensor]:
    """Return a getter: some optimizers make a new tensor at each step."""

    def get() -> torch.Tensor:
        value = twin.state(index, key)
        assert value is not None
        return value

    return get


def _loses_eps(group: dict[str, Any], state_format: str) -> bool:
    """Say whether eps becomes 0 beside the second moment; fused kernels compute in fp32."""
    eps = _number(group.get("eps")) or 0.0
    return eps > 0 and not group.get("fused") and float(torch.tensor(eps).to(torch_dtype(state_format))) == 0.0


def _number(value: Any) -> float | None:
    """Return a setting as a number; Adafactor's eps is a pair."""
    is_number = isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1)
    return float(value) if is_number else None


def _share(part: torch.Tensor, of: torch.Tensor) -> float:
    return float(part.sum()) / max(1.0, float(of.sum()))


def _name_of(dtype: torch.dtype) -> str:
    return next(fmt.name for fmt in FORMATS.values() if fmt.torch_name == str(dtype).removeprefix("torch."))


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of a format by its short name."""
    dtype = getattr(torch, FORMATS[name].torch_name)
    assert isinstance(dtype, torch.dtype)
    return dtype
