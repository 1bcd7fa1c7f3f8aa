"""Every technique on fake CPU tensors on behalf of a GPU: it runs, says what lies on the host, and leaves nothing."""

import gc
import weakref
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import floatline as fl
from floatline.errors import ConfigError, PrecisionError
from floatline.precision import Policy, apply_precision
from floatline.techniques.distributed.groups import fake_ranks, leave_ranks
from floatline.techniques.registry import HOMES
from zoo import Case, Mlp, gpt2, regression, seeded, squares, text

from .fake_tracing import Ledger, Plan

WIDE = Case("wide", seeded(lambda: Mlp(width=128, depth=4)), lambda seed: regression(seed, rows=8), squares)
SMALL_GPT2 = seeded(lambda: gpt2(width=64, depth=2, vocabulary=960))
LONG = Case("long", SMALL_GPT2, lambda seed: text(seed, 48, vocabulary=960))
WEIGHTS = 4 * sum(p.numel() for p in LONG.build().parameters())

RUNS = [
    ("precision(policy='auto')", "t4", "auto", "conv"),
    ("accumulation(micro_batches=2)", "a100", "bf16-mixed", "mlp gpt2"),
    ("checkpointing", "t4", "16-mixed", "conv gpt2"),
    ("checkpointing(every=2)", "a100", "bf16-mixed", "gpt2"),
    ("checkpointing(keep=['matmul'])", "t4", "32-true", "tied"),
    ("checkpointing(keep=['matmul', 'attention'])", "a100", "bf16-mixed", "gpt2"),
    ("checkpointing(budget=0.5) + compile", "a100", "bf16-mixed", "gpt2"),
    ("compile", "t4", "16-mixed", "tied"),
    ("compile(scope='model')", "a100", "32-true", "conv"),
    ("attention", "t4", "16-mixed", "tied"),
    ("attention(kernel='efficient')", "a100", "bf16-mixed", "gpt2"),
    ("attention(kernel='flash')", "a100", "bf16-mixed", "gpt2"),
    ("attention(kernel='math')", "t4", "32-true", "gpt2"),
    ("offload", "t4", "16-true", "mlp"),
    ("offload(min_bytes=0) + checkpointing", "a100", "bf16-true", "conv"),
    ("offload(min_bytes=0, to='disk')", "t4", "16-mixed", "conv qwen3_vl"),
    ("sharding", "a100", "bf16-mixed", "conv tied"),
    ("sharding(cpu_offload=True)", "t4", "16-true", "gpt2"),
    ("sharding(cpu_offload=True) + low_bit_optimizer", "a100", "bf16-mixed", "gpt2"),
    ("sharding + checkpointing + offload(min_bytes=0)", "a100", "bf16-true", "gpt2"),
    ("batching", "t4", "16-mixed", "tied"),
    ("batching(max_tokens=40)", "a100", "bf16-mixed", "gpt2"),
    ("packing", "a100", "bf16-mixed", "gpt2"),
    ("packing(max_tokens=40)", "t4", "16-mixed", "qwen3_vl"),
    ("low_bit_optimizer", "t4", "16-mixed", "wide"),
    ("low_bit_optimizer(bits=4)", "t4", "16-true", "wide"),
    ("low_bit_optimizer(bits='fp8') + optimizer_offload", "h100", "bf16-mixed", "wide"),
    ("low_bit_optimizer(stochastic_rounding=True)", "a100", "bf16-true", "wide"),
    ("optimizer_offload(bucket_bytes=3000)", "t4", "16-mixed", "conv"),
    ("master_weights", "a100", "bf16-true", "conv"),
    ("kahan", "a100", "bf16-true", "conv"),
    ("kahan(library='optimi')", "a100", "bf16-true", "conv"),
    ("kahan(moments='fp32') + optimizer_offload", "a100", "bf16-true", "mlp"),
    ("stochastic_rounding", "a100", "bf16-true", "mlp"),
    ("stochastic_rounding(library='torchao')", "a100", "bf16-true", "mlp"),
    ("optimizer_in_backward", "a100", "bf16-mixed", "conv"),
    ("optimizer_in_backward + low_bit_optimizer", "a100", "bf16-true", "wide"),
    ("freezing(modules=['model.visual'])", "t4", "16-mixed", "qwen3_vl"),
    ("freezing(modules=['stem'])", "a100", "bf16-mixed", "conv"),
    ("lora", "t4", "16-mixed", "qwen3_vl"),
    ("lora(rank=4) + checkpointing + offload(min_bytes=0)", "a100", "bf16-true", "gpt2"),
    ("chunked_loss(chunk_tokens=8)", "t4", "16-mixed", "tied gpt2"),
]


