"""Chunked loss: the plain step's loss and gradients, without logits."""

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import floatline as fl
from floatline.errors import ConfigError, FloatlineWarning
from floatline.techniques import Stage, Technique
from floatline.techniques.chunked_loss import ChunkedLoss
from floatline.techniques.logits.deferred import DeferredLogits

LANGUAGE_MODELS = ["gpt2", "qwen3_vl", "tied"]
TOLERANCES = {"32-true": (1e-5, 1e-6), "bf16-mixed": (2e-2, 2e-3), "16-mixed": (2e-2, 1e-3)}
"""By precision: relative and absolute, of losses and gradients. Under autocast weight gradients are rounded a chunk."""


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def one_update(case, techniques, precision="32-true", batch=None, model=None):
    """Return the output, the gradients before the update, the model and the step."""
    model = model or case.build()
    step = fl.TrainStep(model, sgd, precision=precision, loss=case.loss, max_grad_norm=None, techniques=techniques)
    gradients = {}
    step.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    return step(case.batch(0) if batch is None else batch), gradients, model, step


def assert_same_update(case, precision="32-true", batch=None, build=None, techniques=("chunked_loss(chunk_tokens=7)",)):
    build = build or case.build
    plain, expected, _, _ = one_update(case, [], precision, batch, build())
    chunked, gradients, _, step = one_update(case, list(techniques), precision, batch, build())
    rtol, atol = TOLERANCES[precision]
    torch.testing.assert_close(chunked.loss, plain.loss, rtol=rtol / 10, atol=atol)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )
    facts = step.stack.facts()
    assert facts["chunked_loss.losses"] >= 1 and "chunked_loss.whole" not in facts
    return facts


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_loss_and_gradients_are_the_plain_ones(zoo, name, precision):
    assert_same_update(zoo[name], precision)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_micro_batches(zoo, precision):
    case = zoo["gpt2"]
    facts = assert_same_update(case, precision, [case.batch(0), case.batch(1)])
    assert facts["chunked_loss.losses"] == 2


def test_head_as_an_fp32_island(zoo):
    case = zoo["gpt2"]
    _, expected, _, _ = one_update(case, [], "bf16-mixed; lm_head=32")
    _, gradients, _, _ = one_update(case, ["chunked_loss(chunk_tokens=7)"], "bf16-mixed; lm_head=32")
    torch.testing.assert_close(gradients, expected, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(
        gradients["transformer.ln_f.weight"], expected["transformer.ln_f.weight"], rtol=1e-5, atol=1e-6
    )


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any op returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))])
        return out


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_no_tensor_is_as_large_as_the_logits(zoo, name, precision):
    case = zoo[name]
    logits = case.batch(0)["input_ids"].numel() * 96

    def largest(techniques):
        model = case.build()
        step = fl.TrainStep(model, sgd, precision=precision, techniques=techniques)
        with Largest() as seen:
            step(case.batch(0))
        return seen.numel

    assert largest([]) >= logits  # the measure sees them where they exist
    assert largest(["chunked_loss(chunk_tokens=8)"]) < logits


def tiny(kind, **extra):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=96, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, **extra
    )  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).train()


@pytest.mark.parametrize(
    "build",
    [
        lambda: tiny("Llama"),
        lambda: tiny("Llama", tie_word_embeddings=True),
        lambda: tiny("Gemma2", final_logit_softcapping=2.0),
        lambda: tiny("Cohere", logit_scale=0.3),
        lambda: tiny("Granite", logits_scaling=3.0),
    ],
    ids=["llama", "llama-tied", "gemma2-soft-cap", "cohere-scale", "granite-scale"],
)
def test_hugging_face_models_as_they_are(zoo, build):
    assert_same_update(zoo["gpt2"], build=build)
    assert_same_update(zoo["gpt2"], "bf16-mixed", build=build)


