"""bf16 weights stepped in fp32: unbiased rounding, compensation, small updates, state, resume."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import floatline as fl
from floatline.errors import ConfigError
from floatline.techniques import make_technique
from floatline.techniques.optim_steps.wide_step import (
    COMPENSATION,
    MASTER,
    RANDOMNESS,
    Compensated,
    MasterCopy,
    Stochastic,
    WideStep,
    round_stochastically,
)

from .optimizer_cases import data, furthest, make, resumed, same, through_a_file, train

BOTH = ["kahan", "stochastic_rounding", "master_weights"]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100))
def test_rounding_goes_to_one_of_the_two_neighbours(value):
    x = torch.tensor([value], dtype=torch.float32)
    got = round_stochastically(x, torch.Generator().manual_seed(0))
    down = x.view(torch.int32).bitwise_and(-(1 << 16))
    assert got.float().view(torch.int32) in (down, down + (1 << 16))
    if x == x.bfloat16().float():
        assert got == x.bfloat16()


def test_rounding_is_unbiased_and_nearest_is_not():
    x = torch.full((200_000,), 1.0 + 2**-7 * 0.1)  # a tenth of the way to the next bf16
    up = (round_stochastically(x, torch.Generator().manual_seed(0)) > 1.0).double().mean().item()
    assert up == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 200_000) ** 0.5)  # 4 standard errors
    assert (x.bfloat16() == 1.0).all()


def test_rounding_keeps_what_is_not_finite():
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    got = round_stochastically(special.repeat(1000)).view(1000, 4)
    assert (got[:, 0] == float("inf")).all() and (got[:, 1] == -float("inf")).all()
    assert got[:, 2].isnan().all() and (got[:, 3] == 0).all()
    quiet = torch.full((1000,), 0x7F800001, dtype=torch.int32).view(torch.float32)  # a NaN whose bits bf16 drops
    assert round_stochastically(quiet).isnan().all()


def trajectory(step_name, updates=300, lr=1e-5, beta2=0.999, weight_decay=0.0):
    """Where a bf16 vector goes under noisy gradients: (moved, moved in fp64), both from the same start."""
    generator = torch.Generator().manual_seed(1)
    start = (torch.randn(4000, generator=generator) * 0.02).bfloat16()
    slope = torch.randn(4000, generator=generator)
    moved = []
    for dtype in (torch.bfloat16, torch.float64):
        weight = torch.nn.Parameter(start.to(dtype).clone())
        plain = torch.optim.AdamW([weight], lr=lr, betas=(0.9, beta2), weight_decay=weight_decay)
        rounding = {"kahan": Compensated, "stochastic_rounding": Stochastic, "master_weights": MasterCopy}.get(
            step_name
        )
        optimizer = plain
        if rounding and dtype is torch.bfloat16:
            optimizer = WideStep(plain, rounding(), moments="bf16", bucket_bytes=2**20, seed=0, name=step_name)
        if step_name == "optimi" and dtype is torch.bfloat16:
            import optimi

            optimizer = optimi.AdamW([weight], lr=lr, betas=(0.9, beta2), eps=1e-8, weight_decay=weight_decay,
                                     kahan_sum=True, triton=False, foreach=False)  # fmt: skip
        noise = torch.Generator().manual_seed(2)
        for update in range(updates):
            scale = 1.0 if update < updates // 2 else 3.0  # so that the second moment has to move
            gradient = (slope + 0.3 * torch.randn(4000, generator=noise)) * scale * 1e-3
            weight.grad = gradient.bfloat16().to(dtype)
            optimizer.step()
        moved.append(weight.detach().double() - start.double())
    return moved


def test_small_updates_add_up():
    """300 updates at 1e-5: plain bf16 stands nearly still, the techniques go the whole way."""
    plain, exact = trajectory("plain")
    assert plain.norm() < 0.5 * exact.norm()
    for name, error in (("kahan", 0.06), ("master_weights", 0.06), ("stochastic_rounding", 0.6)):
        got, exact = trajectory(name)
        along = (got @ exact) / (exact @ exact)
        assert along == pytest.approx(1.0, abs=0.02), name
        assert (got - exact).norm() < error * exact.norm(), name


def test_kahan_follows_fp64_closer_than_optimi_where_the_second_moment_matters():
    pytest.importorskip("optimi")
    ours, exact = trajectory("kahan", updates=1500, lr=1e-4, weight_decay=0.1)
    theirs, _ = trajectory("optimi", updates=1500, lr=1e-4, weight_decay=0.1)
    assert (ours - exact).norm() < 0.01 * exact.norm()
    assert (theirs - exact).norm() > 0.05 * exact.norm()


def test_kahan_and_optimi_agree_where_bf16_moments_suffice():
    pytest.importorskip("optimi")
    ours, exact = trajectory("kahan", updates=100, beta2=0.9)
    theirs, _ = trajectory("optimi", updates=100, beta2=0.9)
    assert (ours - theirs).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("technique", BOTH)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "16-true"])
def test_without_bf16_weights_no_bit_changes(case, technique, precision):
    models = []
    for techniques in ([], [technique]):
        model, step = make(techniques, precision, model=case.build(), loss=case.loss)
        x = case.batch(0)
        train(step, [x, [x, case.batch(1)], case.batch(2)])
        models.append(model)
    assert same(*models)
    assert step.stack.notes == [
        f"{technique}: no effect: no trainable parameter is bf16 (it is for precision bf16-true)"
    ]


@pytest.mark.parametrize("technique", BOTH)
def test_close_to_fp32_on_every_model(case, technique):
    """Three updates with a large eps, so that no update hangs on the sign of a gradient near zero."""
    models = []
    for precision, techniques in (("32-true", []), ("bf16-true", [technique])):
        model, step = make(
            techniques,
            precision,
            model=case.build(),
            loss=case.loss,
            optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, eps=1e-2),
        )
        train(step, map(case.batch, range(3)))
        models.append(model)
    assert furthest(*models) < 2e-2  # bf16 weights of up to 2, rounded


@pytest.mark.parametrize("technique", [*BOTH, "kahan(moments=fp32)", "stochastic_rounding(moments=fp32, seed=3)",
                                       "master_weights(moments=bf16)", "kahan(library=optimi)"])  # fmt: skip
def test_resumes_bit_for_bit(technique):
    assert same(*resumed([technique], "bf16-true"))


def test_moments_stay_in_the_format_asked_for():
    for moments, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        _, step = make([fl.techniques.Kahan(moments=moments)], "bf16-true")
        train(step, map(data, range(2)))
        step.load_state_dict(through_a_file(step.state_dict()))
        for state in step.optimizer.state.values():
            assert state["exp_avg"].dtype is state["exp_avg_sq"].dtype is dtype
            assert state[COMPENSATION].dtype is torch.bfloat16


def test_state_dicts_load_with_and_without():
    plain_model, plain = make([], "bf16-true")
    train(plain, map(data, range(2)))
    model, step = make(["kahan"], "bf16-true")
    model.load_state_dict(plain_model.state_dict())
    step.load_state_dict(through_a_file(plain.state_dict()))
    train(step, [data(2)])
    plain.load_state_dict(through_a_file(step.state_dict()))
    assert bool(plain(data(3)).applied)


def test_random_bits_of_another_device_are_left_out():
    _, step = make(["stochastic_rounding"], "bf16-true")
    train(step, [data(0)])
    saved = step.optimizer.state_dict()
    step.optimizer.load_state_dict({**saved, RANDOMNESS: {"cuda:0": torch.zeros(16, dtype=torch.uint8)}})
    assert step.optimizer.state_dict().get(RANDOMNESS, {}) == {}  # the next draw begins with the seed
    train(step, [data(1)])
    assert list(step.optimizer.state_dict()[RANDOMNESS]) == ["cpu"]


def test_the_master_copy_is_what_is_stepped_and_the_weights_are_it_rounded():
    model, step = make(["master_weights"], "bf16-true")
    train(step, map(data, range(3)))
    for parameter in model.parameters():
        master = step.optimizer.state[parameter][MASTER]
        assert master.dtype is torch.float32 and master.grad is None
        assert torch.equal(parameter, master.bfloat16()) and not torch.equal(parameter.float(), master)
    masters = {name: step.optimizer.state[p][MASTER].clone() for name, p in model.named_parameters()}
    step.load_state_dict(through_a_file(step.state_dict()))
    assert all(torch.equal(step.optimizer.state[p][MASTER], masters[name]) for name, p in model.named_parameters())
    step.undo()
    assert all(MASTER not in state for state in step.optimizer.state.values())


def test_works_for_sgd_and_in_small_buckets():
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)

    models = []
    for bucket in (1, 2**20):
        model, step = make([fl.techniques.Kahan(bucket_bytes=bucket, moments="fp32")], "bf16-true", optimizer=sgd)
        train(step, map(data, range(3)))
        models.append(model)
    assert same(*models)
    assert all(state["momentum_buffer"].dtype is torch.float32 for state in step.optimizer.state.values())


def test_another_seed_rounds_differently_and_torchs_random_numbers_are_left_alone():
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(7)
        model, step = make([fl.techniques.StochasticRounding(seed=seed)], "bf16-true")
        state = torch.get_rng_state()
        train(step, map(data, range(3)))
        assert torch.equal(torch.get_rng_state(), state)
        models.append(model)
    assert same(models[0], models[1]) and not same(models[0], models[2])


def test_undo_gives_the_optimizer_back():
    model, _ = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    _, step = make(["kahan"], "bf16-true", optimizer=optimizer, model=model)
    train(step, map(data, range(2)))
    assert step.stack.facts()["kahan.state_bytes"] == sum(3 * 2 * p.numel() + 4 for p in model.parameters())
    step.undo()
    assert all(COMPENSATION not in state for state in optimizer.state.values())
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}


def test_a_step_that_fails_leaves_state_and_weights():
    model, step = make(["kahan"], "bf16-true")
    train(step, [data(0)])

    def exact():  # a weight halfway between two may change places with its compensation
        return [p.detach().float() + step.optimizer.state[p][COMPENSATION] for p in model.parameters()]

    before = exact()

    def fail(*_):
        raise RuntimeError("no")

    handle = step.optimizer.inner.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        step(data(1))
    handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, exact(), strict=True))


def test_bad_input():
    with pytest.raises(ConfigError, match=r"kahan.moments is 'fp16'\nhint: allowed: bf16, fp32"):
        fl.techniques.Kahan(moments="fp16")
    with pytest.raises(ConfigError, match=r"stochastic_rounding.bucket_bytes is 0\nhint: give 1 or more"):
        fl.techniques.StochasticRounding(bucket_bytes=0)
    with pytest.raises(ConfigError, match=r"kahan.seed is -1\nhint: give 0 or more"):
        fl.techniques.Kahan(seed=-1)
    for pair, way_out in (
        (("kahan", "stochastic_rounding"), "kahan has no noise and costs 2 bytes"),
        (("kahan", "low_bit_optimizer"), r"low_bit_optimizer\(stochastic_rounding=True\)"),
        (("low_bit_optimizer", "stochastic_rounding"), r"low_bit_optimizer\(stochastic_rounding=True\)"),
    ):
        with pytest.raises(ConfigError, match=way_out):
            make(list(pair))


@pytest.mark.parametrize("name", BOTH)
def test_a_seed_that_no_generator_takes(name):
    with pytest.raises(ConfigError, match=rf"{name}.seed is 9223372036854775808\nhint: give less than 2\^63"):
        make_technique(f"{name}(seed={2**63})")