def plan(case, techniques="", hardware="a100", precision="32-true", ranks=4, **settings):
    texts = techniques.split(" + ") if techniques else []
    clip = None if "optimizer_in_backward" in techniques else 1.0
    with fake_ranks(ranks) if "sharding" in techniques else nullcontext():
        return Plan(case, texts, hardware, precision, max_grad_norm=clip, **settings)


def named(model):
    return {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}


def test_every_technique_is_run():
    assert {text.split("(")[0] for row in RUNS for text in row[0].split(" + ")} == set(HOMES)


@pytest.mark.filterwarnings("ignore::floatline.errors.FloatlineWarning")
@pytest.mark.parametrize("row", RUNS, ids=lambda row: row[0])
def test_two_updates_run_and_can_be_undone(zoo, row):
    techniques, hardware, precision, names = row
    for name in names.split():
        case = {**zoo, "wide": WIDE}[name]
        traced = plan(case, techniques, hardware, precision)
        assert all(isinstance(parameter, FakeTensor) for parameter in traced.model.parameters())
        assert all(isinstance(output.loss, FakeTensor) and output.loss.shape == () for output in traced.outputs)
        assert traced.step.sentinel.skipped == 0 and traced.step.updates == 2
        assert named(traced.model) == named(case.build())  # undo has put modules and parameters back


@pytest.fixture(scope="module")
def plain():
    return plan(LONG)


def test_offload_frees_the_device_and_fills_the_host(plain):
    few, some, many = (plan(LONG, f"offload(min_bytes=0, in_flight={n})") for n in (1, 4, 16))
    assert few.peak < some.peak < many.peak < 0.8 * plain.peak  # as many tensors more on their way
    assert few.facts["offload.peak_bytes"] > 0.5 * (plain.peak - plain.device)
    assert few.host == plain.host == 0 and few.device == plain.device  # after the backward all are gone
    assert few.facts["offload.live_bytes"] == 0 and not few.notes


def test_what_is_away_lies_on_the_host():
    """Between forward and backward."""
    held = []

    def loss(model, batch):
        value = model(**batch).loss
        held.append(ledger.host)
        return value

    ledger = Ledger()
    traced = Plan(replace(LONG, loss=loss), ["offload(min_bytes=0)"], ledger=ledger)
    assert held[1] == pytest.approx(traced.facts["offload.peak_bytes"], rel=0.01) and held[1] > WEIGHTS


def test_offload_to_disk_counts_without_a_file(plain, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: pytest.fail("a file was opened"))
    away = plan(LONG, "offload(min_bytes=0, to='disk')")
    assert away.peak < 0.8 * plain.peak and away.host == 0
    assert away.facts["offload.peak_bytes"] > 0.5 * (plain.peak - plain.device)


def test_optimizer_state_lies_on_the_host_between_updates(plain):
    away = plan(LONG, "optimizer_offload(bucket_bytes=100000)")
    assert plain.device - WEIGHTS > 2 * WEIGHTS and away.device - WEIGHTS < 0.1 * WEIGHTS
    assert away.host == away.facts["optimizer_offload.host_bytes"] > 1.9 * WEIGHTS
    assert plan(LONG, "optimizer_offload(bucket_bytes=100000)", "cpu").host == 0


