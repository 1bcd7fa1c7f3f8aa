"""Policies on models: weights, autocast, islands, undo."""

import copy

import pytest
import torch
from torch import nn

from floatline.errors import PrecisionError
from floatline.precision import Policy, apply_precision


class Spy(nn.Linear):
    """A linear layer that remembers what it computed in."""

    def forward(self, x, scale=None):
        out = super().forward(x)
        self.seen = (x.dtype, out.dtype)
        return out


def net():
    torch.manual_seed(0)
    return nn.Sequential(Spy(4, 4), Spy(4, 4), Spy(4, 4))


def run(policy, model=None):
    model = model or net()
    applied = apply_precision(model, Policy.parse(policy))
    with applied.autocast():
        out = model(torch.ones(2, 4))
    return model, applied, out


F32, B16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("policy", "weights", "computed"),
    [
        ("32-true", [F32] * 3, [F32] * 3),
        ("bf16-mixed", [F32] * 3, [B16] * 3),
        ("16-mixed", [F32] * 3, [F16] * 3),
        ("bf16-true", [B16] * 3, [B16] * 3),
        ("16-true", [F16] * 3, [F16] * 3),
        ("bf16-mixed; 1=32", [F32] * 3, [B16, F32, B16]),
        ("16-mixed; 1=bf16", [F32] * 3, [F16, B16, F16]),
        ("bf16-true; 1=32", [B16, F32, B16], [B16, F32, B16]),
        ("32-true; 1=bf16", [F32] * 3, [F32, B16, F32]),
    ],
)
def test_every_layer_computes_in_its_format(policy, weights, computed):
    model, _, _ = run(policy)
    assert [layer.weight.dtype for layer in model] == weights
    assert [layer.seen[1] for layer in model] == computed


@pytest.mark.parametrize("policy", ["bf16-mixed; 1=32", "bf16-true", "bf16-true; 1=32", "16-true; *=32"])
def test_undo_restores_forward_and_formats(policy):
    model, applied, _ = run(policy)
    applied.undo()
    assert all("forward" not in vars(layer) for layer in [model, *model])
    assert {parameter.dtype for parameter in model.parameters()} == {F32}
    assert model(torch.ones(2, 4)).dtype == F32
    assert applied.touched == {}


def test_mixed_undo_is_exact():
    before = [p.clone() for p in net().parameters()]
    model, applied, _ = run("bf16-mixed; 0=32")
    applied.undo()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_nested_rules_the_inner_one_wins():
    model = nn.Sequential(nn.Sequential(Spy(4, 4), Spy(4, 4)), Spy(4, 4))
    applied = apply_precision(model, Policy.parse("bf16-true; 0=32; 0.1=bf16"))
    model(torch.ones(1, 4))
    assert [model[0][0].seen[1], model[0][1].seen[1], model[1].seen[1]] == [F32, B16, B16]
    assert applied.touched == {"0": "32", "0.1": "bf16"}


def test_an_island_keeps_values_that_overflow_fp16():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1e3)
        model[1].weight.fill_(1e-3)
    x = torch.full((1, 1), 1e3)
    with apply_precision(copy.deepcopy(model), Policy.parse("16-mixed")).autocast():
        pass
    plain, island = copy.deepcopy(model), copy.deepcopy(model)
    with apply_precision(plain, Policy.parse("16-mixed")).autocast():
        assert plain(x).isinf().all()
    with apply_precision(island, Policy.parse("16-mixed; *=32")).autocast():
        assert island(x).item() == pytest.approx(1e3)


def test_a_deep_copy_of_a_patched_model_is_independent():
    model, _, _ = run("bf16-mixed; 1=32")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin[1].weight.zero_()
    assert not torch.equal(model(torch.ones(1, 4)), twin(torch.ones(1, 4)))


def test_gradients_flow_through_islands():
    model, _applied, out = run("bf16-mixed; 1=32")
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == F32 for p in model.parameters())


