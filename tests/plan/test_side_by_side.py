"""All GPUs side by side: one row each, by memory; what one cannot do is told in its row."""

from pathlib import Path

import pytest

from floatline.errors import ConfigError, ModelError
from floatline.hardware import CATALOG, lookup, target
from floatline.plan.command import PlanRequest
from floatline.plan.side_by_side import compare

MODELS = Path(__file__).parent / "planned_models.py"
FEW = [lookup("rtx-3090"), lookup("t4"), lookup("a10g")]


def request(function="deep", **changes):
    return PlanRequest(model=f"{MODELS}:{function}", hardware="all", **changes)


def test_rows_are_sorted_by_memory_and_numbers_are_those_of_each_alone():
    found = compare(request(batch=4), gpus=FEW)
    assert [row.hardware.name for row in found.rows] == ["t4", "a10g", "rtx-3090"]
    assert found.fits and found.smallest is found.rows[0]
    alone = compare(request(batch=4), gpus=[lookup("rtx-3090")]).rows[0]
    assert found.rows[2].as_dict() == alone.as_dict()
    assert found.rows[1].plan.estimate.context != found.rows[2].plan.estimate.context


def test_the_whole_catalog_is_planned_by_default():
    found = compare(request(batch=1))
    assert {row.hardware.name for row in found.rows} == set(CATALOG)
    memory = [row.hardware.memory for row in found.rows]
    assert memory == sorted(memory)


def test_a_card_that_cannot_do_it_has_the_reason_in_its_row():
    found = compare(request(batch=1, precision="bf16-mixed"), gpus=FEW)
    assert found.rows[0].plan is None and "Turing" in found.rows[0].refused
    assert found.rows[0].as_dict()["refused"] and found.smallest is found.rows[1]


def test_what_no_card_can_do_is_an_error():
    with pytest.raises(ConfigError, match="Turing"):
        compare(request(batch=1, precision="bf16-mixed"), gpus=[lookup("t4")])


def test_it_may_fit_on_none():
    small = target("small", vram="2GiB", capability="8.6")
    found = compare(request("wide"), gpus=[small])
    assert not found.fits and found.smallest is None and found.rows[0].plan.verdict == "does not fit"


def test_progress_counts_the_cards():
    told = []
    compare(request(batch=1), lambda what, done: told.append(what), gpus=FEW)
    assert told[0].startswith("GPU 1 of 3, the plain step on rtx-3090") and told[-1].startswith("GPU 3 of 3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vram": "24GiB"}, "--vram describes one GPU"),
        ({"capability": "8.6"}, "--capability describes one GPU"),
    ],
)
def test_options_for_one_card_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        compare(request(**options))


def test_a_model_that_is_none_is_an_error_once():
    with pytest.raises(ModelError, match="has no 'absent'"):
        compare(request("absent"))


def test_inference_is_estimated_on_each():
    found = compare(request(batch=4, mode="inference"), gpus=FEW)
    assert found.fits and all(row.plan is None and row.estimate.mode == "inference" for row in found.rows)
    assert [row.estimate.precision for row in found.rows] == ["16-true", "bf16-true", "bf16-true"]
    told = found.rows[0].as_dict()
    assert told["techniques"] == [] and told["plain_needed"] == told["needed"] > 0
