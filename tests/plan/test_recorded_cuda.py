"""The planner against peaks that were recorded on CUDA machines; and the code that compares and judges them."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from floatline.hardware import lookup

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import cuda_record  # noqa: E402
import plan_accuracy_cuda as benchmark  # noqa: E402
from clean_process import Failed  # noqa: E402
from cuda_record import Setting, compare, contradiction, missed, setting_of, summary  # noqa: E402

QUICK = 6
SMALL = Setting(model="gpt2", shape={"batch": 1, "seq": 32}, precision="16-mixed")
RECORDS = sorted((BENCHMARKS / "results").glob("plan_cuda_*.json"))


def records():
    if not RECORDS:
        pytest.skip(
            "benchmarks/results has no plan_cuda_*.json: run benchmarks/plan_accuracy_cuda.py on a CUDA machine"
        )
    return [json.loads(path.read_text(encoding="utf-8")) for path in RECORDS]


def measured_rows(record):
    return [row for row in record["rows"] if row["measured"]]


def test_estimates_made_anew_hold_against_recorded_peaks():
    for record in records():
        rows = sorted(measured_rows(record), key=lambda row: row["seconds"])[:QUICK]
        assert not missed(summary(compare(record, rows))), record["hardware"]["name"]


@pytest.mark.soak
def test_all_estimates_made_anew_hold_against_recorded_peaks():
    for record in records():
        assert not missed(summary(compare(record))), record["hardware"]["name"]


def test_verdicts_on_imitated_cards_were_right():
    for record in records():
        assert not [contradiction(row) for row in record["cards"] if row["ran"] is not None and contradiction(row)]


@pytest.fixture(scope="module")
def said():
    return cuda_record.figures(SMALL, lookup("t4"))


def record_of(said, factor):
    """A record as the benchmark writes it, its peaks `factor` times what was said."""
    row = {
        "setting": vars(SMALL),
        "said": {"allocated": 1, "reserved": 1},
        "measured": {key: round(factor * said[key]) for key in ("allocated", "reserved")},
        "failure": "",
    }
    unmeasured = {**row, "measured": {}, "skipped": "needs more"}
    record = {"hardware": cuda_record.hardware_facts(lookup("t4")), "rows": [row, unmeasured], "cards": []}
    return json.loads(json.dumps(record))


@pytest.fixture(scope="module")
def anew(said):
    """The measured rows of such a record, with the estimate made anew."""
    return compare(record_of(said, 1.0))


def test_the_estimate_made_anew_is_the_one_that_was_recorded(said, anew):
    assert len(anew) == 1  # of two rows, one was measured
    assert anew[0]["said"] == said


@pytest.mark.parametrize(
    ("factor", "broken"),
    [
        (1.0, set()),
        (1 / 1.019, set()),
        (1 / 1.03, {"allocated, median"}),
        (1.1, {"allocated, median", "allocated, worst", "reserved, median"}),
    ],
)
def test_estimates_are_held_against_what_was_recorded(said, anew, factor, broken):
    rows = [{**anew[0], "measured": record_of(said, factor)["rows"][0]["measured"]}]
    found = summary(rows)
    assert found["allocated, worst"] == pytest.approx(abs(1 / factor - 1), rel=1e-3)
    assert {text.split(" is ")[0] for text in missed(found)} == broken


def test_the_reason_of_a_missed_limit_is_told():
    assert missed({"allocated, median": 0.031, "reserved, median": 0.01}) == [
        "allocated, median is 3.10%, the limit 2%"
    ]
    assert summary([]) == {} and missed({}) == []


def test_settings_and_hardware_survive_json():
    setting = Setting(
        model="vit-base", shape={"batch": 2, "image": (224, 224)}, techniques=("checkpointing",), max_grad_norm=None
    )
    assert setting_of(json.loads(json.dumps(vars(setting)))) == setting
    for name in ("t4", "h100-80gb"):
        facts = json.loads(json.dumps(cuda_record.hardware_facts(lookup(name))))
        assert cuda_record.hardware_of(facts) == lookup(name)


def test_the_half_format_is_the_cards_own():
    setting = replace(SMALL, precision="half-mixed")
    assert setting.on(lookup("t4")).precision == "16-mixed"
    assert setting.on(lookup("a100")).precision == "bf16-mixed"


@pytest.mark.parametrize(
    ("verdict", "low", "ran", "words"),
    [
        ("fits", 80, True, ""),
        ("fits", 80, False, "was said to fit, and ran out of memory"),
        ("tight", 95, True, ""),
        ("tight", 95, False, ""),
        ("does not fit", 99, True, ""),
        ("does not fit", 101, False, ""),
        ("does not fit", 101, True, "and ran"),
    ],
)
def test_a_verdict_is_contradicted_by_what_happened(verdict, low, ran, words):
    said = {"verdict": verdict, "low": low, "capacity": 100}
    told = contradiction({"said": said, "ran": ran})
    assert words in told and bool(told) == bool(words)


@pytest.fixture
def here(monkeypatch, said):
    """The benchmark's rows made in this process, with estimates that are known already."""
    monkeypatch.setattr(benchmark, "isolated", lambda function: function)
    monkeypatch.setattr(benchmark, "figures", lambda setting, hardware: dict(said))


