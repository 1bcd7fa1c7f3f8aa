"""Kept traces: the same numbers as traces made anew, shared by cards of one capability and by no others."""

import planned_models as models
import pytest

from floatline.errors import ConfigError
from floatline.hardware import lookup
from floatline.plan.estimate import estimate
from floatline.plan.traces import TraceCache, rules_of


def test_cards_of_one_capability_share_traces_and_get_their_own_figures():
    work = models.deep(batch=2, seq=16, layers=2)
    kept = TraceCache(work)
    for name in ("a10g", "rtx-3090"):
        shared, anew = estimate(work, name, traces=kept), estimate(work, name)
        assert shared == anew
        assert shared.hardware is lookup(name) and shared.context == lookup(name).context
    assert kept.made == 1


def test_what_differs_is_traced_again():
    work = models.deep(batch=4, seq=16, layers=2)
    kept = TraceCache(work)
    for settings in [{}, {"mode": "inference"}, {"precision": "32-true"}, {"techniques": ["accumulation"]},
                     {"max_grad_norm": None}, {"quick": True}]:  # fmt: skip
        for _ in range(2):
            estimate(work, "a10g", traces=kept, **settings)
    assert kept.made == 6
    estimate(work, "l4", traces=kept)
    assert kept.made == 7


def test_the_order_of_techniques_does_not_matter():
    work = models.deep(batch=4, seq=16, layers=2)
    kept = TraceCache(work)
    for techniques in (["checkpointing", "accumulation"], ["accumulation", "checkpointing"]):
        estimate(work, "t4", techniques=techniques, traces=kept)
    assert kept.made == 1


def test_auto_is_the_precision_that_it_stands_for():
    work = models.deep(batch=2, seq=16, layers=2)
    kept = TraceCache(work)
    for precision in ("auto", "16-mixed"):
        estimate(work, "t4", precision, traces=kept)
    assert kept.made == 1


def test_what_is_refused_is_not_kept():
    kept = TraceCache(models.deep(batch=2, seq=16, layers=2))
    for _ in range(2):
        with pytest.raises(ConfigError, match="Turing"):
            kept.trace(lookup("t4"), "bf16-mixed", [], "train")
    assert kept.made == 0


def test_sentences_name_the_card_that_is_asked_for():
    work = models.deep(batch=2, seq=16, layers=2)
    kept = TraceCache(work)
    first = kept.trace(lookup("a10g"), "auto", [], "train")
    first.notes.append("chosen for a10g")
    assert kept.trace(lookup("rtx-3090"), "auto", [], "train").notes == ["chosen for rtx-3090"]
    assert first.notes == ["chosen for a10g"]


def test_rules_are_the_capability_on_gpus_and_the_formats_on_cpus():
    assert rules_of(lookup("a100-40gb")) == rules_of(lookup("a100-80gb"))
    assert rules_of(lookup("a100-40gb")) != rules_of(lookup("rtx-3090"))
