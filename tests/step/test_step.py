"""The one step: equal to a bare loop, micro-batches equal to the full batch, every precision trains."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import floatline as fl
from floatline.errors import ConfigError, ModelError, PrecisionError


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))


def mse(model, batch):
    x, y = batch
    return F.mse_loss(model(x).float(), y)


def data(n=64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator)
    return x, x.sum(1, keepdim=True).sin()


class Tagger(nn.Module):
    """Predicts a tag per token; the loss is a mean over labels that are not -100."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)

    def forward(self, input_ids, labels):
        logits = self.head(self.embed(input_ids))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


def tagged(rows=12, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 11, (rows, length), generator=generator)
    labels = ids.clone()
    for row in range(rows):  # very different numbers of targets in each row
        labels[row, 1 + (row * row) % length :] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_bit_identical_to_a_bare_loop(precision):
    ours, bare = net(), net()
    step = fl.TrainStep(ours, torch.optim.AdamW(ours.parameters(), lr=1e-2), precision=precision, loss=mse)
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-2)
    for seed in range(5):
        out = step(data(seed=seed))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
            loss = mse(bare, data(seed=seed))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(out.loss, loss.detach()) and torch.equal(out.grad_norm, norm)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), bare.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"])
def test_every_precision_trains(precision):
    model = net()
    step = fl.TrainStep(model, torch.optim.AdamW(model.parameters(), lr=1e-2), precision=precision, loss=mse)
    first = step(data()).loss.item()
    for _ in range(150):
        out = step(data())
    assert out.loss.item() < 0.05 * first
    assert bool(out.applied) and out.grad_norm.dtype == torch.float32


def test_fp16_with_masters_follows_fp32_at_a_small_learning_rate():
    """Updates of 1e-5 are lost in fp16 weights; with masters the model moves as far as in fp32."""
    moved = {}
    for precision in ("32-true", "16-true"):
        model = net()
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        step = fl.TrainStep(model, torch.optim.AdamW(model.parameters(), lr=1e-5), precision=precision, loss=mse)
        for _ in range(100):
            step(data())
        step.undo()
        moved[precision] = (torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm().item()
    assert moved["16-true"] == pytest.approx(moved["32-true"], rel=0.15)


@pytest.mark.parametrize("sizes", [[12], [6, 6], [1, 11], [3, 4, 5], [1] * 12])
def test_micro_batches_equal_the_full_batch(sizes):
    whole, parts = Tagger(), Tagger()
    batch = tagged()
    splits = {key: value.split(sizes) for key, value in batch.items()}
    micro = [{key: splits[key][i] for key in batch} for i in range(len(sizes))]
    steps = [fl.TrainStep(m, torch.optim.SGD(m.parameters(), lr=1.0), precision="32-true") for m in (whole, parts)]
    full, split = steps[0](batch), steps[1](micro)
    torch.testing.assert_close(split.loss, full.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(split.grad_norm, full.grad_norm, rtol=1e-6, atol=1e-6)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_plain_averaging_would_be_wrong():
    """The test above can fail: the mean of the means is another number on the same data."""
    batch, model = tagged(), Tagger()
    full = model(**batch)["loss"]
    means = [model(**{k: v[i : i + 1] for k, v in batch.items()})["loss"] for i in range(12)]
    assert abs(torch.stack(means).mean() - full) > 1e-3


def test_a_custom_count_weighs_micro_batches():
    model = net()
    step = fl.TrainStep(
        model, torch.optim.SGD(model.parameters(), lr=0.0), precision="32-true", loss=mse, count=lambda b: b[0].shape[0]
    )
    x, y = data()
    whole = step((x, y)).loss
    torch.testing.assert_close(step([(x[:10], y[:10]), (x[10:], y[10:])]).loss, whole, rtol=1e-6, atol=1e-6)


def test_clipping_scales_to_the_limit():
    model = net()
    step = fl.TrainStep(
        model, torch.optim.SGD(model.parameters(), lr=1.0), precision="32-true", loss=mse, max_grad_norm=0.01
    )
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    step(data())
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_no_clipping_when_switched_off():
    model = net()
    step = fl.TrainStep(
        model, torch.optim.SGD(model.parameters(), lr=1.0), precision="32-true", loss=mse, max_grad_norm=None
    )
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    norm = step(data()).grad_norm
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close((after - before).norm(), norm)


@pytest.mark.parametrize(
    ("loss", "batch"),
    [
        (None, {"x": torch.ones(2, 3)}),
        (None, (torch.ones(2, 3),)),
        (None, torch.ones(2, 3)),
        (lambda m, b: m(b).sum(), torch.ones(2, 3)),
    ],
)
def test_batches_are_dicts_tuples_or_tensors(loss, batch):
    class Scalar(nn.Linear):
        def forward(self, x):
            return super().forward(x).mean()

    model = Scalar(3, 1)
    assert fl.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), precision="32-true", loss=loss)(
        batch
    ).applied


