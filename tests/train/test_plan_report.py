"""`floatline plan recipe.yaml`."""

import json

import pytest

from floatline.errors import ConfigError
from floatline.plan.command import PlanRequest
from floatline.plan.shape import Shape
from floatline.train.plan_report import report_on_recipe


def report(recipe_file, overrides=(), **options):
    request = PlanRequest(model=str(recipe_file), **{"hardware": "t4", "quick": True, **options})
    return report_on_recipe(request, ["precision=16-mixed", *overrides], lambda what, done: None)


def test_a_recipe_is_planned_with_its_own_batch_precision_and_techniques(recipe_file):
    found = report(recipe_file, ["techniques.checkpointing=true", "train.batch_size=4"])
    assert found.fits
    assert found.estimate.precision == "16-mixed"
    assert "checkpointing" in found.estimate.techniques
    assert found.source.shape == Shape(batch=4)
    assert found.table == {} and found.largest == ()
    json.dumps(found.as_dict())


def test_the_table_is_of_the_recipes_workload(recipe_file):
    found = report(recipe_file, quick=False)
    assert set(found.table) == {
        ("inference", "32-true"), ("inference", "16-true"), ("train", "32-true"), ("train", "16-mixed")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"shape": Shape(seq=8)}, "a size"),
        ({"batch": 2}, "--batch"),
        ({"techniques": ("lora",)}, "--technique"),
        ({"hardware": "all"}, "--hardware all"),
        ({"mode": "inference"}, "--mode"),
    ],
)
def test_what_the_recipe_decides_is_no_option(recipe_file, options, named):
    with pytest.raises(ConfigError, match=f"{named} was given, but .* is a recipe") as caught:
        report(recipe_file, **options)
    assert "key=value" in caught.value.hint
