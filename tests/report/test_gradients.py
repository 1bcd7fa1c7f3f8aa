import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.errors import RunDirectoryError
from floatline.report import load_run
from floatline.report.gradients import Gradients, load_gradients

from .conftest import MakeRun
from .gradient_records import record


def test_it_reads_what_the_monitor_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    monitor = fl.GradientMonitor(model, max_grad_norm=2.0, every=5)
    for update in range(30):
        model.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        if update == 7:
            model[1].weight.grad[0, 2] = math.inf
        monitor.check()
    gradients = load_gradients(monitor.save(tmp_path))
    assert gradients == load_gradients(tmp_path)
    assert (gradients.updates, gradients.bad_updates, gradients.max_grad_norm) == (30, 1, 2.0)
    assert [point.norm for point in gradients.points[:7]] == [point.norm for point in monitor.history.points.kept[:7]]
    assert [point.largest for point in gradients.points[:7]] == [
        point.largest for point in monitor.history.points.kept[:7]
    ]
    assert gradients.points[7].bad_elements == 1
    assert gradients.names == ("0", "1") and gradients.steps == (1, 6, 11, 16, 21, 26)
    assert gradients.rows[1][1] == math.inf
    assert gradients.advice == monitor.advice().text
    assert [row.value for row in gradients.candidates] == [row.value for row in monitor.advice().candidates]


@pytest.mark.parametrize(
    "strange",
    [
        {},
        {"points": None, "rows": 3, "advice": []},
        {"points": {"kept": [None, 3, {}, {"step": "x", "updates": None}]}},
        {"rows": {"names": ["a"], "steps": [1, 2, 3], "norms": [[1.0], [1.0, 2.0], None]}},
        {"advice": {"candidates": [None, {"value": "x"}]}},
    ],
)
def test_what_does_not_fit_is_left_out(strange: dict) -> None:
    gradients = Gradients.read(strange)
    assert gradients.bad_updates == 0 and all(len(row) == len(gradients.names) for row in gradients.rows)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"cannot read .*gradients\.json") as caught:
        load_gradients(tmp_path)
    assert "GradientMonitor.save()" in caught.value.hint
    (tmp_path / "gradients.json").write_text('{"half')
    with pytest.raises(RunDirectoryError, match="holds no JSON"):
        load_gradients(tmp_path)


def test_a_run_has_them_or_not(make_run: MakeRun) -> None:
    path = make_run()
    assert load_run(path).gradients is None and load_run(path).notes == ()
    (path / "gradients.json").write_text(json.dumps(record()))
    run = load_run(path)
    assert run.gradients is not None and run.gradients.updates == 40 and run.notes == ()
    (path / "gradients.json").write_text("[")
    run = load_run(path)
    assert run.gradients is None and run.notes == (
        "gradients.json could not be read: there is no section on gradients",
    )