def test_t5_which_calls_the_loss_module(zoo):
    from transformers import T5Config, T5ForConditionalGeneration

    def build():
        torch.manual_seed(0)
        config = T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
                          decoder_start_token_id=0)  # fmt: skip
        return T5ForConditionalGeneration(config).train()

    assert_same_update(zoo["gpt2"], build=build)


class Scaled(nn.Module):
    """Calls its loss in a given way on the logits of a head with a bias."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(30, 8), nn.Linear(8, 30)
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.bias_of_class = nn.Parameter(torch.linspace(-1, 1, 30))
        self.loss = loss

    def forward(self, ids, labels):
        return self.loss(self, self.head(self.embed(ids)), labels)


def soft_targets(labels):
    return F.one_hot(labels.clamp(min=0), 30).float() * 0.8 + 0.2 / 30


WEIGHT = torch.linspace(0.1, 2, 30)
LOSSES = {
    "mean": lambda m, x, y: F.cross_entropy(x.view(-1, 30), y.view(-1)),
    "sum": lambda m, x, y: F.cross_entropy(x.view(-1, 30), y.view(-1), reduction="sum"),
    "none": lambda m, x, y: F.cross_entropy(x.reshape(-1, 30), y.reshape(-1), reduction="none").square().mean(),
    "weight": lambda m, x, y: F.cross_entropy(x.view(-1, 30), y.view(-1), WEIGHT),
    "weight and smoothing": lambda m, x, y: F.cross_entropy(x.view(-1, 30), y.view(-1), WEIGHT, label_smoothing=0.2),
    "smoothing": lambda m, x, y: nn.CrossEntropyLoss(label_smoothing=0.1)(x.flatten(0, 1), y.flatten()),
    "ignore_index": lambda m, x, y: F.cross_entropy(x.view(-1, 30), y.clamp(min=0).view(-1), ignore_index=3),
    "probabilities": lambda m, x, y: F.cross_entropy(x.flatten(0, -2), soft_targets(y).flatten(0, 1)),
    "weighted probabilities": lambda m, x, y: F.cross_entropy(x.view(-1, 30), soft_targets(y).view(-1, 30), WEIGHT),
    "transposed probabilities": lambda m, x, y: F.cross_entropy(x.transpose(1, 2), soft_targets(y).transpose(1, 2)),
    "transposed": lambda m, x, y: F.cross_entropy(x.float().transpose(1, 2), y),
    "permuted, unreduced": lambda m, x, y: F.cross_entropy(x.permute(0, 2, 1), y, reduction="none").square().mean(),
    "shifted": lambda m, x, y: F.cross_entropy(
        x[..., :-1, :].contiguous().view(-1, x.size(-1)), y[..., 1:].reshape(-1)
    ),
    "masked": lambda m, x, y: F.cross_entropy(x[y != -100], y[y != -100]),
    "one row": lambda m, x, y: F.cross_entropy(x[0, 2], y[0, 2].abs()),
    "soft cap": lambda m, x, y: F.cross_entropy((torch.tanh(x / 2.0) * 2.0).double().view(-1, 30), y.view(-1)).float(),
    "learned scale": lambda m, x, y: F.cross_entropy((m.scale.exp() * x).flatten(0, 1), y.flatten()),
    "class bias": lambda m, x, y: F.cross_entropy((1 - x + m.bias_of_class).flatten(0, 1), y.flatten()),
    "legacy reduction": lambda m, x, y: F.cross_entropy(x.view(-1, 30), y.view(-1), None, False),
}


def scaled_batch():
    g = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(0, 30, (3, 9), generator=g), torch.randint(0, 30, (3, 9), generator=g)
    return ids, torch.where(torch.arange(9) < torch.tensor([[9], [4], [6]]), labels, -100)


@pytest.mark.filterwarnings("ignore:reduction:UserWarning", "ignore:.*size_average and reduce.*:UserWarning")
@pytest.mark.parametrize("way", LOSSES)
def test_every_argument_of_cross_entropy_and_every_recorded_op(way):
    plain, chunked = Scaled(LOSSES[way]), Scaled(LOSSES[way])
    applied = ChunkedLoss(chunk_tokens=4).apply(chunked)
    ids, labels = scaled_batch()
    expected, loss = plain(ids, labels), chunked(ids, labels)
    assert not isinstance(loss, DeferredLogits) and loss.dtype == expected.dtype and loss.shape == expected.shape
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    expected.backward()
    loss.backward()
    for (name, p), q in zip(chunked.named_parameters(), plain.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert applied.facts()["losses"] == 1 and "whole" not in applied.facts()


OTHERS = {
    "log_softmax": lambda m, x, y: -x.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).mean(),
    "__getitem__": lambda m, x, y: x[..., :5].square().mean(),
    "__setitem__": lambda m, x, y: _mask_class(x, y),
    "mul_": lambda m, x, y: F.cross_entropy(x.mul_(2.0).view(-1, 30), y.view(-1)),
    "mul": lambda m, x, y: (x * x.detach()).mean(),
    "view": lambda m, x, y: x.view(-1).square().mean(),
    "unbind": lambda m, x, y: sum(row.exp().mean() for row in x),
    "cross_entropy": lambda m, x, y: F.cross_entropy(x, y.abs()[:, :1].expand(-1, 30) % 9),  # classes in dimension 1
}


def _mask_class(x, y):
    x[..., 7] = -1e4
    return F.cross_entropy(x.view(-1, 30), y.masked_fill(y == 7, -100).view(-1))


@pytest.mark.parametrize("op", OTHERS)
def test_any_other_op_gets_the_real_logits_and_warns(op):
    plain, chunked = Scaled(OTHERS[op]), Scaled(OTHERS[op])
    applied = ChunkedLoss(chunk_tokens=4).apply(chunked)
    ids, labels = scaled_batch()
    expected = plain(ids, labels)
    with pytest.warns(
        FloatlineWarning, match=r"chunked_loss: .* needs the logits, 3 x 9 x 30, so they are computed whole"
    ):
        loss = chunked(ids, labels)
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    expected.backward()
    loss.backward()
    torch.testing.assert_close(chunked.embed.weight.grad, plain.embed.weight.grad, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(chunked.head.weight.grad, plain.head.weight.grad, rtol=1e-6, atol=1e-7)
    assert applied.facts()["whole"] >= 1
    with warnings.catch_warnings():  # one warning an op
        warnings.simplefilter("error", FloatlineWarning)
        chunked(ids, labels)


def test_a_change_in_place_under_a_view_is_refused():
    def loss(model, logits, labels):
        flat = logits.view(-1, 30)
        logits.mul_(2.0)
        return F.cross_entropy(flat, labels.view(-1))

    model = Scaled(loss)
    ChunkedLoss().apply(model)
    with pytest.raises(ConfigError, match="mul_ changes logits in place of which a view was taken before"):
        model(*scaled_batch())


class Square(torch.autograd.Function):
    """Somebody's own function: asks no `__torch_function__` on the way in, runs without grad inside."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.float())
        return (x.float() ** 2).sum()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


