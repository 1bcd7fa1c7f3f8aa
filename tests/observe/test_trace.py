"""The trace against the real allocator, on small models of many kinds; and what it refuses."""

import gc
from functools import partial

import other_models
import pytest
import torch
from torch import nn

import zoo
from floatline.errors import ConfigError, ModelError
from floatline.observe.allocations import record_allocations
from floatline.observe.events import peak_of
from floatline.observe.trace import trace
from floatline.step import TrainStep, Workload

CASES = {case.name: case for case in (*zoo.CASES, *other_models.OTHERS)}
RANDOM_STATE = 5056
"""Bytes of torch's random state on a CPU. Checkpointing keeps one for each layer, and no op makes it."""
CLOSE = 0.005
"""Largest error as a share. The models have no convolution: what its kernels hold inside is tested with scratch.py."""


def real_peak(work, precision, techniques):
    """The record begins before the model is built; nothing that lives already can be freed in it."""
    gc.collect()
    with record_allocations(torch.device("cpu")) as seen:
        step = TrainStep(work.build_model(), work.optimizer, precision, work.loss, techniques=techniques)
        batch = work.build_batch()
        applied = sum(bool(step(batch).applied) for _ in range(2))
    assert applied == 2
    return seen.peak


@pytest.mark.parametrize(
    ("name", "precision", "techniques"),
    [
        ("mlp", "32-true", []),
        ("gpt2", "bf16-mixed", []),
        ("tied", "32-true", ["checkpointing"]),
        ("qwen3_vl", "32-true", []),
        ("qwen3_moe", "bf16-true", []),
        ("mlp", "fp8-mixed; blocks=fp8", []),
        ("qwen3_vl", "fp8-rowwise-mixed; model.language_model.layers=fp8", []),
        ("mamba", "32-true", []),
        ("t5", "32-true", ["accumulation(micro_batches=2)"]),
        ("wav2vec2", "32-true", []),
        ("gru", "32-true", []),
        ("translator", "32-true", []),
        ("tied", "32-true", ["low_bit_optimizer"]),
        ("llava", "32-true", ["chunked_loss(chunk_tokens=16)"]),
    ],
)
def test_the_traced_peak_is_the_real_one(name, precision, techniques):
    case = CASES[name]
    work = Workload(case.build, partial(case.batch, 0), case.loss)
    found = trace(work, hardware="cpu", precision=precision, techniques=techniques)
    real = real_peak(work, precision, techniques)
    if "checkpointing" in techniques:
        real -= 2 * RANDOM_STATE
    assert peak_of(found.events)[0] == pytest.approx(real, rel=CLOSE)


@pytest.mark.parametrize("name", [case.name for case in other_models.OTHERS])
def test_every_model_that_trains_can_be_traced(name):
    case = CASES[name]
    found = trace(
        Workload(case.build, partial(case.batch, 0), case.loss), hardware="cpu", precision="32-true", quick=True
    )
    assert found.events and found.flops


def test_a_module_that_is_given_is_left_as_it_is():
    case = CASES["qwen3_vl"]
    model, batch = case.build(), case.batch(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    built = peak_of(trace(Workload(case.build, batch), hardware="cpu", precision="32-true").events)
    given = peak_of(trace(Workload(model, batch), hardware="cpu", precision="32-true").events)
    assert given[0] == pytest.approx(built[0], rel=0.001)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(type(p.data) is torch.Tensor and p.grad is None for p in model.parameters())


def test_random_numbers_are_as_before():
    case = CASES["mlp"]
    before = torch.get_rng_state()
    trace(Workload(case.build, case.batch(0), case.loss), hardware="cpu", precision="32-true")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_mode_is_refused():
    case = CASES["mlp"]
    with pytest.raises(ConfigError, match="mode is 'serve'") as caught:
        trace(Workload(case.build, case.batch(0), case.loss), hardware="cpu", mode="serve")
    assert "allowed: train, inference" in str(caught.value)


def test_assumptions_name_the_line_of_the_model():
    def loss(model, batch):
        value = zoo.squares(model, batch)
        return value / value.item()

    case = CASES["mlp"]
    found = trace(Workload(case.build, case.batch(0), loss), hardware="cpu", precision="32-true")
    (text,) = found.assumptions
    assert text.startswith("a value that is read was taken to be 1.0 (observe/test_trace.py:")


@pytest.mark.parametrize("hardware, precision", [("cpu", "32-true"), ("t4", "16-mixed")])
def test_a_sparse_matrix_in_a_forward_counts_by_its_parts(hardware, precision):
    def loss(model, batch):
        edges = torch.stack([torch.arange(300), torch.arange(300).flip(0)])
        graph = torch.sparse_coo_tensor(edges, torch.ones(300), (300, 300))
        return torch.sparse.mm(graph, model(*batch)).square().mean()

    work = Workload(model=lambda: torch.nn.Linear(8, 8), batch=lambda: (torch.ones(300, 8),), loss=loss)
    sizes = {made.nbytes for made in trace(work, hardware=hardware, precision=precision).storages}
    assert 300 * 8 * 4 in sizes and 300 * 300 * 4 not in sizes


def test_a_gpu_that_the_program_asks_for_by_name_is_explained():
    def loss(model, batch):
        return model(*batch).sum() + torch.ones((), device="cuda")

    work = Workload(model=lambda: torch.nn.Linear(8, 8), batch=lambda: (torch.ones(3, 8),), loss=loss)
    with pytest.raises(ModelError, match="asks for a GPU by name"):
        trace(work, hardware="t4")


def test_inference_of_an_encoder_decoder_feeds_the_decoder():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    ids = torch.ones(2, 8, dtype=torch.long)
    work = Workload(
        model=lambda: transformers.T5ForConditionalGeneration(config), batch={"input_ids": ids, "labels": ids}
    )
    assert trace(work, hardware="t4", mode="inference").flops > 0


def test_lazy_modules_get_their_shapes_first():
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.LazyLinear(64), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(1))

    def loss(model, batch):
        return model(*batch).square().mean()

    work = Workload(model=net, batch=lambda: (torch.ones(8, 32),), loss=loss)
    known = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 1))
    traced = trace(work, hardware="cpu", precision="32-true")
    other = trace(Workload(model=known, batch=work.batch, loss=loss), hardware="cpu", precision="32-true")
    assert peak_of(traced.events)[0] == pytest.approx(peak_of(other.events)[0], abs=16)
    with pytest.raises(ModelError, match="Sequential holds lazy modules") as caught:
        trace(Workload(model=net(), batch=work.batch, loss=loss), hardware="cpu", precision="32-true")
    assert "one batch through it" in caught.value.hint
