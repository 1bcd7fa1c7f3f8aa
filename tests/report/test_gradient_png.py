import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import floatline as fl
from floatline.errors import ConfigError
from floatline.report.gradient_png import plot_gradients

from .gradient_records import bad_point, point, record

pytestmark = pytest.mark.filterwarnings("error:constrained_layout")


def colours_of(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}  # type: ignore[union-attr,misc]


def test_a_monitors_gradients(tmp_path: Path) -> None:
    model = nn.Linear(3, 1)
    monitor = fl.GradientMonitor(model)
    model(torch.ones(1, 3)).sum().backward()
    monitor.check()
    assert plot_gradients(monitor, tmp_path / "deep" / "a.png") == tmp_path / "deep" / "a.png"
    monitor.save(tmp_path)
    plot_gradients(tmp_path, tmp_path / "b.png")
    assert colours_of(tmp_path / "deep" / "a.png") == colours_of(tmp_path / "b.png")


def test_what_is_not_finite_is_red(tmp_path: Path) -> None:
    red = (200, 48, 60)
    assert red not in colours_of(plot_gradients(record(), tmp_path / "good.png"))
    assert red in colours_of(plot_gradients(record(bad=(12,)), tmp_path / "bad.png"))


@pytest.mark.parametrize(
    "content",
    [
        record(1),
        record(layers=60),
        record(points={"kept": [bad_point(step) for step in range(1, 9)]}),
        record(points={"kept": [point(step, updates=4) for step in range(1, 40, 4)]}, max_grad_norm=None),
        record(rows={"names": ["$\\frac{x$" * 9, "b"], "steps": [1], "norms": [[0.0, -1.0]]}),
        record(rows={}),
        record(rows={"names": ["a"], "steps": [1, 2], "norms": [[math.inf], [math.nan]]}),
    ],
)
def test_strange_records_are_drawn(tmp_path: Path, content: dict) -> None:
    (tmp_path / "gradients.json").write_text(json.dumps(content))
    assert len(colours_of(plot_gradients(tmp_path / "gradients.json", tmp_path / "a.png"))) > 5


def test_nothing_recorded_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no update has been recorded") as caught:
        plot_gradients(fl.GradientMonitor(nn.Linear(1, 1)), tmp_path / "a.png")
    assert "monitor.check()" in caught.value.hint
