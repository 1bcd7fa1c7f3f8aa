"""Whole models under a target's rules: fake and real, forward and backward, and nothing left behind."""

import pytest
import torch
from target_ops import Ops
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

import floatline as fl
import zoo
from floatline.hardware import Hardware, lookup
from floatline.observe.target import on_target
from floatline.observe.trace import trace

BF16, FP16 = torch.bfloat16, torch.float16
KERNELS = {"t4": "efficient", "a100": "flash", "h100": "cudnn"}


def backward(model, batch, dtype):
    with torch.autocast("cpu", dtype=dtype):
        loss = zoo.default_loss(model, batch)
    loss.backward()
    return loss


def fake_text(rows=2, length=8):
    ids = torch.zeros(rows, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize(("gpu", "dtype"), [("t4", FP16), ("a100", BF16), ("a100", FP16), ("h100", BF16)])
def test_gpt2_on_fake_tensors_runs_the_gpus_kernels(gpu, dtype):
    with FakeTensorMode(), on_target(lookup(gpu)):
        model = zoo.gpt2()
        optimizer = torch.optim.AdamW(model.parameters())
        with Ops() as ops:
            loss = backward(model, fake_text(), dtype)
            optimizer.step()
    name = f"_scaled_dot_product_{KERNELS[gpu]}_attention"
    assert ops.names.count(name) == ops.names.count(f"{name}_backward") == 3
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert "_foreach_sqrt" in ops.names


def test_gpt2_on_a_t4_in_bf16_has_the_matrix_of_all_pairs():
    with FakeTensorMode(), on_target(lookup("t4")), Ops() as ops:
        backward(zoo.gpt2(), fake_text(), BF16)
    assert not any(name.startswith("_scaled_dot_product") for name in ops.names)


@pytest.mark.parametrize(("gpu", "dtype"), [("t4", FP16), ("a100", BF16), ("h100", BF16)])
@pytest.mark.parametrize("name", ["gpt2", "qwen3_vl", "tied", "conv", "mlp"])
def test_models_on_real_tensors_train_as_without_the_rules(name, gpu, dtype):
    case = next(case for case in zoo.CASES if case.name == name)
    loss = case.loss or zoo.default_loss

    def gradients():
        model = case.build()
        with torch.autocast("cpu", dtype=dtype):
            value = loss(model, case.batch(0))
        value.backward()
        return value.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain_loss, plain = gradients()
    with on_target(lookup(gpu)):
        target_loss, target = gradients()
    torch.testing.assert_close(target_loss.float(), plain_loss.float(), rtol=0.03, atol=0.01)
    assert target.keys() == plain.keys()
    for key in plain:
        scale = plain[key].abs().max().clamp(min=1e-3)
        assert (target[key] - plain[key]).abs().max() <= 0.1 * scale, key


def test_qwen3_vl_on_fake_tensors_after_its_integers():
    """The text side alone: the image side reads its grids, which the trace keeps real."""
    with FakeTensorMode(), on_target(lookup("a100")), Ops() as ops:
        model = zoo.qwen3_vl().model.language_model
        hidden = torch.empty(2, 8, 32, requires_grad=True)
        with torch.autocast("cpu", dtype=BF16):
            positions = torch.arange(8).expand(3, 2, 8)
            out = model(inputs_embeds=hidden, position_ids=positions, use_cache=False).last_hidden_state
        out.float().sum().backward()
    assert "_scaled_dot_product_flash_attention_backward" in ops.names
    assert "_fused_rms_norm_backward" not in ops.names  # Hugging Face writes the norm out


@pytest.mark.parametrize(
    ("gpu", "precision", "kernels"),
    [
        ("t4", "16-mixed", {"efficient"}),
        ("a100", "bf16-mixed", {"flash", "efficient"}),
        ("h100", "bf16-true", {"cudnn"}),
    ],
)
def test_qwen3_vl_with_images_is_traced_with_the_gpus_kernels(gpu, precision, kernels):
    """The tower's attention has no mask, the text's has one for its padding, which flash does not take."""
    case = next(case for case in zoo.CASES if case.name == "qwen3_vl")
    work = fl.Workload(model=case.build, batch=lambda: case.batch(0), optimizer=torch.optim.AdamW)
    with on_target(lookup(gpu)):
        ops = {op.removeprefix("aten.") for _, op, *_ in trace(work, hardware=gpu, precision=precision).costs}
    backwards = {f"_scaled_dot_product_{kernel}_attention_backward" for kernel in kernels}
    assert {op for op in ops if op.startswith("_scaled_dot_product") and op.endswith("_backward")} == backwards
    assert "_foreach_sqrt" in ops


def test_an_island_without_autocast_stays_fp32():
    with FakeTensorMode(), on_target(lookup("a100")):
        layer, x = nn.Linear(4, 4), torch.empty(2, 4)
        with torch.autocast("cpu", dtype=BF16):
            assert layer(x).dtype == BF16
            with torch.autocast("cpu", enabled=False):
                assert layer(x).dtype == torch.float32 and layer(x).exp().dtype == torch.float32


def signature():
    """What a mixture of everything that the rules touch runs, on real and on fake tensors."""
    names = []
    for around in (FakeTensorMode(), torch.enable_grad()):
        with around, Ops() as ops:
            layer = nn.Linear(8, 8)
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
            with torch.autocast("cpu", dtype=BF16):
                x = F.dropout(layer(torch.ones(1, 2, 4, 8)), 0.5)
                x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
                x = F.rms_norm(x.exp().softmax(-1), (8,))
            x.float().sum().backward()
            optimizer.step()
        names.append(ops.names)
    return names


def test_nothing_is_left_behind_and_a_cpu_changes_nothing():
    before = signature()
    with on_target(Hardware(name="cpu", kind="cpu")):
        assert signature() == before
    with on_target(lookup("a100")):
        outer = signature()
        with pytest.raises(ZeroDivisionError), on_target(lookup("t4")):
            assert signature()[0] != outer[0]
            _ = 1 / 0
        assert signature() == outer
    assert outer != before
    assert signature() == before


def test_contexts_may_end_in_any_order():
    before = signature()
    outer, inner = on_target(lookup("a100")), on_target(lookup("h100"))
    outer.__enter__()
    within = signature()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert signature() != before
    inner.__exit__(None, None, None)
    assert signature() == before != within