@pytest.mark.parametrize("through", [lambda x: x, lambda x: (x[:, :-1] * 3.0).flatten(0, 1)], ids=["bare", "recorded"])
def test_gradients_pass_through_a_foreign_autograd_function(through):
    def loss(model, logits, labels):
        return Square.apply(through(logits))

    plain, chunked = Scaled(loss), Scaled(loss)
    ChunkedLoss().apply(chunked)
    plain(*scaled_batch()).backward()
    with pytest.warns(FloatlineWarning, match="computed whole"):
        chunked(*scaled_batch()).backward()
    for p, q in zip(chunked.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_the_output_s_logits_can_be_used(zoo):
    case = zoo["gpt2"]
    plain, model = case.build(), case.build()
    ChunkedLoss(chunk_tokens=5).apply(model)
    output = model(**case.batch(0))
    assert isinstance(output.logits, DeferredLogits) and output.logits.shape == (4, 12, 96)
    assert output.logits.dtype == torch.float32 and output.logits.requires_grad and not output.logits.is_leaf
    expected = plain(**case.batch(0)).logits
    with pytest.warns(FloatlineWarning, match="argmax"), torch.no_grad():
        assert torch.equal(output.logits.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(output.logits.detach() + 0, expected.detach(), rtol=0, atol=0)
    assert "tensor(" in repr(output.logits)


def test_evaluation_and_generation_leave_the_head_alone(zoo):
    model = zoo["gpt2"].build()
    applied = ChunkedLoss().apply(model)
    batch = zoo["gpt2"].batch(0)
    with torch.no_grad():
        assert type(model(**batch).logits) is torch.Tensor
    model.eval()
    assert type(model(**batch).logits) is torch.Tensor
    assert model.generate(batch["input_ids"], max_new_tokens=2, pad_token_id=0).shape == (4, 14)
    assert applied.facts() == {}


def test_dropout_in_the_head_is_the_same_again_in_the_backward():
    class DropHead(nn.Linear):
        def __init__(self):
            super().__init__(8, 30)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            return super().forward(self.drop(x))

    model = Scaled(LOSSES["mean"])
    model.head = DropHead()
    ChunkedLoss(chunk_tokens=4).apply(model)
    ids, labels = scaled_batch()

    def loss():
        torch.manual_seed(5)
        return model(ids, labels)

    loss().backward()
    direction = torch.randn(30, generator=torch.Generator().manual_seed(2))
    slope = (model.head.bias.grad * direction).sum()
    step = 1e-2
    model.head.bias.data += step * direction
    up = loss().detach()
    model.head.bias.data -= 2 * step * direction
    down = loss().detach()
    torch.testing.assert_close(slope, (up - down) / (2 * step), rtol=1e-3, atol=1e-4)


def test_undo_and_deepcopy(zoo):
    model = zoo["tied"].build()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    applied = ChunkedLoss(chunk_tokens=5).apply(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.head.weight.zero_()
    batch = zoo["tied"].batch(0)
    loss = twin(**batch)["loss"]
    assert loss.item() == pytest.approx(torch.tensor(96.0).log().item())  # its own, zeroed head
    loss.backward()
    assert twin.head.weight.grad is not None and model.head.weight.grad is None
    applied.undo()
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert type(model(**batch)["logits"]) is torch.Tensor
    with pytest.raises(ConfigError, match="chunked_loss is already applied"):
        ChunkedLoss().apply(twin)


def test_a_frozen_model_gets_plain_logits(zoo):
    model = zoo["gpt2"].build().requires_grad_(False)
    ChunkedLoss().apply(model)
    assert type(model(**zoo["gpt2"].batch(0)).logits) is torch.Tensor


@dataclass(frozen=True, kw_only=True)
class CompileAs(Technique):
    name = "compile"
    stage = Stage.COMPILE
    scope: str = "model"


def test_a_whole_compiled_model_conflicts():
    assert "compile its layers instead" in ChunkedLoss().conflict_with(CompileAs())
    assert ChunkedLoss().conflict_with(CompileAs(scope="layers")) is None
    with pytest.raises(ConfigError, match="cannot be combined: a whole compiled model has its loss compiled in"):
        fl.techniques.Stack([CompileAs(), ChunkedLoss()])


def test_bad_input(zoo):
    with pytest.raises(ConfigError, match=r"chunked_loss.chunk_tokens is 0\nhint: give 1 or more"):
        ChunkedLoss(chunk_tokens=0)
    with pytest.raises(
        ConfigError, match=r"head 'lm_haed' matches no Linear layer of GPT2LMHeadModel\nhint: near names: lm_head"
    ):
        ChunkedLoss(head="lm_haed").apply(zoo["gpt2"].build())
    with pytest.raises(
        ConfigError, match=r"head 'layers.\*.linear1' matches 2 Linear layers\nhint: name one: layers.0"
    ):
        ChunkedLoss(head="layers.*.linear1").apply(zoo["tied"].build())
    with pytest.warns(FloatlineWarning, match="chunked_loss touched nothing: no Linear has as many outputs"):
        ChunkedLoss().apply(zoo["mlp"].build())
    two = nn.ModuleDict({"embed": nn.Embedding(9, 4), "a": nn.Linear(4, 9), "b": nn.Linear(4, 9)})
    with pytest.warns(FloatlineWarning, match=r"several Linear layers could be the output head \(a, b\): set head"):
        ChunkedLoss().apply(two)
    two = nn.ModuleDict(two.items())
    assert ChunkedLoss(head="b").apply(two).touched == ("b",)


def test_targets_that_do_not_fit_get_torch_s_error():
    model = Scaled(lambda m, x, y: F.cross_entropy(x.view(-1, 30), y.view(-1)[:-1]))
    ChunkedLoss().apply(model)
    with pytest.warns(FloatlineWarning), pytest.raises(ValueError, match=r"Expected input batch_size \(27\)"):
        model(*scaled_batch())


@pytest.fixture
def one_process():
    """A process group of this process alone: FSDP shards and gathers as on many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("head_alone", [False, True])
def test_under_fsdp(zoo, one_process, head_alone):
    """FSDP hooks the outputs, logits among them, and shards a head of its own again before the chunks are computed."""
    from torch.distributed.fsdp import fully_shard

    case = zoo["gpt2"]

    def losses(chunked):
        model = case.build()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # FSDP splits no tied weight
        if chunked:
            ChunkedLoss(chunk_tokens=7).apply(model)
        parts = [*model.transformer.h, *([model.lm_head] if head_alone else [])]
        for part in parts:
            fully_shard(part, mesh=one_process)
        fully_shard(model, mesh=one_process)
        optimizer, found = sgd(model.parameters()), []
        for seed in range(3):
            loss = model(**case.batch(seed)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    assert losses(True) == pytest.approx(losses(False), rel=1e-6)


def test_traces_on_fake_tensors(zoo):
    """Plans run the step on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = zoo["tied"].build()
        applied = ChunkedLoss(chunk_tokens=8).apply(model)
        loss = model(torch.zeros(4, 12, dtype=torch.long), torch.zeros(4, 12, dtype=torch.long))["loss"]
        loss.backward()
    assert loss.shape == () and model.head.weight.grad.shape == (96, 16) and applied.facts()["chunks"] == 6


def test_a_chunk_may_be_larger_than_any_batch(zoo):
    case = zoo["gpt2"]
    losses = []
    for techniques in ([], [f"chunked_loss(chunk_tokens={10**30})"]):
        step = fl.TrainStep(case.build(), torch.optim.AdamW, precision="32-true", techniques=techniques)
        losses.append(step(case.batch(0)).loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("shape", [(96,), (1, 96), (1, 1, 96)])
def test_a_bias_over_the_vocabulary_is_recorded_whatever_its_leading_ones(zoo, shape):
    """BART's is (1, vocabulary)."""

    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(96, 8), nn.Linear(8, 96)
            self.bias = nn.Parameter(torch.randn(shape))

        def forward(self, input_ids, labels):
            logits = self.head(self.embed(input_ids)) + self.bias
            return F.cross_entropy(logits.view(-1, 96), labels.view(-1))

    plain, chunked = Biased(), Biased()
    batch = {key: value for key, value in zoo["gpt2"].batch(0).items() if key != "attention_mask"}
    applied = ChunkedLoss(chunk_tokens=8).apply(chunked)
    losses = [model(**batch) for model in (plain, chunked)]
    for loss in losses:
        loss.backward()
    assert "whole" not in applied.facts()
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(chunked.bias.grad, plain.bias.grad)
