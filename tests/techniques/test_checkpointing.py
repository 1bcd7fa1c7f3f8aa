"""Checkpointing: what is saved, what is recomputed, and that nothing else changes."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import floatline as fl
from floatline.errors import ConfigError, FloatlineWarning
from floatline.observe.allocations import record_allocations
from floatline.techniques import Checkpointing
from floatline.techniques.checkpointing import _without_cache
from floatline.techniques.layers import repeated_layers


class Deep(nn.Module):
    def __init__(self, depth=6, width=32, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=dropout, batch_first=True) for _ in range(depth)
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


X = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(1))


def test_less_is_kept_the_more_is_recomputed(kept_bytes):
    def kept(*techniques):
        model = Deep()
        for technique in techniques:
            technique.apply(model)
        return kept_bytes(model, (X,))

    plain, every, second = kept(), kept(Checkpointing()), kept(Checkpointing(every=2))
    matmul, attention = kept(Checkpointing(keep=["matmul"])), kept(Checkpointing(keep=["attention"]))
    assert every < 0.15 * plain
    assert every < attention < matmul < plain
    assert every < second < plain


def run(model, techniques, batches, precision="32-true", loss=None):
    step = fl.TrainStep(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), precision=precision, loss=loss, techniques=techniques
    )
    outputs = [step(batch) for batch in batches]
    return [out.loss for out in outputs], [out.grad_norm for out in outputs]


def identical(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "technique", ["checkpointing", "checkpointing(every=2)", "checkpointing(keep=['matmul', 'attention'])"]
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_bit_identical_on_every_model(case, technique, precision):
    plain, model = case.build(), case.build()
    batches = [case.batch(seed) for seed in range(3)]
    assert run(model, [technique], batches, precision, case.loss) == run(plain, [], batches, precision, case.loss)
    assert identical(model, plain)  # batch norm's statistics included


def test_dropout_draws_the_same_numbers_again():
    results = []
    for techniques in ([], [Checkpointing()]):
        model = Deep(dropout=0.3)
        torch.manual_seed(7)
        results.append(run(model, techniques, [(X,)] * 3))
    assert results[0] == results[1]


def test_layers_of_hugging_face_models_are_their_own(zoo):
    names = list(repeated_layers(zoo["qwen3_vl"].build()))
    assert names == ["model.visual.blocks.0", "model.visual.blocks.1", "model.language_model.layers.0",
                     "model.language_model.layers.1"]  # fmt: skip
    applied = Checkpointing(every=2).apply(zoo["qwen3_vl"].build())
    assert applied.touched == ("model.visual.blocks.0", "model.language_model.layers.0")


def test_lists_of_lists_are_looked_into():
    """A list has no forward: wrapping it would recompute nothing."""

    class Stage(nn.ModuleList):
        pass

    def block():
        return nn.TransformerEncoderLayer(4, 1, 4)

    model = nn.ModuleList([Stage([block(), block()]), Stage([block(), block()])])
    assert list(repeated_layers(model)) == ["0.0", "0.1", "1.0", "1.1"]


def test_caches_are_taken_out_wherever_they_are():
    from transformers import DynamicCache

    cache, x = DynamicCache(), torch.ones(1)
    args, kwargs = _without_cache(((x, [cache, x]), {"past": {"key": cache}, "use_cache": True, "mask": None}))
    assert args[0] is x and args[1] == [None, x]
    assert kwargs == {"past": {"key": None}, "use_cache": False, "mask": None}
    args, kwargs = _without_cache(((x,), {"y": (x, None), "use_cache": True}))
    assert args[0] is x and kwargs["y"][0] is x and kwargs["use_cache"] is False


def test_a_cache_is_not_filled_twice(zoo):
    """GPT-2 makes a cache in training unless told not to; recomputed layers must not append to it again."""
    case = zoo["gpt2"]
    model = case.build()
    assert model.config.use_cache
    Checkpointing().apply(model)
    output = model(**case.batch(0))
    output.loss.backward()
    assert output.past_key_values is None or output.past_key_values.get_seq_length() == 0


def test_evaluation_and_generation_are_left_alone(zoo):
    case = zoo["gpt2"]
    plain, model = case.build().eval(), case.build().eval()
    Checkpointing().apply(model)
    prompt = case.batch(0)["input_ids"][:, :4]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **options), plain.generate(prompt, **options))


def test_undo_restores_the_model(case):
    model = case.build()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    applied = Checkpointing().apply(model)
    assert applied.touched and model.__dict__ != before[""]
    applied.undo()
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    applied.undo()  # once more does nothing


def test_a_copy_recomputes_its_own_weights():
    model = Deep(depth=2)
    Checkpointing().apply(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    other(X).backward()
    assert all(p.grad is None for p in model.parameters()) and all(p.grad is not None for p in other.parameters())
    plain = Deep(depth=2)
    plain.load_state_dict(other.state_dict())
    plain(X).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), other.parameters(), strict=True))


class Mutates(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(32, 32)

    def forward(self, x):
        return x + self.fc(F.relu(x, inplace=True))


def test_a_layer_that_changes_its_input_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks = nn.Linear(32, 32), nn.ModuleList([Mutates(), Mutates()])

        def forward(self, x):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return x.mean()

    model = Net()
    step = fl.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), techniques=["checkpointing"])
    with pytest.raises(
        ConfigError, match=r"checkpointing blocks.0: its forward changes an input of shape \(4, 16, 32\)"
    ) as e:
        step((X,))
    assert "leave it out with checkpointing.layers" in e.value.hint


def test_bad_input():
    with pytest.raises(ConfigError, match=r"'blocs.\*' matches no module of Deep\nhint: near names: blocks."):
        Checkpointing(layers=["blocs.*"]).apply(Deep())
    with pytest.raises(ConfigError, match=r"checkpointing.every is 0\nhint: give 1 or more"):
        Checkpointing(every=0)
    with pytest.raises(
        ConfigError, match=r"checkpointing.keep is \('mm',\)\nhint: allowed: a list of matmul, attention"
    ):
        Checkpointing(keep="mm")
    with pytest.raises(ConfigError, match="drop layers, every and keep"):
        Checkpointing(budget=0.5, every=2)
    with pytest.raises(ConfigError, match=r"needs compile: the budget is kept by the compiler's partitioner"):
        fl.TrainStep(Deep(), torch.optim.AdamW, techniques=[Checkpointing(budget=0.5)])
    with pytest.warns(FloatlineWarning, match="touched nothing: no layers repeat in Linear: name modules in"):
        Checkpointing().apply(nn.Linear(2, 2))
    model = Deep()
    Checkpointing().apply(model)
    with pytest.raises(ConfigError, match="checkpointing is already applied to this Deep"):
        Checkpointing(every=2).apply(model)


def test_transformers_own_checkpointing_excludes_ours(zoo):
    model = zoo["gpt2"].build()
    model.gradient_checkpointing_enable()
    with pytest.raises(ConfigError, match=r"transformers' own is on in transformer.*gradient_checkpointing_disable"):
        Checkpointing().apply(model)


class Wide(nn.Module):
    """Blocks of two matrix products with cheap ops between, as the compiler's partitioner likes them."""

    def __init__(self, width=32, depth=3):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.Tanh(), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(depth)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()


