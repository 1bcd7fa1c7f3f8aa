from __future__ import annotations

import json
from dataclasses import replace

import pytest
from small_work import MIB, blocks, card

import floatline as fl
from floatline.plan.estimate import estimate
from floatline.plan.largest import STEPS, _climb, largest
from floatline.plan.shape import Shape
from floatline.plan.sources import load_source
from floatline.plan.table import columns, component_table, components

GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 2048, "n_positions": 512,
        "architectures": ["GPT2LMHeadModel"]}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpt2") / "config.json"
    path.write_text(json.dumps(GPT2))
    return load_source(str(path), Shape(batch=4, seq=128))


def planned(source, mib: float, **settings):
    return fl.plan(source.work, card(mib), precision="bf16-mixed", advice=False, **settings)


def test_the_largest_fits_and_a_little_more_does_not(source):
    plan = planned(source, 500)
    found = {piece.key: piece for piece in largest(source, plan)}
    batch = found["batch"]
    assert batch.limited_by == "memory" and batch.value > 4
    assert batch.peak_total < 500 * MIB

    def fits(rows):
        shape = replace(source.shape, batch=rows)
        return bool(estimate(source.reshaped(shape).work, plan.hardware, "bf16-mixed", quick=True).fit)

    assert fits(batch.value) and not fits(int(batch.value * 1.15) + 1)


def test_the_models_own_limit_is_told(source):
    plan = planned(source, 4000)
    found = {piece.key: piece for piece in largest(source, plan)}
    assert (found["seq"].value, found["seq"].limited_by) == (512, "model")
    assert "image" not in found


def test_the_largest_of_inference_is_traced_in_inference(source):
    alone = estimate(source.work, card(500), "bf16-true", mode="inference")
    found = {piece.key: piece for piece in largest(source, alone)}
    trained = {piece.key: piece for piece in largest(source, planned(source, 500))}
    assert found["batch"].value > 2 * trained["batch"].value and found["batch"].needed < 500 * MIB
    assert largest(source, estimate(source.work, card(1), "bf16-true", mode="inference")) == ()


def test_what_is_compared_with_the_memory_is_told():
    """An allocator with memory to spare holds more than it needs; a size that fits must not be told with more."""
    found = largest_of(needed=400, held=600)
    assert found.needed == 400 and found.peak_total == 600


def largest_of(needed: int, held: int):
    made = estimate(blocks(), card(10_000))
    pressed = replace(made, peak_total=held, fit=replace(made.fit, needed=needed))
    climb = _climb("batch", 1, 1, lambda value: None)
    next(climb)
    with pytest.raises(StopIteration) as end:
        climb.send(pressed)
    return end.value.value


def test_each_shape_is_tried_once_and_few_are(source):
    told = []
    largest(source, planned(source, 500), progress=lambda what, done: told.append(what))
    assert len(told) == len(set(told)) <= 2 * 6


def test_sizes_come_in_steps(source):
    for piece in largest(source, planned(source, 500)):
        assert piece.value % STEPS[piece.key] == 0


def test_without_a_plan_that_fits_there_is_none(source):
    assert largest(source, planned(source, 60)) == ()


def test_micro_batches_are_what_is_asked(source):
    plan = planned(source, 1000, techniques=["accumulation(micro_batches=4)"])
    batch = next(piece for piece in largest(source, plan) if piece.key == "batch")
    alone = next(piece for piece in largest(source, planned(source, 1000)) if piece.key == "batch")
    assert batch.value == pytest.approx(alone.value, rel=0.15)


def test_the_table_has_the_columns_of_guides(source):
    table = component_table(source.work, card(500))
    assert list(table) == columns(card(500))
    train = components(table["train", "bf16-mixed"])
    serve = components(table["inference", "bf16-true"])
    assert train["optimizer state"] == pytest.approx(2 * train["weights"], rel=0.01)
    assert serve["weights"] == pytest.approx(train["weights"] / 2, rel=0.01)
    assert serve["gradients"] == serve["optimizer state"] == 0
    assert sum(train.values()) == pytest.approx(table["train", "bf16-mixed"].peak_total, rel=0.02)


def test_columns_follow_the_hardware():
    assert columns("t4")[-1] == ("train", "16-mixed")
    assert columns("h100-80gb")[-1] == ("train", "bf16-mixed")
