"""The meter: its shadows are the fp64 step, whatever the lower format does; each op is measured on exact inputs."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from floatline.observe.error import metering
from floatline.precision import Policy
from floatline.precision.apply import apply_precision

POLICIES = ("bf16-mixed", "16-mixed", "bf16-true", "16-true")


class Block(nn.Module):
    """Views, in-place ops, indexing, a norm, attention, casts by hand."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.register_buffer("average", torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        mixed = self.out(mixed.contiguous())
        scale = mixed.float().square().mean(-1, keepdim=True).add_(1e-6).rsqrt()
        mixed = (mixed.float() * scale).to(x.dtype)
        with torch.no_grad():
            self.average.lerp_(mixed.mean((0, 1)).to(self.average.dtype), 0.1)
        x = x + mixed
        x[:, 0] *= 0.5
        return x.clone().masked_fill_(x > 100, 0.0)


def step(model, x, y, policy):
    """Run it under a meter; returns the meter and the loss, with the gradients on the model."""
    exact = {name: tensor.detach().double() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    applied = apply_precision(model, Policy.parse(policy))
    with metering(model) as meter:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            meter.shadows.set(tensor, exact[name].clone())
        meter.enter("forward")
        with applied.autocast():
            loss = F.cross_entropy(model(x).mean(1), y)
        meter.enter("backward")
        loss.backward()
    return meter, loss


@pytest.mark.parametrize("policy", POLICIES)
def test_shadows_are_the_step_in_fp64(policy):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    x, y = torch.randn(3, 5, 16), torch.tensor([0, 1, 2])
    twin = copy.deepcopy(model).double()
    torch.set_default_dtype(torch.float64)
    try:
        exact = F.cross_entropy(Wide(twin)(x.double()).mean(1), y)
    finally:
        torch.set_default_dtype(torch.float32)
    exact.backward()
    meter, loss = step(model, x, y, policy)
    assert meter.shadows.of(loss).item() == pytest.approx(exact.item(), rel=1e-6)
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters()):
        shadow = meter.shadows.of(parameter.grad)
        assert torch.allclose(shadow, other.grad, rtol=1e-5, atol=1e-8 + 1e-5 * float(other.grad.abs().max())), name
        assert parameter.grad.dtype != torch.float64
    for (_, buffer), other in zip(model.named_buffers(), twin.buffers()):
        assert torch.allclose(meter.shadows.of(buffer), other, rtol=1e-5, atol=1e-8)


