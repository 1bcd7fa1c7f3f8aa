import math

import pytest

from floatline.report import load_run
from floatline.report.records import Tally
from floatline.report.summary import summarize, techniques_of, verdict, wilson

from .conftest import MakeRun, fault_line, lines


def test_the_first_update_does_not_count_in_step_time(make_run: MakeRun) -> None:
    summary = summarize(load_run(make_run()))
    assert summary.step_first > 1.8
    assert 0.11 <= summary.step_median <= summary.step_p95 < 0.3


def test_updates_read_together_are_warm_up_together(make_run: MakeRun) -> None:
    records = [{**line, "step_s": 2.0 if line["step"] <= 10 else 0.1 + line["step"] // 10 / 1e6} for line in lines(50)]
    summary = summarize(load_run(make_run(records=records)))
    assert (summary.warm_up, summary.step_first) == (10, 2.0)
    assert summary.step_p95 < 0.11


def test_a_run_of_one_reading_is_all_there_is_to_count(make_run: MakeRun) -> None:
    summary = summarize(load_run(make_run(records=[{**line, "step_s": 2.0} for line in lines(10)])))
    assert (summary.warm_up, summary.step_median) == (0, 2.0)


def test_the_test_split_decides_and_validation_stands_in(make_run: MakeRun) -> None:
    summary = summarize(load_run(make_run()))
    assert summary.final is not None and summary.final.split == "test"
    assert summary.answers == Tally(correct=388, total=400)
    earlier = summarize(load_run(make_run("earlier", records=lines(200)[:-1])))
    assert earlier.final is not None and earlier.final.split == "validation"


def test_overflows_are_not_faults(make_run: MakeRun) -> None:
    records = [*lines(200, fp16=True), fault_line(150)]
    summary = summarize(load_run(make_run(records=records, precision="16-mixed")))
    assert (summary.overflows, summary.faults, summary.skipped) == (2, 1, 3)


def test_time_and_memory_come_from_the_updates_when_the_end_is_missing(make_run: MakeRun) -> None:
    run = load_run(make_run(leave_out=("run.json",)))
    summary = summarize(run)
    assert summary.seconds == pytest.approx(sum(s.step_s for s in run.steps) + 11 * 3.2)
    assert summary.peak_memory == max(step.memory_bytes for step in run.steps)


@pytest.mark.parametrize(
    ("stated", "precision"), [("auto", "bf16-mixed"), ("32-true", "32-true"), ({"policy": "16-mixed"}, "16-mixed")]
)
def test_precision_is_the_recipes_or_where_it_says_auto_the_chosen(make_run: MakeRun, stated, precision: str) -> None:
    assert summarize(load_run(make_run(precision=stated))).precision == precision


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("finished", "Finished after 200 updates; 97.0 % of the unseen test questions answered right"),
        ("running", "Running, or killed, after 200 updates"),
        ("failed", "Failed after 200 updates"),
        ("what?", "Status unknown, 200 updates"),
    ],
)
def test_verdict(make_run: MakeRun, status: str, words: str) -> None:
    assert verdict(summarize(load_run(make_run(info={"status": status})))).startswith(words)


def test_an_empty_run_has_a_verdict_and_no_number(make_run: MakeRun) -> None:
    summary = summarize(load_run(make_run(records=[], leave_out=("run.json", "recipe.yaml", "samples.jsonl"))))
    assert verdict(summary) == "Status unknown, no update."
    assert math.isnan(summary.step_median) and math.isnan(summary.seconds) and math.isnan(summary.accuracy)


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (3, 7)])
def test_wilson_stays_inside_and_around_the_share(correct: int, total: int) -> None:
    low, high = wilson(Tally(correct=correct, total=total))
    assert 0 <= low <= correct / total <= high + 1e-12 and high <= 1
    assert high - low > 0.2


def test_techniques_say_what_they_touched(make_run: MakeRun) -> None:
    techniques = [
        {"technique": "checkpointing(every=2)", "touched": ["layers.0", "layers.2"], "notes": []},
        {"technique": "offload", "touched": [""], "notes": ["a note", "another"]},
        {"technique": "lora", "touched": [], "notes": None},
        "damaged",
    ]
    run = load_run(make_run(info={"techniques": techniques}))
    assert techniques_of(run) == [
        ("checkpointing(every=2)", "2 parts, first layers.0", ""),
        ("offload", "the whole model", "a note; another"),
        ("lora", "nothing", ""),
    ]
    assert techniques_of(load_run(make_run("other", info={"techniques": "none"}))) == []