def test_the_optimizer_may_be_a_factory():
    model = net()
    step = fl.TrainStep(model, lambda params: torch.optim.SGD(params, lr=0.1), precision="32-true", loss=mse)
    assert bool(step(data()).applied)


def test_state_moves_to_another_step_exactly():
    for precision in ("bf16-mixed", "16-mixed", "16-true"):
        a, b = net(), net(seed=5)
        first = fl.TrainStep(a, torch.optim.AdamW(a.parameters(), lr=1e-2), precision=precision, loss=mse)
        for seed in range(3):
            first(data(seed=seed))
        second = fl.TrainStep(b, torch.optim.AdamW(b.parameters(), lr=1e-2), precision=precision, loss=mse)
        b.load_state_dict(a.state_dict())
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for seed in range(3, 6):
            left, right = first(data(seed=seed)), second(data(seed=seed))
            assert torch.equal(left.loss, right.loss) and torch.equal(left.grad_norm, right.grad_norm)
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_schedule_is_stepped_once_an_update():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.5**k)
    step = fl.TrainStep(model, optimizer, precision="32-true", loss=mse, schedule=schedule)
    x, y = data()
    step([(x[:32], y[:32]), (x[32:], y[32:])])
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_bad_input_is_one_clear_error():
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="max_grad_norm is -1"):
        fl.TrainStep(model, sgd, precision="32-true", max_grad_norm=-1)
    with pytest.raises(PrecisionError, match="did you mean 'bf16-mixed'"):
        fl.TrainStep(model, sgd, precision="bf16-mixd")
    with pytest.raises(ModelError, match=r"Sequential returned a tensor of shape \(64, 1\), not a scalar loss"):
        fl.TrainStep(model, sgd, precision="32-true")(data()[0])
    with pytest.raises(ConfigError, match="not str"):
        fl.TrainStep(model, sgd, precision="32-true")("text")
    with pytest.raises(ConfigError, match="at least one micro-batch"):
        fl.TrainStep(model, sgd, precision="32-true", loss=mse)([])
    with pytest.raises(ConfigError, match="no trainable parameters"):
        fl.TrainStep(net().requires_grad_(False), lambda p: sgd, precision="32-true")


def test_techniques_are_applied_in_order_and_undone_in_reverse():
    from floatline.techniques import Applied, Stage, Technique

    events = []

    class Note(Technique):
        def _apply(self, model, hardware):
            events.append(f"+{self.name}")
            return Applied(technique=self, touched=("0",), undo=lambda: events.append(f"-{self.name}"))

    class A(Note):
        name, stage = "a", Stage.FREEZE

    class B(Note):
        name, stage = "b", Stage.SAVE

    model = net()
    step = fl.TrainStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        precision="32-true",
        loss=mse,
        techniques=[B(), A()],
    )
    step.undo()
    assert events == ["+a", "+b", "-b", "-a"]


