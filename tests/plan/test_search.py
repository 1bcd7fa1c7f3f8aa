from __future__ import annotations

import pytest
import torch
from small_work import MIB, blocks, card, fused
from torch import nn

import floatline as fl
from floatline.errors import ConfigError
from floatline.plan.estimate import estimate

A100 = card(100_000)


def peak_mib(techniques=(), **changes):
    return estimate(blocks(optimizer=fused, **changes), A100, "bf16-mixed", techniques).fit.needed / MIB


def planned(mib: float, **settings):
    return fl.plan(blocks(optimizer=fused), card(mib), precision="bf16-mixed", **settings)


SPARE = 400
"""MiB above a peak that make it a fit: deviation and reserve of a small card."""


def test_a_run_that_fits_needs_nothing():
    plan = planned(peak_mib() + SPARE)
    assert plan.fits and plan.techniques == () and plan.trials == 1
    assert {rejected.name for rejected in plan.rejected} >= {"checkpointing", "offload", "low_bit_optimizer"}
    assert all("not needed" in rejected.reason for rejected in plan.rejected)


def wide(mib: float, **settings):
    """Activations beside which the error band is small: 16384 rows."""
    return fl.plan(blocks(rows=16384, optimizer=fused), card(mib), precision="bf16-mixed", **settings)


def test_it_climbs_until_the_run_fits():
    plan = wide(500)
    assert plan.fits
    assert plan.ladder[0].added == "" and not plan.ladder[0].estimate.fit
    assert plan.first_fit is not None
    assert plan.estimate.fit.needed < plan.ladder[0].estimate.fit.needed
    assert "accumulation" in plan.techniques[0]


def test_micro_batches_are_as_few_as_fit():
    plan = wide(500)
    (cut,) = (t for t in map(fl.techniques.make_technique, plan.techniques) if t.name == "accumulation")
    fewer = [n for n in range(1, cut.micro_batches) if 16384 % n == 0]
    work = blocks(rows=16384, optimizer=fused)
    assert 16384 % cut.micro_batches == 0
    if fewer[-1] > 1:
        other = estimate(work, card(500), "bf16-mixed", [f"accumulation(micro_batches={fewer[-1]})"])
        assert not other.fit


def test_fixed_choices_stay_and_excluded_ones_are_not_used():
    plan = wide(400, techniques=["offload"], exclude=["accumulation"])
    assert "offload" in plan.techniques
    assert not any("accumulation" in text for text in plan.techniques)
    refused = wide(400, exclude=["accumulation"]).rejected
    assert ("accumulation", "excluded by you") in {(r.name, r.reason) for r in refused}


def test_exact_plans_keep_the_numbers():
    plan = wide(400, exclude=["accumulation"], exact=True)
    assert not any("low_bit" in text for text in plan.techniques)
    assert any(r.name == "low_bit_optimizer" and "changes the numbers" in r.reason for r in plan.rejected)


def test_what_changes_the_numbers_is_told_unless_it_was_asked_for():
    small = {"rows": 2, "width": 1024, "optimizer": fused}
    chosen = fl.plan(blocks(**small), card(300), precision="bf16-mixed", advice=False)
    asked = fl.plan(blocks(**small), card(300), precision="bf16-mixed", techniques=["low_bit_optimizer"], advice=False)
    assert any("low_bit_optimizer changes the numbers" in note for note in chosen.estimate.notes)
    assert not any("changes the numbers" in note for note in asked.estimate.notes)


def test_a_technique_to_keep_cannot_be_excluded():
    with pytest.raises(ConfigError, match="lora is excluded, and it is one of the techniques to keep"):
        fl.plan(blocks(rows=2), card(300), techniques=["lora(rank=2)"], exclude=["lora"])


def test_nothing_can_be_left_out():
    plan = wide(500, exclude=["accumulation"])
    assert plan.fits
    work = blocks(rows=16384, optimizer=fused)
    for left_out in plan.techniques:
        rest = [text for text in plan.techniques if text != left_out]
        assert not estimate(work, card(500), "bf16-mixed", rest).fit


def test_what_saves_nothing_is_left_out_with_where_the_peak_is():
    plan = fl.plan(blocks(rows=2, width=1024, optimizer=fused), card(300), precision="bf16-mixed", advice=False)
    dropped = [rung for rung in plan.ladder if not rung.kept]
    reasons = {rejected.name: rejected.reason for rejected in plan.rejected}
    assert not plan.fits and dropped
    assert "saves" in reasons["offload"] and "peak lies in aten." in reasons["offload"]


def test_where_nothing_fits_it_says_what_would():
    plan = fl.plan(blocks(rows=2, width=1024, optimizer=fused), card(300), precision="bf16-mixed")
    assert not plan.fits and plan.verdict == "does not fit"
    kinds = {piece.kind: piece for piece in plan.advice}
    assert "gpu" in kinds and "gpus" in kinds
    assert "x a100-40gb with 300 MiB sharded by FSDP2" in kinds["gpus"].text
    assert all(piece.needed < piece.capacity for piece in plan.advice)


def test_an_sgd_without_momentum_has_no_state_to_shrink():
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    plan = fl.plan(blocks(rows=2, width=1024, optimizer=sgd), card(150), precision="bf16-mixed", advice=False)
    reasons = {rejected.name: rejected.reason for rejected in plan.rejected}
    assert reasons["low_bit_optimizer"] == reasons["optimizer_offload"] == "the optimizer keeps no state"


def test_the_recipe_is_what_was_planned():
    plan = wide(500)
    recipe = plan.recipe()
    assert recipe["precision"] == "bf16-mixed"
    made = [fl.techniques.make_technique(n, {} if s is True else s) for n, s in recipe["techniques"].items()]
    assert sorted(map(str, made)) == sorted(plan.techniques)


def test_progress_is_told_and_each_combination_is_tried_once():
    told = []
    plan = wide(500, progress=lambda what, done: told.append((what, done)))
    assert len(told) == plan.trials == len({done for _, done in told})


def test_bad_names():
    with pytest.raises(ConfigError, match="no technique 'chekpointing'"):
        planned(100, exclude=["chekpointing"])
    with pytest.raises(ConfigError, match="cannot be combined"):
        planned(100, techniques=["offload", "optimizer_offload", "kahan", "stochastic_rounding"])


def test_json_has_plain_values():
    import json

    json.dumps(wide(500).as_dict())


class Counting(nn.Module):
    """A forward saves fewer tensors than the one before, so a layer of it cannot be computed again."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(256, 256), 0

    def forward(self, x):
        self.calls += 1
        for _ in range(4 - self.calls % 4):
            x = self.linear(x).sin()
        return x


def test_a_technique_that_the_model_does_not_survive_is_rejected_and_the_search_goes_on():
    def model():
        return nn.Sequential(nn.Linear(256, 256), *(Counting() for _ in range(6)))

    work = fl.Workload(
        model=model,
        batch=lambda: (torch.ones(16384, 256),),
        loss=lambda model, batch: model(*batch).square().mean(),
        optimizer=fused,
    )
    plan = fl.plan(work, card(300), precision="32-true", exclude=["accumulation"], advice=False)
    reasons = {rejected.name: rejected.reason for rejected in plan.rejected}
    assert "does not run: CheckpointError" in reasons["checkpointing"]
