"""The audit of optimizer updates: what each format loses, told from what it keeps."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import floatline as fl
from floatline.audit.updates import audit_updates
from floatline.errors import ConfigError
from floatline.techniques.low_bit_optimizer import LowBitOptimizer
from floatline.techniques.optim_steps.wide_step import Compensated, Stochastic, WideStep


def matrix(rows=64, columns=32, scale=0.02, seed=0):
    return nn.Parameter(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale)


def gradient_of(parameter, scale=1e-3, seed=1):
    return torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * scale


def audit(optimizer, weights="bf16", scale=1e-3, parameter=None, **settings):
    parameter = matrix() if parameter is None else parameter
    return audit_updates({"w": parameter}, {"w": gradient_of(parameter, scale)}, optimizer, weights=weights, **settings)


def adamw(lr, **settings):
    return lambda params: torch.optim.AdamW(params, lr=lr, **settings)


def wide(rounding, lr=1e-5):
    def make(params):
        inner = torch.optim.AdamW(params, lr=lr)
        return WideStep(inner, rounding, moments="bf16", bucket_bytes=2**26, seed=0, name="kahan")

    return make


def test_bf16_adamw_at_a_small_lr_is_swallowed():
    row = audit(adamw(1e-5)).worst
    assert (row.failure, row.which, row.state_format) == ("stagnation", "swallowed", "bf16")
    assert row.weights.swallowed > 0.8 and row.weights.progress < 0.3 and row.weights.error > 0.8


def test_the_second_moment_of_bf16_stalls_under_beta2_of_999_and_not_under_95():
    report = audit(adamw(3e-3))
    assert report.rows[0].found == ("stalled second moment",)
    assert report.rows[0].second_moment.swallowed > 0.99 and report.rows[0].second_moment_ratio > 1.02
    assert "beta2" in report.advice
    assert audit(adamw(3e-3, betas=(0.9, 0.95))).worst is None


def test_an_optimizer_that_shortens_beta2_at_first_is_looked_at_when_it_has_run_long():
    optimi = pytest.importorskip("optimi")
    row = audit(lambda params: optimi.AdamW(params, lr=1e-5, betas=(0.9, 0.999))).rows[0]
    assert row.found == ("stalled second moment",)


def test_fp16_loses_eps():
    row = audit(adamw(1e-3), weights="fp16").worst
    assert (row.failure, row.which, row.eps_lost) == ("range", "eps underflows", True)
    assert row.non_finite > 0  # 0/0 where v is 0 too


def test_fp16_with_a_larger_eps_still_loses_small_second_moments():
    report = audit(adamw(1e-3, eps=1e-4), weights="fp16")
    assert report.worst.which == "second moment underflows" and report.worst.second_moment_lost > 0.01
    assert "16-true" in report.advice and "eps=" not in report.advice


def test_a_fused_kernel_keeps_eps_and_loses_small_second_moments():
    row = audit(adamw(1e-3, fused=True), weights="fp16").worst
    assert (row.which, row.eps_lost, row.non_finite) == ("second moment underflows", False, 0.0)


def test_fp16_overflows_where_squares_do():
    row = audit(adamw(1e-3, eps=1e-4), weights="fp16", scale=500.0).worst
    assert (row.failure, row.which) == ("range", "overflow")


def test_weights_that_leave_fp16_overflow():
    sgd = lambda params: torch.optim.SGD(params, lr=100.0)  # noqa: E731
    row = audit(sgd, weights="fp16", scale=1000.0).worst
    assert row.which == "overflow" and row.non_finite > 0.5


HEALTHY = {
    "fp32 weights, the usual lr": ({"optimizer": adamw(1e-4), "weights": "fp32"}),
    "fp32 weights, a small lr": ({"optimizer": adamw(1e-6), "weights": "fp32"}),
    "an fp32 master copy of bf16": ({"optimizer": adamw(1e-5), "weights": "bf16", "master": True}),
    "an fp32 master copy of fp16": ({"optimizer": adamw(1e-5), "weights": "fp16", "master": True}),
    "bf16, SGD that moves": ({"optimizer": lambda p: torch.optim.SGD(p, lr=1e-2), "scale": 1.0}),
    "bf16, SGD with momentum": ({"optimizer": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), "scale": 1.0}),
    "Kahan": ({"optimizer": wide(Compensated())}),
    "stochastic rounding": ({"optimizer": wide(Stochastic())}),
    "Kahan on weights of 1": ({"optimizer": wide(Compensated()), "parameter": nn.Parameter(torch.ones(64))}),
    "stochastic rounding on weights of 1": (
        {"optimizer": wide(Stochastic()), "parameter": nn.Parameter(torch.ones(64))}
    ),
    "a learning rate of 0": ({"optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}),
}


@pytest.mark.parametrize("case", HEALTHY)
def test_what_is_healthy_asks_for_nothing(case):
    report = audit(**HEALTHY[case])
    assert [row.found for row in report.rows] == [()]
    assert report.worst is None and report.advice == "" and not report.failures and not report.unseen


@pytest.mark.parametrize("seed", range(5))
def test_random_rounding_is_not_mistaken_for_loss(seed):
    assert audit(wide(Stochastic(), lr=1e-6), parameter=nn.Parameter(torch.ones(7)), seed=seed).worst is None


def test_a_scalar_that_does_not_move_is_found():
    scale = nn.Parameter(torch.tensor(4.6))
    row = audit_updates({"logit_scale": scale}, {"logit_scale": torch.tensor(1e-3)}, adamw(1e-4)).worst
    assert (row.name, row.elements, row.which) == ("logit_scale", 1, "swallowed")


def test_groups_keep_their_own_lr():
    slow, fast = matrix(seed=2), matrix(seed=3)
    optimizer = torch.optim.AdamW([{"params": [slow]}, {"params": [fast], "lr": 1e-2, "betas": (0.9, 0.95)}], lr=1e-6)
    names = {"slow": slow, "fast": fast}
    report = audit_updates(names, {name: gradient_of(p) for name, p in names.items()}, optimizer)
    assert [(row.name, row.lr, row.which) for row in report.rows] == [("slow", 1e-6, "swallowed"), ("fast", 1e-2, None)]


def test_an_optimizer_that_exists_is_copied_with_its_state_and_left_alone():
    weight = nn.Parameter(matrix().detach().bfloat16())
    optimizer = torch.optim.AdamW([weight], lr=3e-3)
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # puts its own step over the optimizer's
    weight.grad = gradient_of(weight).bfloat16()
    optimizer.step()
    optimizer.state[weight]["exp_avg_sq"] = optimizer.state[weight]["exp_avg_sq"].float()
    before = json.dumps(
        [weight.tolist(), optimizer.state[weight]["exp_avg_sq"].tolist(), optimizer.param_groups[0]["lr"]]
    )
    row = audit_updates({"w": weight}, {"w": gradient_of(weight)}, optimizer).rows[0]
    after = json.dumps(
        [weight.tolist(), optimizer.state[weight]["exp_avg_sq"].tolist(), optimizer.param_groups[0]["lr"]]
    )
    assert before == after and float(optimizer.state[weight]["step"]) == 1
    assert row.state_format == "fp32" and row.found == ()  # bf16 moments would stall


def test_state_in_the_format_of_fp32_weights_follows_the_format_that_is_audited():
    weight = matrix()
    optimizer = torch.optim.AdamW([weight], lr=3e-3)
    weight.grad = gradient_of(weight)
    optimizer.step()
    assert audit_updates({"w": weight}, {"w": gradient_of(weight)}, optimizer).rows[0].state_format == "bf16"


@pytest.mark.parametrize(
    ("technique", "found"),
    [
        (None, ("swallowed", "stalled second moment")),
        ("master_weights", ()),
        ("kahan", ()),
        ("stochastic_rounding", ()),
        ("kahan(library=optimi)", ("stalled second moment",)),
        ("stochastic_rounding(library=torchao)", ("stalled second moment",)),
    ],
)
def test_the_optimizer_of_a_step_is_taken_as_it_is(technique, found):
    if technique and "library" in technique:
        pytest.importorskip(technique[technique.index("=") + 1 : -1])
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    step = fl.TrainStep(
        model,
        lambda params: torch.optim.AdamW(params, lr=1e-5, fused=True),
        precision="bf16-true",
        loss=lambda model, batch: model(batch).float().square().mean(),
        techniques=[technique] if technique else [],
    )
    for seed in range(3):
        step(torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)).bfloat16())
    gradients = {name: gradient_of(p) for name, p in model.named_parameters()}
    rows = audit_updates(dict(model.named_parameters()), gradients, step.optimizer).rows
    assert [row.found for row in rows] == [found, found]
    if "swallowed" not in found:
        assert all(row.weights.progress == pytest.approx(1.0, abs=0.25) for row in rows)


def test_master_weights_of_16_true_are_not_found_by_their_names():
    model = nn.Linear(8, 8)
    step = fl.TrainStep(model, adamw(1e-5), precision="16-true", loss=lambda m, b: m(b).float().square().mean())
    gradients = {name: gradient_of(p) for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match=r"AdamW steps none of these parameters\nhint: .*\(master weights\)"):
        audit_updates(dict(model.named_parameters()), gradients, step.optimizer)


def test_a_sample_answers_as_the_whole_does():
    parameter = matrix(128, 64)
    whole, some = (
        audit(adamw(1e-5), parameter=parameter, sample=10**6),
        audit(adamw(1e-5), parameter=parameter, sample=1024),
    )
    assert (whole.rows[0].elements, some.rows[0].elements) == (128 * 64, 1024)
    assert whole.rows[0].weights.progress == pytest.approx(some.rows[0].weights.progress, abs=0.05)
    assert whole.rows[0].found == some.rows[0].found


def test_optimizers_that_mix_elements_step_whole_parameters_or_say_that_they_were_not_looked_at():
    small, large = matrix(), nn.Parameter(torch.zeros(2**18 + 1, 1))
    names = {"small": small, "large": large}
    muon = lambda params: torch.optim.Muon(params, lr=1e-6)  # noqa: E731
    report = audit_updates(names, {n: gradient_of(p) for n, p in names.items()}, muon, sample=16, steps=3)
    assert [(row.name, row.elements) for row in report.rows] == [("small", small.numel())]
    assert report.unseen["large"].startswith("Muon mixes elements")


def test_lbfgs_says_that_it_was_not_looked_at():
    report = audit(lambda params: torch.optim.LBFGS(params))
    assert not report.rows and report.unseen["w"].startswith("LBFGS cannot be stepped alone")


def test_quantised_state_says_that_it_was_not_looked_at():
    pytest.importorskip("torchao")
    weight = matrix(128, 64)
    model = nn.ParameterDict({"w": weight})
    applied = LowBitOptimizer().apply(model)
    low_bit = applied.optimizer(torch.optim.AdamW([weight], lr=1e-3))
    report = audit_updates({"w": weight}, {"w": gradient_of(weight)}, low_bit, steps=2)
    assert not report.rows and "quantised blocks" in report.unseen["w"]


@pytest.mark.parametrize(
    "make", ["RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD", "Adafactor"]
)
def test_every_optimizer_of_torch_runs(make):
    report = audit(lambda params: getattr(torch.optim, make)(params, lr=1e-3), steps=3)
    assert len(report.rows) == 1 and json.dumps(report.as_dict())


def test_what_has_no_gradient_is_named():
    names = {"w": matrix(), "frozen": matrix(), "ids": torch.arange(4)}
    report = audit_updates(names, {"w": gradient_of(names["w"])}, adamw(1e-3))
    assert report.unseen == {"frozen": "no gradient", "ids": "no gradient"}


def test_the_report_is_plain_json():
    tree = json.loads(json.dumps(audit(adamw(1e-5)).as_dict(), allow_nan=False))
    assert tree["rows"][0]["which"] == "swallowed" and tree["failures"]["swallowed"] == 1 and tree["advice"]


def test_the_same_seed_gives_the_same_answer():
    assert audit(adamw(1e-5), seed=3).as_dict() == audit(adamw(1e-5), seed=3).as_dict()


def test_torchs_random_numbers_are_left_alone_and_random_rounding_is_repeatable():
    pytest.importorskip("torchao")
    from torchao.optim import _AdamW

    before = torch.get_rng_state()
    with torch.compiler.set_stance("force_eager"):
        one, two = (
            audit(lambda params: _AdamW(params, lr=1e-5, bf16_stochastic_round=True), steps=3) for _ in range(2)
        )
    assert torch.equal(torch.get_rng_state(), before) and one.as_dict() == two.as_dict()


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-5, 1e-2), st.sampled_from(["SGD", "AdamW", "RMSprop"]))
def test_fp32_moves_as_fp64_does_whatever_the_rate(lr, name):
    report = audit(lambda params: getattr(torch.optim, name)(params, lr=lr), weights="fp32", scale=0.1, steps=5)
    assert report.rows[0].weights.error < 0.01 and report.worst is None


@settings(max_examples=15, deadline=None)
@given(st.floats(1e-6, 1e-3), st.floats(1.5, 10.0))
def test_a_larger_rate_never_loses_more(lr, factor):
    less, more = audit(adamw(lr), steps=5).rows[0].weights, audit(adamw(lr * factor), steps=5).rows[0].weights
    assert more.swallowed <= less.swallowed + 0.02


BAD = [
    ({"weights": "fp8"}, "unknown format of weights 'fp8'", "fp32"),
    ({"steps": 0}, "steps=0 is not a count", "1 or more"),
    ({"sample": 1.5}, "sample=1.5 is not a count", "1 or more"),
    ({"noise": float("nan")}, "noise=nan", "0 or more"),
    ({"optimizer": lambda params: None}, "factory returned a NoneType", "torch.optim.Optimizer"),
    (
        {"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1)},
        "SGD steps none of these",
        "callable(params)",
    ),
]


@pytest.mark.parametrize(("changed", "text", "hint"), BAD, ids=lambda value: str(value)[:20])
def test_bad_settings_are_told(changed, text, hint):
    with pytest.raises(ConfigError) as caught:
        audit(**{"optimizer": adamw(1e-3), **changed})
    assert text in caught.value.message and hint in caught.value.hint


@pytest.mark.parametrize(
    ("gradients", "text", "hint"),
    [
        ({"v": torch.ones(64, 32)}, "gradient for 'v', which is no parameter", "w"),
        ({"w": torch.ones(3)}, "shape (3,), the parameter (64, 32)", "after a backward"),
        ({"w": torch.full((64, 32), float("inf"))}, "gradient w holds NaN or infinity", "floatline diagnose"),
        ({}, "no parameter has a gradient", "backward"),
    ],
)
def test_bad_gradients_are_told(gradients, text, hint):
    with pytest.raises(ConfigError) as caught:
        audit_updates({"w": matrix()}, gradients, adamw(1e-3))
    assert text in caught.value.message and hint in caught.value.hint
