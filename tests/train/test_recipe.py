"""Recipes: YAML plus overrides, strict keys, errors that name key, value and way out."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from floatline.errors import ConfigError, PrecisionError
from floatline.train.recipe import load_recipe, parse_recipe
from floatline.train.resolve import resolve_recipe

MINIMAL = {"model": {"path": "m"}, "data": {"train": "t.jsonl"}}


def recipe(**sections):
    return parse_recipe(MINIMAL | sections)


def write(tmp_path, tree):
    path = tmp_path / "recipe.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def test_overrides_win_and_reach_sections_that_are_absent(tmp_path):
    loaded = load_recipe(
        write(tmp_path, MINIMAL), ["train.lr=1e-3", "precision=16-mixed; lm_head=32", "eval.generate=false"]
    )
    assert (loaded.train.lr, loaded.precision, loaded.eval.generate) == (1e-3, "16-mixed; lm_head=32", False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lrr=1"], "unknown key train.lrr\nhint: did you mean 'lr'"),
        (["precison=auto"], "unknown key precison\nhint: did you mean 'precision'"),
        (["batch_size=4"], "unknown key batch_size\nhint: did you mean 'train.batch_size'"),
        (["train.lr=fast"], "train.lr='fast': .*number.*\nhint: peak learning rate"),
        (["train.lr=-1"], "train.lr=-1: .*greater than 0"),
        (["train.lr=nan"], "train.lr='?nan'?: "),
        (["train.batch_size=0"], "train.batch_size=0: "),
        (["train.batch_size=2.5"], "train.batch_size=2.5: "),
        (["train.schedule=step"], "train.schedule='step': (.|\n)*allowed: cosine, linear, constant"),
        (["model.path="], "model.path=None"),
        (["train.steps=3", "train.epochs=1"], "train.steps=3 and train.epochs=1.0 are both set"),
        (["train"], "override 'train' is not KEY=VALUE"),
        (["precision.x=1"], "precision is a value|precision="),
    ],
)
def test_bad_values(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, MINIMAL | {"precision": "auto"}), overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not valid YAML"), ("just text", "holds a str, not sections"), ("", "holds a NoneType")],
)
def test_bad_files(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(write(tmp_path, text))


def test_missing_file_and_missing_key(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"data is missing\nhint: add it"):
        load_recipe(write(tmp_path, {"model": {"path": "m"}}))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.dictionaries(st.sampled_from(["model", "data", "train", "path", "lr", "x"]), inner)
                    | st.lists(inner, max_size=2), max_leaves=8).filter(lambda t: isinstance(t, dict)))  # fmt: skip
def test_any_tree_is_a_recipe_or_a_config_error(tree):
    try:
        parse_recipe(tree)
    except ConfigError as error:
        assert error.message


def test_every_open_choice_is_made_with_a_reason():
    resolved = resolve_recipe(
        recipe(data={"train": "t", "validation": "v"}, train={"batch_size": 4}), train_samples=100
    )
    gaps = [
        f"{section}.{key}"
        for section, values in resolved.recipe.model_dump().items()
        if isinstance(values, dict)
        for key, value in values.items()
        if value is None
    ]
    meant = {"model.attention", "data.test", "data.max_pixels", "data.max_length", "train.epochs", "train.loss_scale"}
    assert set(gaps) == meant
    assert all(choice.reason for choice in resolved.choices)
    assert resolved.recipe.train.steps == 25
    assert {"precision", "train.steps", "run.threads"} <= {choice.key for choice in resolved.choices}


def test_a_resolved_recipe_resolves_to_itself():
    first = resolve_recipe(recipe(), train_samples=50).recipe
    again = resolve_recipe(first, train_samples=50)
    assert again.recipe == first and again.choices == []


def test_epochs_become_steps():
    assert resolve_recipe(recipe(train={"epochs": 2.5, "batch_size": 10}), train_samples=100).recipe.train.steps == 25


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"batch_size": 200}, "train.batch_size=200 is more than the 100 training samples"),
        (
            {"batch_size": 12, "micro_batch_size": 5},
            r"does not divide train.batch_size=12\nhint: use one of \[1, 2, 3, 4, 6, 12\]",
        ),
    ],
)
def test_sizes_that_do_not_fit(train, message):
    with pytest.raises(ConfigError, match=message):
        resolve_recipe(recipe(train=train), train_samples=100)


def test_hardware_decides_precision():
    assert str(resolve_recipe(recipe(hardware="t4"), train_samples=100).policy) == "16-mixed"
    with pytest.raises(PrecisionError, match="Turing"):
        resolve_recipe(recipe(hardware="t4", precision="bf16-mixed"), train_samples=100)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-mixed", "fp32"), ("bf16-true", "bf16"), ("16-true", "fp32"), ("bf16-true; lm_head=32", "fp32")],
)
def test_weights_are_loaded_in_the_format_that_training_needs(precision, dtype):
    assert resolve_recipe(recipe(precision=precision), train_samples=100).recipe.model.dtype == dtype


def test_flash_on_turing_is_refused_with_the_next_best():
    with pytest.raises(ConfigError, match=r"Turing(.|\n)*use model.attention=sdpa: torch picks its efficient kernel"):
        resolve_recipe(recipe(hardware="t4", model={"path": "m", "attention": "flash_attention_2"}), train_samples=100)
    resolve_recipe(recipe(hardware="a100", model={"path": "m", "attention": "flash_attention_2"}), train_samples=100)