@pytest.mark.parametrize("bits, share", [(8, 1 / 4), (4, 1 / 8), ("fp8", 1 / 4)])
def test_low_bit_state_is_small(bits, share):
    pytest.importorskip("torchao")
    plain, low = plan(WIDE, hardware="h100"), plan(WIDE, f"low_bit_optimizer(bits={bits!r})", "h100")
    weights = plain.idle
    assert low.device - weights == pytest.approx(share * (plain.device - weights), rel=0.2)  # small tensors stay fp32


def test_a_low_bit_step_is_one_kernel_where_it_would_be_compiled():
    """On Pascal torchao's step is eager, with its copies of the largest parameter; from Volta on it has none."""
    pytest.importorskip("torchao")
    eager, compiled = plan(WIDE, "low_bit_optimizer", "p100"), plan(WIDE, "low_bit_optimizer", "t4")
    largest, counters = 4 * 128 * 256, 4 * len(list(WIDE.build().parameters()))
    assert eager.peak - compiled.peak > 5 * largest and 0 <= eager.device - compiled.device <= counters
    assert any("runs eagerly on p100" in note for note in eager.notes)
    assert not any("eagerly" in note for note in compiled.notes)


def test_shards_are_a_share_and_gathered_weights_are_freed(plain):
    whole = plan(LONG, "sharding(reshard_after_forward=False)", ranks=8)
    shards = plan(LONG, "sharding", ranks=8)
    assert shards.idle == pytest.approx(WEIGHTS / 8, rel=0.05)
    assert shards.device == pytest.approx(3 * WEIGHTS / 8, rel=0.1)
    assert shards.peak < whole.peak < plain.peak


@pytest.mark.parametrize("precision, bytes_each", [("32-true", 12), ("16-true", 2 + 12)])
def test_shards_masters_and_state_lie_on_the_host(precision, bytes_each):
    away = plan(LONG, "sharding(cpu_offload=True)", "t4", precision, ranks=8)
    on_device = plan(LONG, "sharding", "t4", precision, ranks=8)
    assert away.host == pytest.approx(bytes_each * WEIGHTS / 4 / 8, rel=0.05)
    gradients = (4 if precision == "32-true" else 2) * WEIGHTS / 4 / 8
    assert away.ledger.host_peak > away.host + 0.95 * gradients
    assert away.idle < 0.01 * WEIGHTS and away.device < 0.05 * WEIGHTS
    assert away.peak < on_device.peak and on_device.host == 0 and not any("changes nothing" in n for n in away.notes)


def test_compile_is_estimated_as_eager(zoo):
    traced = plan(zoo["mlp"], "checkpointing(budget=0.5) + compile")
    assert "compile: not traced: estimated as eager, which keeps at least as many intermediates" in traced.notes
    assert "checkpointing: not traced: fake tensors are not compiled, so nothing is recomputed" in traced.notes
    assert traced.peak == plan(zoo["mlp"]).peak and all(m._compiled_call_impl is None for m in traced.model.modules())