def test_a_row_holds_what_was_said_and_measured(here, said):
    peaks = {"allocated": said["allocated"], "reserved": said["reserved"], "outside": 7}
    row = benchmark.accuracy_row(SMALL, lookup("t4"), lambda setting: peaks)
    assert row["measured"] == peaks and not row["failure"]
    assert setting_of(json.loads(json.dumps(row["setting"]))) == SMALL
    assert benchmark.accuracy_row(SMALL, lookup("t4"), lambda setting: None)["failure"] == "ran out of memory"
    assert benchmark.accuracy_row(SMALL, replace(lookup("t4"), memory=10**6), lambda setting: peaks)["skipped"]


def test_a_row_that_dies_is_a_failure(here):
    def die(setting):
        raise Failed("the process died")

    assert benchmark.accuracy_row(SMALL, lookup("t4"), die)["failure"] == "the process died"


def test_an_imitated_card_gets_what_its_context_leaves(here):
    card = benchmark.imitated(lookup("h100"), "16 GB")
    assert card.memory == lookup("v100-16gb").memory and card.capability == (9, 0)
    allowed = []

    def train(setting, most):
        allowed.append(most)
        return {"allocated": 1}

    (row,) = benchmark.card_rows(SMALL, card, train)
    assert allowed == [card.memory - card.context]
    assert row["ran"] and not row["contradiction"]
    (row,) = benchmark.card_rows(SMALL, card, lambda setting, most: None)
    assert row["ran"] is False and "was said to fit" in row["contradiction"]


def test_where_it_does_not_fit_the_plan_must_run(here, monkeypatch, said):
    over = {**said, "verdict": "does not fit", "low": said["capacity"] + 1}
    thrifty = replace(SMALL, techniques=("checkpointing",))
    monkeypatch.setattr(benchmark, "figures", lambda setting, _: dict(said) if setting.techniques else dict(over))
    monkeypatch.setattr(benchmark, "planned", lambda setting, card: thrifty)
    rows = benchmark.card_rows(SMALL, lookup("t4"), lambda setting, most: {"x": 1} if setting.techniques else None)
    assert [(row["plan"], row["ran"], row["contradiction"]) for row in rows] == [(False, False, ""), (True, True, "")]


def test_settings_are_those_a_card_can_run_each_once():
    for gpu in ("t4", "h100"):
        names = [setting.name for setting in benchmark.chosen(benchmark.SETTINGS, None, lookup(gpu))]
        assert len(names) == len(set(names)) > 20
        assert not any("half" in name for name in names)
    assert not any("bf16" in s.name for s in benchmark.chosen(benchmark.SETTINGS, None, lookup("t4")))
    assert {s.model for s in benchmark.chosen(benchmark.SETTINGS, ["vit"], lookup("t4"))} >= {"vit-large"}


def test_the_exit_status_tells_what_is_wrong(said, tmp_path, capsys):
    for factor, status in ((1.0, 0), (1.1, 1)):
        record = record_of(said, factor)
        rows = [{**row, "said": said} for row in record["rows"]]
        path = tmp_path / f"{status}.json"
        assert benchmark.conclude(rows, [], lookup("t4"), path, rehearsal=False) == status
        written = json.loads(path.read_text(encoding="utf-8"))
        assert written["hardware"]["name"] == "t4" and written["versions"]["torch"]
        assert [setting_of(row["setting"]) for row in measured_rows(written)] == [SMALL]
    assert "allocated, worst is" in capsys.readouterr().out


def test_without_a_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan_accuracy_cuda.py"])
    monkeypatch.setattr(benchmark, "in_clean_process", lambda function: None)
    with pytest.raises(SystemExit, match="torch sees no CUDA device here; --rehearse t4"):
        benchmark.main()
