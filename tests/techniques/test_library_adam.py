"""Other libraries' Adam in place of torch's: their own step, torch's form of groups and state."""

import builtins

import pytest
import torch

import floatline as fl
from floatline.errors import ConfigError
from floatline.techniques.optim_steps.wide_step import COMPENSATION

from .optimizer_cases import adamw, data, furthest, make, same, through_a_file, train

optimi = pytest.importorskip("optimi")
torchao = pytest.importorskip("torchao")

OPTIMI, TORCHAO = "kahan(library=optimi)", "stochastic_rounding(library=torchao)"
BOTH = [OPTIMI, TORCHAO]


def with_seed(step, seeds):
    """Updates whose random bits, which are torch's own with torchao, hang on the batch alone."""
    for seed in seeds:
        torch.manual_seed(seed)
        step(data(seed))


def test_optimi_makes_the_very_updates_that_it_makes_alone():
    model, step = make([OPTIMI], "bf16-true", max_grad_norm=None)
    settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
    theirs = lambda params: optimi.AdamW(params, **settings)  # noqa: E731
    alone, bare = make([], "bf16-true", max_grad_norm=None, optimizer=theirs)
    for each in (step, bare):
        train(each, map(data, range(4)))
    assert same(model, alone)
    assert isinstance(step.optimizer, optimi.AdamW)


def test_torchao_makes_the_very_updates_that_it_makes_alone():
    from torchao.optim import _AdamW

    model, step = make([TORCHAO], "bf16-true", max_grad_norm=None)
    alone, bare = make([], "bf16-true", max_grad_norm=None,
                       optimizer=lambda params: _AdamW(params, lr=1e-3, bf16_stochastic_round=True))  # fmt: skip
    with_seed(step, range(3))
    with torch.compiler.set_stance("force_eager"):
        with_seed(bare, range(3))
    assert same(model, alone)
    assert isinstance(step.optimizer, _AdamW)


@pytest.mark.parametrize("technique", BOTH)
def test_resumes_bit_for_bit(technique):
    whole, step = make([technique], "bf16-true")
    with_seed(step, range(3))
    saved = through_a_file({"model": whole.state_dict(), "step": step.state_dict()})
    again, second = make([technique], "bf16-true")
    again.load_state_dict(saved["model"])
    second.load_state_dict(saved["step"])
    with_seed(step, range(3, 6))
    with_seed(second, range(3, 6))
    assert same(whole, again)


@pytest.mark.parametrize("technique", BOTH)
def test_state_dicts_load_with_and_without(technique):
    plain_model, plain = make([], "bf16-true")
    train(plain, map(data, range(2)))
    model, step = make([technique], "bf16-true")
    model.load_state_dict(plain_model.state_dict())
    step.load_state_dict(through_a_file(plain.state_dict()))
    train(step, [data(2)])
    assert bool(step(data(2)).applied)
    saved = through_a_file(step.state_dict())
    assert {float(s["step"]) for s in saved["optimizer"]["state"].values()} == {4.0}
    plain.load_state_dict(saved)
    assert bool(plain(data(3)).applied)


@pytest.mark.parametrize("technique", BOTH)
def test_goes_on_from_a_trained_optimizer_and_gives_it_back(technique):
    model, _ = make()
    model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    _, first = make([], "bf16-true", optimizer=optimizer, model=model)
    train(first, map(data, range(2)))
    first.undo()
    _, step = make([technique], "bf16-true", optimizer=optimizer, model=model)
    train(step, map(data, range(2)))
    assert step.optimizer is not optimizer and step.optimizer.param_groups is optimizer.param_groups
    step.undo()
    assert all(COMPENSATION not in state for state in optimizer.state.values())
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}
    assert set(optimizer.param_groups[0]) == set(torch.optim.AdamW(model.parameters()).param_groups[0])
    _, last = make([], "bf16-true", optimizer=optimizer, model=model)
    train(last, [data(5)])


@pytest.mark.parametrize("technique", BOTH)
def test_schedules_and_groups_reach_it(technique):
    model, _ = make()
    first, *others = model.parameters()
    optimizer = torch.optim.AdamW([{"params": [first], "lr": 0.0, "betas": (0.5, 0.9)}, {"params": others}], lr=1e-2)
    before = first.detach().bfloat16().clone(), others[0].detach().bfloat16().clone()
    _, step = make([technique], "bf16-true", optimizer=optimizer, model=model,
                   schedule=lambda made: torch.optim.lr_scheduler.ConstantLR(made, factor=0.5))  # fmt: skip
    train(step, [data(0)])
    assert torch.equal(first, before[0]) and not torch.equal(others[0], before[1])
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 5e-3]


@pytest.mark.parametrize("technique", BOTH)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-true"])
def test_without_bf16_weights_no_bit_changes(technique, precision):
    models = []
    for techniques in ([], [technique]):
        model, step = make(techniques, precision)
        train(step, map(data, range(3)))
        models.append(model)
    assert same(*models) and "no effect" in step.stack.notes[0]


def test_close_to_ours():
    """The same beta2 for all; torch's AdamW in fp32 is the measure."""
    exact, step = make([], "32-true", optimizer=lambda p: adamw(p, betas=(0.9, 0.95), eps=1e-3))
    train(step, map(data, range(5)))
    for technique in BOTH:
        model, step = make([technique], "bf16-true", optimizer=lambda p: adamw(p, betas=(0.9, 0.95), eps=1e-3))
        train(step, map(data, range(5)))
        assert furthest(exact, model) < 3e-3, technique


def test_bad_input(monkeypatch):
    with pytest.raises(ConfigError, match=r"kahan.moments is 'fp32'\nhint: optimi has no such choice"):
        fl.techniques.Kahan(library="optimi", moments="fp32")
    with pytest.raises(ConfigError, match=r"stochastic_rounding.seed is 1\nhint: torchao has no such choice"):
        fl.techniques.StochasticRounding(library="torchao", seed=1)
    with pytest.raises(ConfigError, match=r"kahan.library is 'torchao'\nhint: allowed: floatline, optimi"):
        fl.techniques.Kahan(library="torchao")
    with pytest.raises(ConfigError, match=r"'torchao' stands in for torch.optim.AdamW, not for Adam\n"):
        make([TORCHAO], "bf16-true", optimizer=torch.optim.Adam)
    with pytest.raises(
        ConfigError, match=r"'optimi' stands in for torch.optim.AdamW and torch.optim.Adam, not for SGD"
    ):
        make([OPTIMI], "bf16-true", optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(ConfigError, match=r"'optimi' cannot do amsgrad=True\nhint: leave amsgrad out"):
        make([OPTIMI], "bf16-true", optimizer=lambda p: adamw(p, amsgrad=True))
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "optimi":
            raise ImportError("No module named 'optimi'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"needs torch-optimi: No module named 'optimi'\nhint: pip install torch-opt"):
        make([OPTIMI], "bf16-true")