class Wide(nn.Module):
    """The twin keeps its casts to fp32, which is why it agrees to 1e-6 only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_step_itself_is_not_changed(policy):
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    other = copy.deepcopy(model)
    x, y = torch.randn(3, 5, 16), torch.tensor([0, 1, 2])
    _, loss = step(model, x, y, policy)
    applied = apply_precision(other, Policy.parse(policy))
    with applied.autocast():
        plain = F.cross_entropy(other(x).mean(1), y)
    plain.backward()
    assert torch.equal(loss, plain)
    for one, two in zip(model.parameters(), other.parameters()):
        assert torch.equal(one.grad, two.grad)


def readings_of(function, *inputs):
    with metering() as meter:
        meter.enter("forward")
        out = function(*inputs)
    return meter, out


def test_the_local_error_is_that_of_rounded_exact_inputs():
    x = torch.rand(1000) + 1
    meter, _ = readings_of(lambda: x.bfloat16() * 3)
    cast, product = meter.readings
    assert (cast.ran, product.ran) == ("_to_copy", "mul")
    assert 0.5e-3 < cast.measure.error < 3e-3 and cast.measure.error_fp32 == 0
    exact = x.double() * 3
    by_hand = (x.bfloat16() * 3).double() - exact
    assert product.measure.error == pytest.approx(float(by_hand.square().mean().sqrt() / exact.square().mean().sqrt()))


def test_local_and_propagated_errors_are_apart():
    x = torch.full((64,), 1000.0) + torch.rand(64)
    meter, out = readings_of(lambda: (x.bfloat16() - 1000).float() * 2)
    subtraction = next(r for r in meter.readings if r.ran == "sub")
    product = next((r for r in meter.readings if r.ran == "mul"), None)
    assert subtraction.measure.error > 0.5  # the input's rounding, made large by the difference
    assert product is None and meter.reached(out) > 0.5  # fp32 arithmetic on what is wrong already


def test_overflow_headroom_underflow_and_subnormals():
    meter, _ = readings_of(lambda: torch.tensor([7e4, 1.0]).half())
    over = meter.readings[0].measure
    assert over.error == math.inf and over.overflow == 0.5 and over.headroom == pytest.approx(-0.0958, abs=1e-3)
    meter, _ = readings_of(lambda: torch.tensor([1e-9, 1e-6, 1.0, 0.0]).half())
    under = meter.readings[0].measure
    assert under.underflow == pytest.approx(1 / 3) and under.subnormal == pytest.approx(1 / 3)
    assert under.underflow_error < 1e-8


def test_fills_of_masks_are_no_overflow():
    fill = torch.tensor([0.0, torch.finfo(torch.float32).min, -math.inf])
    meter, _ = readings_of(lambda: fill.half() + torch.ones(3).half())
    assert all(r.measure.overflow == 0 and math.isfinite(r.measure.error) for r in meter.readings)
    edge = torch.tensor([-65504.0, 0.0]).half()
    meter, _ = readings_of(lambda: edge - 5)  # rounds to the end, not beyond it
    assert meter.readings[0].measure.overflow == 0


def test_decisions_that_flip_are_counted_and_shadows_go_on_with_the_exact_ones():
    x = torch.tensor([1.001, 0.999, 2.0, 0.5])  # 1.001 and 0.999 both are 1 in bf16
    meter, out = readings_of(lambda: torch.where(x.bfloat16() > 1, 10.0, 20.0))
    comparison = next(r for r in meter.readings if r.ran == "gt")
    assert (comparison.flipped, comparison.flipped_here, comparison.decisions) == (1, 1, 4)
    assert out.tolist() == [20.0, 20.0, 10.0, 20.0] and meter.shadows.of(out).tolist() == [10.0, 20.0, 10.0, 20.0]


def test_in_place_ops_write_the_shadow_too():
    def program():
        value = torch.rand(4, 3).bfloat16()
        value /= value.sum(-1, keepdim=True)
        value[1:, 0] += 1 / 3
        return value

    torch.manual_seed(1)
    meter, out = readings_of(program)
    torch.manual_seed(1)
    exact = torch.rand(4, 3).double()
    exact /= exact.sum(-1, keepdim=True)
    exact[1:, 0] += 1 / 3
    assert torch.allclose(meter.shadows.of(out), exact, rtol=1e-12)


def test_a_cast_that_is_written_into_leaves_what_was_cast_alone():
    torch.manual_seed(0)
    x = torch.rand(8)

    def program():
        first = x * 3
        half = first.bfloat16()
        half[2:4] += 1
        half.mul_(0.5)
        return torch.stack([first, half.float()])

    meter, out = readings_of(program)
    exact = x.double() * 3
    half = exact.clone()
    half[2:4] += 1
    assert torch.allclose(meter.shadows.of(out), torch.stack([exact, half * 0.5]), rtol=1e-12)


def test_random_numbers_are_exact_and_dropout_keeps_its_mask():
    torch.manual_seed(0)
    x = torch.rand(200) + 1
    meter, out = readings_of(lambda: F.dropout(x.bfloat16(), 0.25))
    kept = out != 0
    assert torch.allclose(meter.shadows.of(out)[kept], x.double()[kept] / 0.75) and (~kept).any()


def test_what_fp32_cannot_compute_either_is_noise():
    x = torch.rand(64)
    meter, _ = readings_of(lambda: (x.bfloat16() - x.double().bfloat16()).float().half())
    assert all(r.measure.sound for r in meter.readings)
    logits = torch.randn(4, 8)
    gradient = torch.softmax(logits.double(), -1) - torch.softmax(logits.double(), -1).clone()
    assert float(gradient.abs().max()) == 0
    values = torch.randn(1000)
    centred = (values.double() - values.double().mean()).float()
    meter, _ = readings_of(lambda: centred.bfloat16().sum().half())
    total = [r for r in meter.readings if r.ran == "sum"]
    assert total and not total[0].measure.sound
    assert not any(r.ran == "_to_copy" and r.measure.numel == 1 for r in meter.readings)


def test_rows_name_module_line_and_phase():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    meter, _ = step(model, torch.randn(2, 4, 16), torch.tensor([0, 1]), "bf16-mixed")
    forward = next(r for r in meter.readings if r.ran == "addmm" and r.phase == "forward")
    assert forward.spot.module == "0.qkv" and forward.spot.user.file == __file__
    backward = {r.spot.module for r in meter.readings if r.phase == "backward" and r.ran == "mm"}
    assert {"0.qkv", "0.out", "1.qkv", "1.out"} <= backward
    assert forward.flops == 2 * 8 * 16 * 48


def test_cumulative_sums_lose_increments():
    ones = torch.ones(1000)
    meter, _ = readings_of(lambda: ones.bfloat16().cumsum(0))
    total = next(r for r in meter.readings if r.ran == "cumsum")
    assert total.stalled == pytest.approx(744 / 1000, abs=0.01)  # 256 + 1 = 256 in bf16
    meter, _ = readings_of(lambda: ones.half().cumsum(0))
    assert next(r for r in meter.readings if r.ran == "cumsum").stalled == 0


@settings(max_examples=40, deadline=None)
@given(
    ops=st.lists(
        st.sampled_from(["exp", "sin", "tanh", "square", "sqrt", "add", "mul_", "sum", "cumsum", "t"]), max_size=8
    ),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_any_chain_of_ops_has_its_fp64_value_as_shadow(ops, dtype, seed):
    start = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)) / 4 + 0.1

    def run(x):
        for op in ops:
            if op == "add":
                x = x + 0.3
            elif op == "mul_":
                x = x.clone()
                x.mul_(0.7)
            elif op == "sum":
                x = x + x.sum(0, keepdim=True)
            elif op == "cumsum":
                x = x.cumsum(1)
            elif op == "t":
                x = x.t()
            elif op == "sqrt":
                x = x.abs().sqrt()
            elif op == "exp":
                x = (-x).exp()
            else:
                x = getattr(x, op)()
        return x

    with metering() as meter:
        meter.enter("forward")
        out = run(start.to(dtype))
    assert torch.allclose(meter.shadows.of(out), run(start.double()), rtol=1e-12, atol=1e-15)


def test_factories_that_are_called_without_a_format_are_exact():
    meter, out = readings_of(
        lambda: torch.linspace(0, 1, 8).half() @ torch.full((8,), 0.1).half() + torch.arange(0, 1, 0.3).sum()
    )
    exact = torch.linspace(0, 1, 8, dtype=torch.float64) @ torch.full((8,), 0.1, dtype=torch.float64)
    exact = exact + torch.arange(0, 1, 0.3, dtype=torch.float64).sum()
    assert meter.shadows.of(out).item() == pytest.approx(exact.item(), rel=1e-12) and not meter.unmeasured


def test_a_fill_of_fp16_with_scores_added_is_no_overflow():
    scores = torch.tensor([-40.0, 3.0]).half() + torch.tensor([torch.finfo(torch.float16).min, 0.0]).half()
    assert torch.isinf(scores[0])
    meter, _ = readings_of(
        lambda: torch.tensor([-40.0, 3.0]).half() + torch.tensor([torch.finfo(torch.float16).min, 0.0]).half()
    )
    assert all(r.measure.overflow == 0 for r in meter.readings)
    meter, _ = readings_of(lambda: torch.tensor([-300.0, 3.0]).half() * 300)
    assert any(r.measure.overflow > 0 for r in meter.readings)


def test_a_cast_of_a_part_keeps_its_value_when_the_whole_is_written_later():
    x = torch.ones(8) * 1.001

    def program():
        part = x[:4].to(torch.bfloat16)
        x[:4].mul_(3)
        return part

    meter, out = readings_of(program)
    assert torch.allclose(meter.shadows.of(out), torch.full((4,), 1.001, dtype=torch.float64), rtol=1e-6)


def test_one_value_that_leaves_fp16_is_seen_in_a_large_cast():
    x = torch.full((200_000,), 0.1)
    x[123_457] = 1e5
    meter, _ = readings_of(lambda: x.half())
    assert next(reading for reading in meter.readings if reading.ran == "_to_copy").measure.overflow > 0