@pytest.mark.parametrize(
    "case, techniques",
    [(LONG, "checkpointing"), (LONG, "chunked_loss(chunk_tokens=8)"), (LONG, "lora"), (WIDE, "optimizer_in_backward")],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_what_saves_memory_saves_it_in_the_plan(case, techniques):
    assert plan(case, techniques).peak < 0.95 * plan(case).peak


def test_the_planned_gpu_decides(zoo):
    assert str(plan(zoo["mlp"], "", "t4", "auto").step.policy) == "16-mixed"
    assert str(plan(zoo["mlp"], "", "a100", "auto").step.policy) == "bf16-mixed"
    with pytest.raises(PrecisionError, match="bf16-mixed cannot run on t4"):
        plan(zoo["mlp"], "", "t4", "bf16-mixed")
    with pytest.raises(ConfigError, match="unknown hardware 'a1000'"):
        plan(zoo["mlp"], "", "a1000")
    fast = plan(zoo["gpt2"], "attention", "t4").notes
    assert any("flash attention kernels start at 8.0" in note for note in fast)


STAND_INS = ["offload(min_bytes=0)", "offload(min_bytes=0, to='disk')", "optimizer_offload(bucket_bytes=3000)",
             "sharding(cpu_offload=True)"]  # fmt: skip


@pytest.mark.parametrize("techniques", STAND_INS)
@pytest.mark.parametrize("name", ["conv", "gpt2", "tied"])
def test_real_tensors_that_stand_for_a_gpus_give_the_plain_numbers(zoo, name, techniques):
    """What a plan watches is the computation itself, so on real tensors it must be right."""
    case, results = zoo[name], []
    for given in ({}, {"techniques": [techniques], "hardware": "a100"}):
        model = case.build()
        step = fl.TrainStep(model, torch.optim.AdamW(model.parameters(), lr=1e-2), "32-true", case.loss, **given)
        losses = [float(step(case.batch(seed)).loss) for seed in range(2)]
        facts = step.stack.facts()
        step.undo()
        results.append((losses, [p.detach().clone() for p in model.parameters()]))
    leave_ranks()
    (plain, weights), (ours, others) = results
    assert plain == ours and all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    moved = [value for key, value in facts.items() if key in ("offload.tensors", "optimizer_offload.host_bytes")]
    assert all(moved) or name == "conv"  # whose state comes in pieces that are too small


@pytest.mark.parametrize("policy", ["bf16-true", "16-true", "bf16-true; 0=32"])
def test_weights_are_cast_though_somebody_holds_weak_references(policy):
    """`Module.to` fails on such fake parameters."""
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
        watched = [weakref.ref(parameter) for parameter in model.parameters()]
        applied = apply_precision(model, Policy.parse(policy))
        half = torch.float16 if policy == "16-true" else torch.bfloat16
        kept = torch.float32 if "0=32" in policy else half
        assert [p.dtype for p in model.parameters()] == [kept] * 2 + [torch.float32] * 2 + [half] * 2
        model(torch.ones(4, 3)).sum().backward()
        assert all(p.grad.dtype == p.dtype for p in model.parameters())
        applied.undo()
    assert all(ref() is p and p.dtype == torch.float32 for ref, p in zip(watched, model.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore::floatline.errors.FloatlineWarning")
def test_a_plan_leaves_nothing_behind(zoo):
    """Memory, process-wide settings and the real step are as before."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    case = zoo["gpt2"]

    def train():
        model = case.build()
        techniques = ["lora", "offload(to='disk', min_bytes=0)", "low_bit_optimizer", "attention"]
        step = fl.TrainStep(model, torch.optim.AdamW, "bf16-mixed", techniques=techniques)
        torch.manual_seed(0)
        return [step(case.batch(seed)).loss for seed in range(2)], [p.detach() for p in model.parameters()]

    before = train()
    functions = torch.utils.swap_tensors, _fsdp_param.free_storage, torch.backends.cuda.flash_sdp_enabled()
    several = ["sharding(cpu_offload=True) + low_bit_optimizer", "lora(rank=4) + checkpointing + offload(min_bytes=0)",
               "optimizer_offload + attention", "optimizer_in_backward + chunked_loss"]  # fmt: skip
    traced = [plan(case, techniques, "a100", "bf16-mixed") for techniques in several]
    assert functions == (torch.utils.swap_tensors, _fsdp_param.free_storage, torch.backends.cuda.flash_sdp_enabled())
    ledgers = [each.ledger for each in traced]
    del traced
    gc.collect()
    assert all(ledger.device + ledger.host < 50_000 for ledger in ledgers)
    after = train()
    assert all(torch.equal(a, b) for a, b in zip(before[0] + before[1], after[0] + after[1], strict=True))