def compiled(technique):
    """Bytes alive after a compiled forward, and the loss of the third update."""
    seen = []

    def loss(model, batch):
        value = model(batch)
        for recording in seen:
            recording.mark("forward")
        return value

    techniques = ["compile(backend=aot_eager_decomp_partition)", *([technique] if technique else [])]
    step = fl.TrainStep(Wide(), torch.optim.AdamW, precision="32-true", loss=loss, techniques=techniques)
    batch = torch.randn(128, 32, generator=torch.Generator().manual_seed(0))
    step(batch), step(batch)
    with record_allocations(torch.device("cpu")) as recording:
        seen.append(recording)
        out = step(batch)
    return recording.marks["forward"], out.loss


def test_when_compiled_a_budget_or_layers_or_ops_decide_what_is_kept():
    plain, half, none = compiled(None), compiled("checkpointing(budget=0.5)"), compiled("checkpointing(budget=0)")
    layers, matmul = compiled("checkpointing"), compiled("checkpointing(keep=matmul)")
    assert none[0] < 0.3 * plain[0] and 0.35 * plain[0] < half[0] < 0.75 * plain[0]
    assert layers[0] < 0.3 * plain[0] and layers[0] < matmul[0] < plain[0]
    for run_ in (half, none, layers, matmul):
        torch.testing.assert_close(run_[1], plain[1], rtol=1e-5, atol=1e-6)


