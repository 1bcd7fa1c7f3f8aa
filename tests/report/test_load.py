import json
import math
import random
from pathlib import Path

import pytest

from floatline.errors import RunDirectoryError
from floatline.report import is_run_directory, load_run

from .conftest import MakeRun, eval_line, fault_line, lines, step_line


def test_reads_all_of_a_complete_run(make_run: MakeRun) -> None:
    run = load_run(make_run())
    assert run.name == "digits"
    assert [step.step for step in run.steps] == list(range(1, 201))
    assert [(item.step, item.split) for item in run.evals][-2:] == [(200, "validation"), (200, "test")]
    assert run.evals[-1].groups["digit"].total == 300
    assert run.samples[0].correct is False
    assert run.info["status"] == "finished"
    assert run.recipe["train"]["max_grad_norm"] == 1.0
    assert run.notes == ()


def test_reads_nan_and_infinity_tokens(make_run: MakeRun) -> None:
    path = make_run(records=[])
    (path / "metrics.jsonl").write_text('{"kind":"step","step":1,"loss":NaN,"grad_norm":Infinity,"applied":false}\n')
    (step,) = load_run(path).steps
    assert math.isnan(step.loss)
    assert step.grad_norm == math.inf
    assert not step.applied
    assert math.isnan(step.loss_scale)


def test_a_half_written_last_line_is_left_out_and_named(make_run: MakeRun) -> None:
    path = make_run()
    metrics = path / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"kind":"step","step":201,"lo')
    run = load_run(path)
    assert len(run.steps) == 200
    assert run.notes == ("the last line of metrics.jsonl is incomplete, as a killed run leaves it; it is left out",)


def test_broken_lines_in_the_middle_are_counted(make_run: MakeRun) -> None:
    path = make_run(records=[])
    good = json.dumps({"kind": "step", "step": 1, "loss": 1.0})
    (path / "metrics.jsonl").write_bytes(
        f'oops\n[1, 2]\n{good}\n{{"kind":"step","step":null}}\n\n'.encode() + b"\xff\n"
    )
    run = load_run(path)
    assert [step.step for step in run.steps] == [1]
    assert run.notes == ("3 lines of metrics.jsonl could not be read and are left out (line 1, 2, 6)",)


@pytest.mark.parametrize("file", ["recipe.yaml", "run.json", "samples.jsonl"])
def test_any_file_but_the_metrics_may_be_missing(make_run: MakeRun, file: str) -> None:
    (note,) = load_run(make_run(leave_out=(file,))).notes
    assert note.startswith(f"{file} is missing")


def test_a_run_that_ended_before_its_first_update_is_still_a_run(make_run: MakeRun) -> None:
    run = load_run(make_run(leave_out=("metrics.jsonl",)))
    assert run.steps == ()
    assert run.notes == ("metrics.jsonl is missing",)


def test_broken_yaml_and_json_become_notes(make_run: MakeRun) -> None:
    path = make_run()
    (path / "recipe.yaml").write_text("train: [unclosed")
    (path / "run.json").write_text('{"status": "runn')
    run = load_run(path)
    assert run.recipe == {} and run.recipe_text == "train: [unclosed"
    assert run.info == {}
    assert len(run.notes) == 2


def test_a_resumed_run_counts_each_update_once(make_run: MakeRun) -> None:
    """Killed after update 130, resumed at 100: what 101 to 130 said first is dropped, faults and evaluations too."""
    first = lines(130)[:-1]  # without the test
    first = [*first, fault_line(50), fault_line(120), eval_line(130, 200)]
    chance = random.Random(5)
    second = [{**step_line(step, 200, chance), "loss": 7.0} for step in range(101, 111)]
    second.append(fault_line(101, "gradient"))
    run = load_run(make_run(records=[*first, *second]))
    assert [step.step for step in run.steps] == list(range(1, 111))
    assert {step.loss for step in run.steps if step.step > 100} == {7.0}
    assert [(fault.step, fault.what) for fault in run.faults] == [(50, "loss"), (101, "gradient")]
    assert max(item.step for item in run.evals) < 101


def test_what_a_rollback_took_back_counts_once(make_run: MakeRun) -> None:
    chance = random.Random(5)
    first = [*(step_line(step, 20, chance) for step in range(1, 8)), eval_line(4, 20), eval_line(6, 20)]
    fault = {**fault_line(8), "action": "rollback", "to": 4}
    again = [*(step_line(step, 20, chance) for step in range(5, 9)), eval_line(6, 20)]
    run = load_run(make_run(records=[*first, fault, *again]))
    assert [step.step for step in run.steps] == list(range(1, 9))
    assert [item.step for item in run.evals] == [4, 6] and [item.step for item in run.faults] == [8]


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="nowhere does not exist") as caught:
        load_run(tmp_path / "nowhere")
    assert "floatline train" in caught.value.hint


def test_a_file_is_no_run_directory(make_run: MakeRun) -> None:
    path = make_run()
    with pytest.raises(RunDirectoryError, match="is a file, not a run directory") as caught:
        load_run(path / "metrics.jsonl")
    assert str(path) in caught.value.hint


def test_a_directory_of_runs_names_them(make_run: MakeRun) -> None:
    path = make_run("b").parent
    make_run("a")
    assert not is_run_directory(path)
    with pytest.raises(RunDirectoryError, match=r"holds no metrics\.jsonl") as caught:
        load_run(path)
    assert caught.value.hint == "runs inside it: a, b"


@pytest.mark.parametrize(
    "line",
    [
        {"kind": "step", "step": 1, "loss": "low", "grad_norm": True, "lr": 10**400},
        {"kind": "eval", "step": 1, "groups": [1], "accuracy": "good"},
        {"kind": "eval", "step": 1, "groups": {"digit": {"correct": None}, "count": 3}},
        {"kind": "fault", "step": 1},
        {"kind": "something new", "step": 1},
        {},
    ],
)
def test_values_of_another_type_do_not_stop_the_reading(make_run: MakeRun, line: dict) -> None:
    load_run(make_run(records=[line]))