def test_batch_norm_statistics_and_rotary_tables_stay_fp32():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.register_buffer("inv_freq", torch.ones(4))
    model.register_buffer("offset", torch.ones(4))
    apply_precision(model, Policy.parse("bf16-true"))
    assert model[1].running_mean.dtype == model[1].weight.dtype == model.inv_freq.dtype == F32
    assert model.offset.dtype == model[0].weight.dtype == B16
    assert model[1].num_batches_tracked.dtype == torch.int64
    model(torch.randn(8, 4)).float().sum().backward()


def test_targets_keep_their_format_under_true():
    class Keep(nn.Linear):
        def forward(self, x, labels=None):
            self.label_format = labels.dtype
            return super().forward(x)

    model = Keep(4, 4)
    apply_precision(model, Policy.parse("bf16-true"))
    model(x=torch.ones(1, 4), labels=torch.ones(1, 4))
    assert model.label_format == F32


def test_32_true_lifts_weights_that_were_loaded_lower():
    model = net().to(B16)
    apply_precision(model, Policy.parse("32-true"))
    assert {parameter.dtype for parameter in model.parameters()} == {F32}


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    applied = apply_precision(model, Policy.parse("bf16-true"))
    assert model[0].weight is model[1].weight
    applied.undo()
    assert model[0].weight is model[1].weight and model[0].weight.dtype == F32


@pytest.mark.parametrize(
    ("policy", "half", "way_out"), [("16-mixed", F16, "16-true"), ("bf16-mixed", B16, "bf16-true")]
)
def test_trainable_half_weights_under_mixed_are_refused(policy, half, way_out):
    with pytest.raises(PrecisionError, match=rf"trainable {half} weights \(0.weight\)(.|\n)*precision={way_out}"):
        apply_precision(net().to(half), Policy.parse(policy))


def test_frozen_half_weights_under_mixed_are_fine():
    model = net()
    model[0].to(B16).requires_grad_(False)
    apply_precision(model, Policy.parse("bf16-mixed"))


def test_tied_weights_with_two_formats_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(PrecisionError, match="0 and 1 share a weight, but the rules give them"):
        apply_precision(model, Policy.parse("bf16-true; 1=32"))
    apply_precision(model, Policy.parse("bf16-true; 0=32; 1=32"))
    assert model(torch.ones(1, 4)).dtype == B16


def test_frozen_half_weights_in_an_fp32_island_are_refused():
    model = net()
    model[0].to(B16).requires_grad_(False)
    with pytest.raises(PrecisionError, match=r"0=32 holds torch.bfloat16 weights \(0.weight\)"):
        apply_precision(model, Policy.parse("bf16-mixed; 0=32"))


def test_a_half_island_leaves_masks_alone():
    """finfo(fp32).min cast to fp16 is -inf, and a row of them makes softmax NaN; autocast casts only what it must."""

    class Attend(nn.Module):
        def forward(self, scores, mask):
            return (scores + mask).softmax(-1)

    model = nn.Sequential()
    model.add_module("attend", Attend())
    model.forward = lambda scores, mask: model.attend(scores, mask)
    applied = apply_precision(model, Policy.parse("16-mixed; attend=bf16"))
    mask = torch.full((1, 3), torch.finfo(F32).min)
    with applied.autocast():
        assert model(torch.zeros(1, 3), mask).isfinite().all()


def test_dataclass_outputs_of_an_island_are_cast_back():
    from dataclasses import dataclass

    @dataclass
    class Out:
        value: torch.Tensor
        name: str = "x"

    class Inner(nn.Linear):
        def forward(self, x):
            return Out(super().forward(x))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = Inner(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.head(self.inner(x).value)

    model = Outer()
    apply_precision(model, Policy.parse("bf16-true; inner=32"))
    assert model(torch.ones(1, 4)).dtype == B16
