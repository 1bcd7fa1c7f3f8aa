"""Freezing, LoRA and the chunked loss together: each pair, and all three."""

import pytest
import torch

import floatline as fl
from floatline.errors import ConfigError
from floatline.techniques.adapters.state import adapter_state, plain_state_dict
from floatline.techniques.chunked_loss import ChunkedLoss
from floatline.techniques.freezing import Freezing
from floatline.techniques.lora import Lora

FROZEN = {"gpt2": "transformer.h.0", "qwen3_vl": "model.visual", "tied": "layers.0"}
TOLERANCES = {"32-true": (1e-5, 1e-5), "bf16-mixed": (3e-2, 3e-3), "16-mixed": (2e-2, 2e-3)}


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def train(case, techniques, precision="32-true", batches=None):
    model = case.build()
    torch.manual_seed(3)  # adapters are drawn alike
    step = fl.TrainStep(model, sgd, precision=precision, techniques=techniques)
    losses = [step(batch).loss for batch in batches or [case.batch(seed) for seed in range(3)]]
    return torch.stack(losses), model, step


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", FROZEN)
@pytest.mark.parametrize("others", ["freezing", "lora", "lora on the head", "freezing and lora"])
def test_the_loss_in_chunks_under_the_others(zoo, name, precision, others):
    case = zoo[name]
    head = (case.head,) if name != "qwen3_vl" else ("lm_head", "q_proj")
    techniques = {
        "freezing": [Freezing(modules=(FROZEN[name],))],
        "lora": [Lora(rank=2)],
        "lora on the head": [Lora(rank=2, targets=head, dropout=0.0)],
        "freezing and lora": [Freezing(modules=(FROZEN[name],)), Lora(rank=2)],
    }[others]
    expected, plain, _ = train(case, techniques, precision)
    losses, model, step = train(case, [ChunkedLoss(chunk_tokens=7), *techniques], precision)
    rtol, atol = TOLERANCES[precision]
    torch.testing.assert_close(losses, expected, rtol=rtol, atol=atol)
    for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.requires_grad == q.requires_grad
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
    assert step.stack.facts()["chunked_loss.losses"] == 3 and "chunked_loss.whole" not in step.stack.facts()


def test_micro_batches_with_all_three(zoo):
    case = zoo["qwen3_vl"]
    techniques = [Freezing(modules=("model.visual",)), Lora(rank=2)]
    batches = [[case.batch(0), case.batch(1)], [case.batch(2)]]
    expected, _, _ = train(case, techniques, batches=batches)
    losses, _, _ = train(case, [*techniques, ChunkedLoss(chunk_tokens=5)], batches=batches)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)


def test_lora_leaves_a_frozen_tower_alone(zoo):
    case = zoo["qwen3_vl"]
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    model = case.build()
    step = fl.TrainStep(
        model, sgd, precision="32-true", techniques=["lora(rank=2)", "freezing(modules=['model.visual'])"]
    )
    assert not any("visual" in name for name in adapter_state(model))
    assert any("layers that freezing froze are not adapted" in note for note in step.stack.notes)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = model.model.visual(case.batch(0)["pixel_values"], grid_thw=case.batch(0)["image_grid_thw"])
    assert saved == [] and not features[0].requires_grad
    assert step(case.batch(0)).applied


def test_lora_under_what_is_frozen_gets_gradients(zoo):
    """Adapters in the first layer, the second layer frozen above it."""
    case = zoo["gpt2"]
    techniques = [Freezing(modules=("transformer.h.1",)), Lora(targets=("transformer.h.0.attn.*",), rank=2)]
    _, model, _ = train(case, techniques)
    _, reference, _ = train(case, techniques[1:])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reference.parameters(), strict=True))
    assert all(bool(value.any()) for key, value in adapter_state(model).items() if "lora_B" in key)


def test_contradictions_between_freezing_and_lora(zoo):
    case = zoo["qwen3_vl"]
    with pytest.raises(
        ConfigError, match=r"all 12 targets .* are frozen by freezing\nhint: drop freezing, lora freezes"
    ):
        train(case, [Freezing(modules=("**",)), Lora()])
    both = [Freezing(modules=("model.visual",)), Lora(train_also=("model.visual.merger",))]
    with pytest.raises(
        ConfigError, match=r"lora.train_also names model.visual.merger.*, which freezing froze\nhint: add it"
    ):
        train(case, both)
    kept = [Freezing(modules=("model.visual",), keep=("model.visual.merger",)), both[1]]
    _, model, _ = train(case, kept)
    assert model.model.visual.merger.norm.weight.requires_grad


@pytest.mark.parametrize("name", FROZEN)
def test_undo_of_all_three(zoo, name):
    case = zoo[name]
    model = case.build()
    before = {
        n: (m, dict(m.__dict__), {k: p.requires_grad for k, p in m.named_parameters()})
        for n, m in model.named_modules()
    }
    techniques = [ChunkedLoss(), Lora(rank=2, targets=(case.head,)), Freezing(modules=(FROZEN[case.name],))]
    step = fl.TrainStep(model, sgd, precision="bf16-true", techniques=techniques)
    assert [technique.name for technique in step.stack.techniques] == ["freezing", "lora", "chunked_loss"]
    step.undo()
    after = {
        n: (m, dict(m.__dict__), {k: p.requires_grad for k, p in m.named_parameters()})
        for n, m in model.named_modules()
    }
    assert after == before


def test_the_base_s_weights_are_as_they_were(zoo):
    case = zoo["tied"]
    _, model, _ = train(case, [ChunkedLoss(chunk_tokens=3), Lora(targets=("head",), rank=2)])
    start = case.build().state_dict()
    assert all(torch.equal(value, start[key]) for key, value in plain_state_dict(model).items())
