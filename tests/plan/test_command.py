"""From options to an answer: which options contradict each other, and what a report holds."""

import json
from pathlib import Path

import pytest

from floatline.errors import ConfigError, ModelError, PrecisionError
from floatline.plan.command import PlanRequest, answer
from floatline.plan.shape import Shape

MODELS = Path(__file__).parent / "planned_models.py"
CARD = {"vram": "2GiB", "capability": "8.6"}


def request(function="deep", **changes):
    return PlanRequest(**{"model": f"{MODELS}:{function}", "quick": True, **CARD, **changes})


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"mode": "test"}, "mode is 'test'", "train, inference"),
        ({"batch": 0}, "batch=0 is not a whole number of 1 or more", "give a count"),
        ({"global_batch": 0}, "--global-batch 0 is not 1 or more", "rows of one update"),
        ({"batch": 5, "global_batch": 32}, "--global-batch 32 is no multiple of --batch 5", "micro-batches of 4 or 8"),
        ({"batch": 64, "global_batch": 32}, "--global-batch 32 is no multiple of --batch 64", "micro-batches of 32"),
        ({"batch": 4, "global_batch": 8, "techniques": ("accumulation",)}, "so does --technique accumulation", "one"),
        ({"mode": "inference", "techniques": ("lora",)}, "--technique is for training", "leave --technique out"),
        ({"mode": "inference", "exclude": ("lora",)}, "--exclude is for training", "leave --exclude out"),
        ({"mode": "inference", "exact": True}, "--exact is for training", "leave --exact out"),
        ({"mode": "inference", "global_batch": 4}, "--global-batch is for training", "leave --global-batch out"),
    ],
)
def test_options_that_cannot_be(options, message, hint):
    with pytest.raises(ConfigError) as raised:
        request(**options)
    assert message in raised.value.message and hint in raised.value.hint


def test_both_batch_sizes_fix_the_micro_batches():
    both = request(batch=8, global_batch=32, techniques=("lora",))
    assert both.whole_shape == Shape(batch=32)
    assert both.fixed == ("lora", "accumulation(micro_batches=4)") and both.left_out == ()


def test_equal_batch_sizes_keep_the_batch_whole():
    equal = request(batch=8, global_batch=8, exclude=("offload",))
    assert equal.fixed == () and equal.left_out == ("offload", "accumulation")


@pytest.mark.parametrize("option", ["batch", "global_batch"])
def test_one_batch_size_is_the_updates_and_may_be_cut(option):
    one = request(**{option: 8})
    assert one.whole_shape == Shape(batch=8) and one.fixed == () and one.left_out == ()


def test_an_answer_that_fits():
    found = answer(request(batch=8))
    assert found.fits and found.plan is not None and found.plan.techniques == ()
    assert found.table == {} and found.largest == ()
    assert found.hardware.memory == 2 * 2**30 and found.estimate is found.plan.estimate


def test_a_search_finds_what_makes_it_fit():
    found = answer(request(batch=128))
    assert found.fits and not found.plan.ladder[0].estimate.fit
    assert any(text.startswith("accumulation") for text in found.plan.techniques)


def test_fixed_micro_batches_are_in_the_plan():
    found = answer(request(batch=16, global_batch=64))
    assert "accumulation(micro_batches=4)" in found.plan.techniques and found.estimate.micro_batches == 4


def test_what_is_excluded_stays_out():
    found = answer(request(batch=128, exclude=("accumulation",)))
    assert not any(text.startswith("accumulation") for text in found.plan.techniques)
    assert ("accumulation", "excluded by you") in {(why.name, why.reason) for why in found.plan.rejected}


def test_the_whole_answer_has_table_and_largest_sizes(tmp_path):
    found = answer(request(quick=False, batch=4))
    assert {mode for mode, _ in found.table} == {"train", "inference"} and len(found.table) == 4
    as_dict = found.as_dict()
    assert [row["mode"] for row in as_dict["table"]] == ["inference", "inference", "train", "train"]
    assert (
        as_dict["source"]["shape"] == {"batch": 4}
        and as_dict["estimate"]["band"][0] < as_dict["estimate"]["peak_total"]
    )
    assert as_dict["recipe"]["precision"] == "bf16-mixed"


def test_inference_takes_the_half_format_of_the_card():
    found = answer(request(mode="inference", capability="7.5"))
    assert found.plan is None and found.estimate.precision == "16-true" and found.estimate.mode == "inference"
    assert "no weight is updated" in found.precision_reason
    assert answer(request(mode="inference", precision="32-true")).estimate.precision == "32-true"
    assert found.as_dict()["verdict"] == "fits"


def test_inference_has_its_largest_sizes_too(tmp_path):
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 512, "n_positions": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = PlanRequest(model=str(tmp_path), mode="inference", shape=Shape(seq=64), **CARD)
    told = {piece["key"]: piece for piece in answer(asked).as_dict()["largest"]}
    assert told["seq"]["value"] == 64 and told["batch"]["needed"] <= told["batch"]["peak_total"]


def test_json_tells_what_is_compared_with_the_memory():
    found = answer(request("wide", vram="2GiB"))
    as_dict = found.as_dict()
    assert as_dict["estimate"]["needed"] + as_dict["estimate"]["margin"] == as_dict["estimate"]["capacity"]
    assert [rung["needed"] for rung in as_dict["ladder"]] == [rung.estimate.fit.needed for rung in found.plan.ladder]
    before = as_dict["ladder"][0]["needed"]
    for rung in as_dict["ladder"][1:]:
        assert before - rung["needed"] == rung["saved"]
        before = rung["needed"] if rung["kept"] else before


def test_what_does_not_fit_says_so():
    found = answer(request("wide"))
    assert not found.fits and found.estimate.verdict == "does not fit" and found.estimate.fit.margin < 0


def test_expandable_segments_are_simulated():
    plain, pages = (answer(request(batch=8, expandable_segments=on)).estimate for on in (False, True))
    assert pages.peak_reserved != plain.peak_reserved


def test_a_precision_that_cannot_be_is_told_before_the_model_is_looked_for():
    with pytest.raises(PrecisionError, match="Turing"):
        answer(PlanRequest(model="no-such-model", hardware="t4", precision="bf16-mixed"))
    with pytest.raises(ModelError, match="no-such-model"):
        answer(PlanRequest(model="no-such-model", hardware="t4"))


def test_progress_is_told():
    told = []
    answer(request(batch=4), lambda what, done: told.append(what))
    assert told and told[0].startswith("the plain step on a GPU of capability 8.6")


def test_the_remarks_of_transformers_are_back_afterwards():
    from transformers.utils import logging

    before = logging.get_verbosity()
    answer(request(batch=4))
    assert logging.get_verbosity() == before