class Averaging(nn.Module):
    """Reads a running mean before it moves it: by assignment, in place, or in place only from the second call on."""

    def __init__(self, how, width=8):
        super().__init__()
        self.how = how
        self.lin = nn.Linear(width, width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        y = self.lin(x) - self.mean
        if self.training:
            now = x.detach().mean(0)
            if self.how == "assigned":
                self.mean = 0.9 * self.mean + 0.1 * now
                self.calls = self.calls + 1
            elif self.how == "in place" or self.calls_made:
                self.mean.lerp_(now, 0.1)
                self.calls.add_(1)
            self.calls_made = True
        return x + torch.tanh(y)

    calls_made = False


def averaging(how, depth=3):
    torch.manual_seed(0)
    if how == "spectral norm":  # its power iteration writes into u and v, which it reads too
        blocks = [nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Tanh()) for _ in range(3)]
    else:
        blocks = [Averaging(how) for _ in range(depth)]
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(*blocks))


def mean_square(model, batch):
    return model(batch).square().mean()


@pytest.mark.parametrize("how", ["assigned", "in place", "spectral norm"])
def test_buffers_that_a_layer_reads_and_changes(how):
    """The recomputation reads the old values, and the new ones stay."""
    batches = [torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    plain, checkpointed = averaging(how), averaging(how)
    expected = run(plain, [], batches, loss=mean_square)
    assert expected == run(checkpointed, [Checkpointing()], batches, loss=mean_square)
    assert identical(plain, checkpointed)


def test_a_buffer_that_changes_late_is_an_error_once():
    model = averaging("late")
    step = fl.TrainStep(model, torch.optim.AdamW, precision="32-true", loss=mean_square, techniques=[Checkpointing()])
    step(torch.ones(4, 8))
    for block in range(3):
        with pytest.raises(
            ConfigError, match=rf"checkpointing 1.{block}: its forward changes the buffer mean in place"
        ):
            step(torch.ones(4, 8))
    assert bool(step(torch.ones(4, 8)).applied)


def test_unchanged_buffers_are_not_kept(kept_bytes):
    model = averaging("assigned").eval()
    for block in model[1]:
        block.register_buffer("table", torch.zeros(1000, 1000))
    Checkpointing().apply(model)
    assert kept_bytes(model, torch.ones(4, 8, requires_grad=True), mean_square) < 10_000


class Twice(nn.Module):
    """Three layers that share a weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))
        for layer in self.layers[1:]:
            layer[0].weight = self.layers[0][0].weight

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_selective_checkpointing_of_a_shared_weight_under_autocast():
    """Autocast's cast of it, cached by the first layer, is not there in the recomputation of the others."""
    plain, selective = Twice(), Twice()
    batches = [torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    expected, _ = run(plain, [], batches, precision="bf16-mixed", loss=mean_square)
    losses, _ = run(selective, [Checkpointing(keep="matmul")], batches, precision="bf16-mixed", loss=mean_square)
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=0)


def test_inputs_in_a_dataclass_are_seen():
    """A frozen layer is recomputed too where a gradient passes through what it is handed in an object."""

    @dataclasses.dataclass
    class State:
        x: torch.Tensor

    class Layer(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(8, 8).requires_grad_(False)

        def forward(self, state):
            Layer.calls += 1
            return State(self.lin(state.x).exp())

    model = nn.Sequential(nn.Sequential(Layer(), Layer()))
    Checkpointing().apply(model)
    model(State(torch.ones(2, 8, requires_grad=True))).x.sum().backward()
    assert Layer.calls == 4


@pytest.mark.parametrize("how", ["assigned", "in place", "spectral norm"])
@pytest.mark.parametrize("keep", [(), ("matmul",)])
def test_compiled_layers_that_change_buffers(how, keep):
    """The compiler leaves the recomputation of such a layer to Python, where buffers must be as before too."""
    batches = [torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    torch._dynamo.reset()
    plain, compiled = averaging(how), averaging(how)
    techniques = ["compile(backend=aot_eager)", Checkpointing(keep=keep)]
    losses, _ = run(compiled, techniques, batches, loss=mean_square)
    expected, _ = run(plain, [], batches, loss=mean_square)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(compiled.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_list_of_layers_is_never_called_and_so_is_refused(zoo):
    """Taken for a layer it would hide those inside, and nothing would be recomputed."""
    with pytest.raises(
        ConfigError, match=r"layers: blocks is a ModuleList that is never called itself\nhint: .*blocks\.\*"
    ):
        Checkpointing(layers="blocks").apply(Deep())
    touched = Checkpointing(layers="**").apply(zoo["mlp"].build()).touched
    assert touched == ("stem", "blocks.0", "blocks.1", "blocks.2", "out")
