"""The guard: no non-finite loss or gradient reaches the weights; skips are counted and bounded."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import floatline as fl
from floatline.errors import ConfigError, NonFiniteError
from floatline.step import What
from floatline.step.readback import Readback
from floatline.step.sentinel import Judged, Sentinel
from floatline.techniques.optim_steps.select_step import can_select, step_by_select

NAN, INF = float("nan"), float("inf")


def make(precision="32-true", optimizer=torch.optim.AdamW, **guard):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return fl.TrainStep(
        model,
        optimizer(model.parameters(), lr=0.1),
        precision=precision,
        loss=lambda m, b: m(b).float().square().mean(),
        guard=fl.Guard(**guard) if guard else None,
    )


def snapshot(step):
    return [p.detach().clone() for p in step.model.parameters()]


def same(before, step):
    return all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_batch_leaves_weights_and_moments_alone(precision, bad):
    step = make(precision)
    while not step(torch.ones(4, 3)).applied:  # fp16 looks for its loss scale first
        pass
    skipped, done = step.sentinel.skipped, step.updates
    before, state = snapshot(step), {k: v["exp_avg"].clone() for k, v in step.optimizer.state.items()}
    out = step(torch.full((4, 3), bad))
    assert same(before, step) and not bool(out.applied)
    assert all(torch.equal(state[k], v["exp_avg"]) for k, v in step.optimizer.state.items())
    assert step.sentinel.skipped == skipped + 1 and step.sentinel.skips[-1].step == done + 1
    assert step.sentinel.skips[-1].what is What.LOSS
    assert bool(step(torch.ones(4, 3)).applied) and not same(before, step)


def test_a_gradient_fault_with_a_finite_loss_is_seen():
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    nn.init.zeros_(model.weight)
    step = fl.TrainStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        precision="32-true",
        loss=lambda m, b: m(b).square().sum().sqrt(),
    )
    out = step(torch.ones(2, 3))  # sqrt at 0: the loss is 0, its gradient 0/0
    assert out.loss.item() == 0 and math.isnan(out.grad_norm.item())
    assert step.sentinel.skips[0].what is What.GRADIENT
    assert not model.weight.isnan().any()


def test_one_bad_micro_batch_condemns_the_update_where_the_loss_is_not_read():
    step = make(check="after-backward")
    before = snapshot(step)
    step([torch.ones(2, 3), torch.full((2, 3), NAN)])
    assert same(before, step)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "16-true"])
def test_one_bad_micro_batch_alone_is_left_out_and_the_others_weigh_what_they_should(precision):
    good = [torch.randn(3, 3), torch.randn(5, 3)]
    steps = [make(precision, optimizer=torch.optim.SGD) for _ in range(2)]
    for step in steps:
        while not step(torch.ones(4, 3)).applied:
            pass
    plain = steps[0](good)
    out = steps[1]([good[0], torch.full((2, 3), NAN), good[1]])
    assert bool(out.applied) and out.left_out == (1,) and math.isfinite(out.loss)
    tolerance = 1e-6 if precision == "32-true" else 2e-2
    assert out.loss.item() == pytest.approx(plain.loss.item(), rel=tolerance)
    for ours, theirs in zip(snapshot(steps[1]), snapshot(steps[0]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    skip = steps[1].sentinel.skips[-1]
    assert skip.made and skip.micro_batches == (1,) and math.isnan(skip.loss)
    assert skip.reason == f"micro-batch 1 was left out of update {skip.step}: its loss was nan"
    assert steps[1].sentinel.skipped == steps[0].sentinel.skipped  # the update was made
    assert steps[1].sentinel.faults == 1


def test_a_loss_that_is_not_finite_has_no_backward():
    step = make()
    backwards = []
    step.model.weight.register_hook(lambda gradient: backwards.append(1))
    out = step(torch.full((4, 3), NAN))
    assert not backwards and not bool(out.applied) and math.isnan(out.grad_norm)
    step(torch.ones(4, 3))
    assert backwards


def test_whose_gradient_was_at_fault_is_told():
    torch.manual_seed(0)
    model = nn.ModuleDict({"good": nn.Linear(3, 1, bias=False), "bad": nn.Linear(3, 1, bias=False)})
    nn.init.zeros_(model["bad"].weight)
    step = fl.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), precision="32-true",
                        loss=lambda m, b: m["good"](b).sum() + m["bad"](b).square().sum().sqrt())  # fmt: skip
    step(torch.ones(2, 3))
    skip = step.sentinel.skips[0]
    assert skip.what is What.GRADIENT and skip.parameters == ("bad.weight",)
    assert skip.reason.endswith(": bad.weight")


def test_masters_are_named_like_the_weights():
    step = make("16-true")
    step.loss = lambda m, b: (m(b).float().sum() - m(b).float().sum()).sqrt()
    while step.scaling.current() > 1.0:
        step(torch.ones(2, 3))
    step(torch.ones(2, 3))
    assert set(step.sentinel.skips[-1].parameters) == {"weight", "bias"}


def test_overflow_at_a_scale_of_one_is_a_fault():
    step = make("16-mixed", max_overflows_in_a_row=100, max_faults_in_a_row=2)
    step.loss = lambda m, b: m(b).float().sum() * 1e30
    with pytest.raises(NonFiniteError, match=r"2 skipped updates in a row: the gradient norm was inf"):
        for _ in range(40):
            step(torch.ones(4, 3))
    assert step.scaling.current() <= 1.0


def test_faults_are_bounded_in_all():
    step = make(max_faults=3)
    with pytest.raises(NonFiniteError, match=r"stopped after 3 faults in all, the last: the loss was nan at update 5"):
        for value in (NAN, 1, NAN, 1, NAN):
            step(torch.full((4, 3), float(value)))


def test_stop_stops_at_the_first():
    step = make(on_fault="stop")
    with pytest.raises(NonFiniteError, match="stopped at the first fault: the loss was nan at update 1"):
        step(torch.full((4, 3), INF))


@pytest.mark.parametrize(("key", "value", "said"), [("on_fault", "ignore", "skip, rollback, stop, heal"),
                                                    ("check", "never", "auto, before-backward"),
                                                    ("max_rollbacks", 0, "1 or more"), ("max_rollbacks", None, "1 or"),
                                                    ("snapshot_every", 2.5, "whole"), ("snapshot_every", True, "1 or"),
                                                    ("max_faults", "5", "1 or more, or None"),
                                                    ("sample_every", NAN, "or None")])  # fmt: skip
def test_settings_are_checked(key, value, said):
    with pytest.raises(ConfigError, match=rf"guard\.{key} is .*\nhint: .*{said}"):
        fl.Guard(**{key: value})


def test_overflow_under_loss_scaling_is_routine_and_halves_the_scale():
    step = make("16-mixed")
    batch = torch.full((4, 3), 60.0)  # the output's gradient times 2^16 is beyond 65504
    for _ in range(12):
        step(batch)
    assert step.sentinel.skips[0].what is What.OVERFLOW
    assert not step.sentinel.skips[0].fault
    assert step.scaling.current() < 2**16
    assert bool(step(batch).applied)


def test_stops_after_the_limit_with_the_weights_untouched():
    step = make(max_faults_in_a_row=3)
    before = snapshot(step)
    bad = torch.full((4, 3), NAN)
    step(bad), step(bad)
    with pytest.raises(
        NonFiniteError,
        match=r"stopped after 3 skipped updates in a row: the loss was nan at update 3\nhint: .*max_faults_in_a_row",
    ):
        step(bad)
    assert same(before, step)


def test_a_good_update_starts_the_count_anew():
    step = make(max_faults_in_a_row=2)
    for _ in range(4):
        step(torch.full((4, 3), NAN))
        step(torch.ones(4, 3))
    assert step.sentinel.skipped == 4


def test_collapse_of_the_loss_scale_stops():
    step = make("16-mixed", max_faults_in_a_row=100, max_overflows_in_a_row=4)
    step.loss = lambda m, b: m(b).float().sum() * 1e30
    with pytest.raises(NonFiniteError, match="4 skipped updates in a row: scaled fp16 gradients overflowed"):
        for _ in range(10):
            step(torch.ones(4, 3))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([1.0, 2.0, NAN, INF, -INF, 1e38]), min_size=1, max_size=12))
def test_weights_are_finite_after_any_sequence(values):
    step = make(max_faults_in_a_row=100)
    for value in values:
        step(torch.full((4, 3), value))
        assert all(p.isfinite().all() for p in step.model.parameters())
    assert step.sentinel.skipped == sum(not math.isfinite(v) or v == 1e38 for v in values)


@pytest.mark.parametrize("guard", ["skip", {"on_fault": "skip"}, fl.Guard])
def test_a_guard_that_is_none_is_refused_before_the_model_is_touched(guard):
    model = nn.Linear(3, 1)
    with pytest.raises(ConfigError, match=r"guard is .*\nhint: give fl\.Guard"):
        fl.TrainStep(model, torch.optim.SGD(model.parameters()), "bf16-true", guard=guard)
    assert model.weight.dtype == torch.float32


@pytest.mark.parametrize("loss", [torch.tensor(3e38), torch.tensor(3e38, dtype=torch.float64), torch.tensor(-2e38)])
def test_numbers_that_are_finite_are_so_also_where_their_sum_is_not(loss):
    norm, buffers = torch.tensor(3e38), torch.tensor(0.0)
    sentinel = Sentinel(fl.Guard(), loss_scaling=False)
    assert sentinel.judge(loss, norm) and sentinel.judge(loss, norm, buffers)
    assert sentinel.record(Judged(1, Readback.of([loss, norm, buffers]))) is None and sentinel.noted == 0
    for each in (
        (loss, norm, NAN),
        (loss, NAN, 0.0),
        (NAN, norm, 0.0),
        (loss, INF, 0.0),
        (-INF, torch.tensor(INF), 0.0),
    ):
        loss_now, norm_now, buffers_now = map(torch.as_tensor, each)
        assert not sentinel.judge(loss_now, norm_now, buffers_now)


def test_counters_survive_a_checkpoint():
    step = make(max_faults_in_a_row=3)
    step(torch.full((4, 3), NAN)), step(torch.full((4, 3), NAN))
    other = make(max_faults_in_a_row=3)
    other.load_state_dict(step.state_dict())
    assert other.sentinel.skipped == 2
    with pytest.raises(NonFiniteError):
        other(torch.full((4, 3), NAN))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam])
def test_fused_optimizers_select_on_the_device(optimizer):
    """The path that CUDA takes: the optimizer gets the verdict as a tensor and nobody reads it."""
    plain, selected = nn.Linear(3, 1), nn.Linear(3, 1)
    selected.load_state_dict(plain.state_dict())
    kinds = [optimizer(model.parameters(), lr=0.1, fused=True) for model in (plain, selected)]
    assert can_select(kinds[1])
    for finite in (False, True, False, True):
        for model in (plain, selected):
            model.zero_grad()
            model(torch.ones(2, 3)).square().mean().backward()
        if finite:
            kinds[0].step()
        else:
            selected.weight.grad.fill_(NAN)
        step_by_select(kinds[1], torch.tensor(finite))
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), selected.parameters(), strict=True))
    assert not hasattr(kinds[1], "found_inf")


def test_optimizers_that_cannot_select_are_not_asked_to():
    weights = [torch.zeros(2, requires_grad=True)]
    assert not can_select(torch.optim.SGD(weights, lr=0.1, momentum=0.9, fused=True))
    assert not can_select(torch.optim.AdamW(weights, lr=0.1))


def test_a_fault_of_the_forward_leaves_the_loss_scale_alone():
    step = make("16-mixed")
    while not step(torch.ones(4, 3)).applied:
        pass
    scale = step.scaling.current()
    step(torch.full((4, 3), NAN))
    assert step.scaling.current() == scale


@pytest.mark.parametrize("bad", [0, 1])
def test_stop_leaves_the_weights_alone_also_where_one_micro_batch_alone_is_bad(bad):
    step = make(on_fault="stop")
    step(torch.ones(2, 3))
    before = snapshot(step)
    batches = [torch.ones(2, 3), torch.ones(2, 3)]
    batches[bad] = torch.full((2, 3), NAN)
    with pytest.raises(NonFiniteError, match="stopped at the first fault: the loss was nan at update 2"):
        step(batches)
    assert same(before, step) and all(p.grad is None for p in step.model.parameters())


@pytest.mark.parametrize(("scale", "what"), [(1.0, What.GRADIENT), (2.0, What.OVERFLOW), (2.0**-8, What.GRADIENT)])
def test_a_scale_that_is_read_from_the_device_tells_fault_and_routine_apart(scale, what):
    """As on CUDA, where the scale is the last of the numbers that are read a step later; it is not judged itself."""
    sentinel = Sentinel(fl.Guard(), loss_scaling=True)
    reading = Readback.of([torch.tensor(number) for number in (0.5, NAN, scale)])
    judged = Judged(1, reading, scale_read=True)
    assert sentinel.record(judged).what is what and judged.scale == scale
    fine = Readback.of([torch.tensor(number) for number in (0.5, 0.5, float("inf"))])
    assert sentinel.record(Judged(2, fine, scale_read=True)) is None


@pytest.mark.parametrize("guard", [{"on_fault": "stop"}, {"max_faults_in_a_row": 1}, {"max_faults": 1}])
@pytest.mark.parametrize("late", [False, True])
def test_what_is_said_of_the_weights_at_a_stop_is_true(monkeypatch, guard, late):
    """As on CUDA: the update behind the fault is made before the verdict is read. Where it is read at once, none is."""
    monkeypatch.setattr(Readback, "waits", property(lambda reading: True))
    step, good = make(check="after-backward", **guard), torch.ones(2, 3)
    step(good)
    before = step.model.weight.detach().clone()
    step(good * NAN)
    with pytest.raises(NonFiniteError) as stopped:
        step(good) if late else step.read_verdict()
    assert torch.equal(step.model.weight, before) is not late
    assert "the weights are as before it" in stopped.value.hint or guard == {"max_faults_in_a_row": 1}
    assert ("or one good update on" in stopped.value.hint) is late
