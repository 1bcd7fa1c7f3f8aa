"""Optimizers over CPU tensors step as they would over CUDA's, and what the caller sets holds."""

import pytest
import torch
from target_ops import Ops
from torch import nn
from torch._subclasses import FakeTensorMode

import floatline as fl
from floatline.observe.target import target_optimizers

FOREACH = [
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adamax,
    torch.optim.NAdam, torch.optim.RAdam, torch.optim.Rprop, torch.optim.ASGD, torch.optim.Adadelta,
]  # fmt: skip


def step(make, width=8):
    """Return the names of the ops of one step and the optimizer's parameters after it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    optimizer = make(model.parameters())
    model(torch.ones(1, width)).sum().backward()
    with Ops() as ops:
        optimizer.step()
    return ops.names, [p.detach() for p in model.parameters()]


def uses_foreach(names):
    return any(name.startswith("_foreach") for name in names)


@pytest.mark.parametrize("optimizer", FOREACH, ids=lambda o: o.__name__)
def test_the_default_is_foreach_and_computes_the_same(optimizer):
    names, plain = step(lambda params: optimizer(params, lr=0.1))
    assert not uses_foreach(names)
    with target_optimizers():
        names, together = step(lambda params: optimizer(params, lr=0.1))
        assert uses_foreach(names)
    assert all(map(torch.allclose, plain, together))
    assert not uses_foreach(step(lambda params: optimizer(params, lr=0.1))[0])


@pytest.mark.parametrize("setting", [{"foreach": False}, {"fused": True}, {"foreach": None, "fused": False}])
def test_what_the_caller_sets_holds(setting):
    with target_optimizers():
        names, _ = step(lambda params: torch.optim.AdamW(params, **setting))
    assert ("_fused_adamw_" in names) == bool(setting.get("fused"))
    assert "_foreach_sqrt" not in names  # fused steps count together, too


def temporaries(optimizer, count=8, width=64):
    """Return the most bytes that one step on fake tensors allocates at once, in sizes of one parameter."""
    with FakeTensorMode():
        model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(count)])
        optimizer = optimizer(model.parameters())
        model(torch.ones(1, width)).sum().backward()
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        with Ops(known=[*model.parameters(), *(p.grad for p in model.parameters()), *states]) as ops:
            optimizer.step()
    return ops.peak / (width * width * 4)


def test_foreach_has_its_temporary_for_all_parameters_at_once():
    """Adam's is the root of the second moment."""
    assert temporaries(torch.optim.Adam) < 4
    with target_optimizers():
        assert 8 <= temporaries(torch.optim.Adam) < 9
        assert temporaries(lambda params: torch.optim.Adam(params, foreach=False)) < 4


def test_clipping_takes_fake_gradients_together():
    with FakeTensorMode():
        model = nn.Linear(4, 4)
        model(torch.ones(1, 4)).sum().backward()
        with target_optimizers(), Ops() as ops:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert {"_foreach_norm", "_foreach_mul_"} <= set(ops.names)
        with Ops() as ops:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert not uses_foreach(ops.names)


@pytest.mark.parametrize(
    ("technique", "precision"),
    [
        ("low_bit_optimizer", "32-true"),
        ("master_weights", "bf16-true"),
        ("kahan", "bf16-true"),
        ("stochastic_rounding", "bf16-true"),
        ("optimizer_in_backward", "32-true"),
        ("optimizer_offload", "32-true"),
    ],
)
def test_techniques_that_step_go_on_working(technique, precision):
    def trained():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
        settings = {"max_grad_norm": None} if technique == "optimizer_in_backward" else {}
        step = fl.TrainStep(
            model,
            lambda params: torch.optim.AdamW(params, lr=1e-3),
            precision=precision,
            techniques=[technique],
            loss=lambda m, batch: m(batch).float().square().mean(),
            **settings,
        )
        for seed in range(3):
            step(torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)))
        return [p.detach().float() for p in model.parameters()]

    plain = trained()
    with target_optimizers():
        within = trained()
    assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-4) for a, b in zip(plain, within, strict=True))


def test_contexts_nest_end_in_any_order_and_survive_exceptions():
    def default():
        return uses_foreach(step(lambda params: torch.optim.SGD(params, lr=0.1))[0])

    outer, inner = target_optimizers(), target_optimizers()
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert default()
    inner.__exit__(None, None, None)
    assert not default()
    with pytest.raises(ZeroDivisionError), target_optimizers():
        _ = 1 / 0
    assert not default()