def test_a_micro_batch_without_targets_does_not_spoil_the_others():
    whole, parts = Tagger(), Tagger()
    batch = tagged()
    batch["labels"][6:] = -100
    micro = [{key: value[:6] for key, value in batch.items()}, {key: value[6:] for key, value in batch.items()}]
    steps = [fl.TrainStep(m, torch.optim.SGD(m.parameters(), lr=1.0), precision="32-true") for m in (whole, parts)]
    full, split = steps[0](batch), steps[1](micro)
    assert bool(split.applied)
    torch.testing.assert_close(split.loss, full.loss, rtol=1e-6, atol=1e-6)
    assert not bool(steps[1]([micro[1], micro[1]]).applied)  # no targets at all: shown as what it is, and skipped


def test_an_update_that_raises_leaves_running_statistics_as_they_were():
    """Also where it ends before its first forward: what was kept then is the update's before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    calls = []

    def loss(model, batch):
        calls.append(batch)
        if len(calls) == 3:
            raise RuntimeError("a bad sample")
        return model(*batch).square().mean()

    step = fl.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), "32-true", loss=loss)
    step((torch.randn(4, 2),))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for batch, error in (([(torch.randn(4, 2),), (torch.randn(4, 2),)], RuntimeError), ([], ConfigError)):
        with pytest.raises(error):
            step(batch)
        assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert bool(step((torch.randn(4, 2),)).applied) and model[0].num_batches_tracked == 2


def test_an_update_that_raises_leaves_no_gradients_behind():
    model = net()
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return mse(model, batch)

    step = fl.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.0), precision="32-true", loss=loss)
    x, y = data()
    halves = [(x[:32], y[:32]), (x[32:], y[32:])]
    with pytest.raises(RuntimeError):
        step(halves)
    torch.testing.assert_close(step(halves).grad_norm, step((x, y)).grad_norm)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_loss_that_reaches_no_parameter_is_an_error(precision):
    model, other = net(), net()
    step = fl.TrainStep(other, torch.optim.SGD(model.parameters(), lr=0.1), precision=precision, loss=mse)
    with pytest.raises(ConfigError, match="no gradient reached any parameter"):
        step(data())


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_micro_batches_of_padded_rows_equal_the_full_batch_on_transformers_models(name):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 31, "dropout_rate": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

    def make():
        torch.manual_seed(0)
        if name == "gpt2":
            return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, **sizes))
        config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, **sizes)
        config.decoder_start_token_id = 0
        return transformers.T5ForConditionalGeneration(config)

    ids = torch.randint(1, 31, (6, 8), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for row in range(6):
        labels[row, 2 + row :] = -100
    batch = {"input_ids": ids, "labels": labels}
    outputs = []
    for micro in (batch, [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2, 4)]):
        model = make()
        step = fl.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), precision="32-true")
        outputs.append(step(micro))
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs[0].grad_norm, outputs[1].grad_norm, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("loss", [None, 1.0, {"loss": torch.ones(())}, torch.ones(3)])
def test_a_loss_function_that_returns_no_number_is_refused(loss):
    step = fl.TrainStep(nn.Linear(4, 2), torch.optim.SGD, loss=lambda model, batch: loss)
    with pytest.raises(ModelError, match="not a scalar loss"):
        step((torch.ones(1, 4),))


def test_a_loss_without_a_path_to_the_weights_is_refused():
    step = fl.TrainStep(nn.Linear(4, 2), torch.optim.SGD, loss=lambda model, batch: model(*batch).sum().detach())
    with pytest.raises(ModelError, match="depends on no trainable parameter"):
        step((torch.ones(1, 4),))


@pytest.mark.parametrize("optimizer, said", [(torch.optim.LBFGS, "LBFGS runs"), (lambda params: None, "a NoneType")])
def test_an_optimizer_that_cannot_step_by_itself_is_refused(optimizer, said):
    with pytest.raises(ConfigError, match=said):
        fl.TrainStep(nn.Linear(4, 2), optimizer)
