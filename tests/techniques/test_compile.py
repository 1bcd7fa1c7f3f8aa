"""Compile: the same numbers from fewer calls, counted, and taken off again."""

import copy
import warnings

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.errors import ConfigError, FloatlineWarning
from floatline.hardware import lookup, resolve
from floatline.patch import ForwardPatch

Compile = fl.techniques.Compile
TOLERANCE = {"32-true": 1e-5, "bf16-mixed": 2e-2, "16-mixed": 5e-3}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train(case, techniques, precision="32-true", updates=3, batches=None):
    model = case.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    step = fl.TrainStep(model, optimizer, precision=precision, loss=case.loss, techniques=techniques)
    outputs = [step(batch) for batch in batches or [case.batch(seed) for seed in range(updates)]]
    return step, torch.stack([output.loss for output in outputs]), model


def assert_same(case, techniques, precision="32-true", batches=None):
    _, losses, model = train(case, [], precision, batches=batches)
    step, compiled_losses, compiled = train(case, techniques, precision, batches=batches)
    tolerance = TOLERANCE[precision]
    torch.testing.assert_close(compiled_losses, losses, rtol=tolerance, atol=tolerance)
    for one, other in zip(model.state_dict().items(), compiled.state_dict().items(), strict=True):
        assert one[0] == other[0]
        torch.testing.assert_close(other[1], one[1], rtol=tolerance, atol=tolerance)
    return step


@pytest.mark.parametrize("scope", ["layers", "model"])
def test_training_is_the_same(case, scope):
    if (case.name, scope) == ("qwen3_vl", "model"):
        pytest.skip("some forty graphs, and a nonzero that this backend refuses")
    step = assert_same(case, [Compile(backend="aot_eager", scope=scope)])
    assert step.stack.facts()["compile.graphs"] >= 1
    assert step.stack.facts()["compile.compile_s"] > 0


def test_inductor_for_real(zoo):
    step = assert_same(zoo["mlp"], ["compile"])
    assert step.stack.facts()["compile.graphs"] == 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", ["mlp", "conv", "gpt2"])
def test_under_autocast_and_loss_scaling(zoo, name, precision):
    assert_same(zoo[name], [Compile(backend="aot_eager")], precision)


def test_layers_of_one_class_share_a_graph(zoo):
    for name, layers in (("mlp", 3), ("conv", 3), ("gpt2", 3), ("tied", 2)):
        step, _, _ = train(zoo[name], [Compile(backend="eager")])
        assert len(step.stack.applied[0].touched) == layers
        facts = step.stack.facts()
        assert (facts["compile.graphs"], facts["compile.recompiles"], facts["compile.graph_breaks"]) == (1, 0, 0)


def test_graph_breaks_are_counted(zoo):
    step, _, _ = train(zoo["qwen3_vl"], [Compile(backend="eager")])
    assert step.stack.facts()["compile.graph_breaks"] > 0  # the vision blocks read lengths of images into Python


def test_patched_forwards_are_compiled_not_bypassed(zoo):
    case, calls = zoo["mlp"], []
    model = case.build()

    def wrap(forward):
        def patched(self, x):
            return 2 * forward(self, x)

        return patched

    for block in model.blocks:
        ForwardPatch(block).install(wrap)
    x, _ = case.batch(0)
    expected = model(x)
    for block in model.blocks:  # seen at compile time by what is traced
        block.up.register_forward_hook(lambda *_: calls.append(1))
    applied = Compile(backend="eager").apply(model)
    torch.testing.assert_close(model(x), expected)
    assert applied.facts()["graphs"] >= 1 and calls


def test_checkpointing_inside_of_compiled_layers(zoo):
    from torch.utils.checkpoint import checkpoint

    def wrap(forward):
        def recomputing(self, *args, **kwargs):
            return checkpoint(forward, self, *args, use_reentrant=False, **kwargs)

        return recomputing

    for name in ("mlp", "gpt2"):
        case = zoo[name]
        plain, model = case.build(), case.build()
        for block in fl.techniques.layers.repeated_layers(model).values():
            ForwardPatch(block).install(wrap)
        applied = Compile(backend="aot_eager").apply(model)
        loss_of(case, plain, case.batch(0)).backward()
        with applied.during():
            loss_of(case, model, case.batch(0)).backward()
        for one, other in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-6)
        assert applied.facts()["graphs"] == 1


def loss_of(case, model, batch):
    return case.loss(model, batch) if case.loss else model(**batch)["loss"]


def test_precision_islands_hold(zoo):
    precision = "bf16-mixed; blocks.1=32"
    _, plain, _ = train(zoo["mlp"], [], precision)
    step, compiled, _ = train(zoo["mlp"], [Compile(backend="aot_eager")], precision)
    torch.testing.assert_close(compiled, plain, rtol=2e-2, atol=2e-2)
    assert step.stack.facts()["compile.graphs"] == 3  # before, on and behind the island: its output is fp32


def test_accumulation_and_attention_with_it(zoo):
    for name in ("gpt2", "tied"):
        for extra in (["accumulation(micro_batches=2)"], ["attention"], ["attention(kernel='math')", "accumulation"]):
            _, plain, _ = train(zoo[name], extra)
            _, compiled, _ = train(zoo[name], [*extra, Compile(backend="aot_eager")])
            torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-5)


def test_a_callers_list_of_micro_batches(zoo):
    x, y = zoo["mlp"].batch(0)
    assert_same(zoo["mlp"], [Compile(backend="aot_eager")], batches=[[(x[:2], y[:2]), (x[2:], y[2:])]] * 2)


def of_length(zoo, length):
    rows = {key: value[:, :9] for key, value in zoo["tied"].batch(0).items()}
    return {key: torch.cat([value, value], 1)[:, :length] for key, value in rows.items()}


@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 2), (True, 1)])
def test_other_lengths_recompile_once(zoo, dynamic, graphs):
    batches = [of_length(zoo, length) for length in (10, 12, 14, 15, 17)]
    step, _, _ = train(zoo["tied"], [Compile(backend="eager", dynamic=dynamic)], batches=batches)
    assert step.stack.facts()["compile.graphs"] == graphs
    assert step.stack.facts()["compile.recompiles"] == graphs - 1


def test_past_the_limit_the_guard_is_named(zoo):
    batches = [of_length(zoo, length) for length in range(5, 16)]
    message = r"TransformerEncoderLayer was compiled 8 times.*size mismatch at index 1. expected 12, actual 13.*dynamic"
    with pytest.warns(FloatlineWarning, match=message):
        step, losses, _ = train(zoo["tied"], [Compile(backend="eager", dynamic=False)], batches=batches)
    assert step.stack.facts()["compile.graphs"] == 8 and step.stack.facts()["compile.recompiles"] == 7
    _, plain, _ = train(zoo["tied"], [], batches=batches)
    torch.testing.assert_close(losses, plain)


def test_the_key_value_cache_is_off_in_the_step_only(zoo):
    seen = []
    case = zoo["gpt2"]
    model = case.build()
    step = fl.TrainStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        precision="32-true",
        loss=lambda model, batch: seen.append(model.config.use_cache) or model(**batch).loss,
        techniques=[Compile(backend="eager")],
    )
    step(case.batch(0))
    assert seen == [False] and model.config.use_cache is True
    assert any("key-value cache is off" in note for note in step.stack.notes)


def test_warm_up_leaves_no_trace(zoo):
    case = zoo["conv"]

    def losses(warm):
        torch.manual_seed(3)
        model = nn.Sequential(case.build(), nn.Dropout(0.2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        step = fl.TrainStep(
            model, optimizer, precision="32-true", loss=case.loss, techniques=[Compile(backend="eager")]
        )
        if warm:
            facts = step.warm_up(case.batch(7))
            assert facts["compile.graphs"] == 1 and step.updates == 0 and not optimizer.state
            assert all(parameter.grad is None for parameter in model.parameters())
            assert int(model[0].blocks[0].norm.num_batches_tracked) == 0
        found = torch.stack([step(case.batch(seed)).loss for seed in range(3)])
        return found, step.stack.facts()["compile.graphs"], model.state_dict()

    (cold, cold_graphs, cold_state), (warm, warm_graphs, warm_state) = losses(False), losses(True)
    assert torch.equal(cold, warm) and cold_graphs == warm_graphs == 1
    assert all(torch.equal(cold_state[key], warm_state[key]) for key in cold_state)


def test_undo_is_exact_and_copies_are_plain(case):
    model = case.build()
    loss_of(case, model, case.batch(0))  # models note things in their first forward
    before = attributes(model)
    applied = Compile(backend="eager").apply(model)
    assert applied.touched
    with applied.during(), applied.around():
        loss_of(case, model, case.batch(0))
    twin = copy.deepcopy(model)
    assert all(module._compiled_call_impl is None for module in twin.modules())
    loss_of(case, twin, case.batch(0)).backward()
    with pytest.raises(ConfigError, match="compile is already applied"):
        Compile(backend="eager").apply(model)
    applied.undo()
    assert attributes(model) == before


def attributes(model):
    """What each module holds, by identity; tensors that a model notes in its forward by name only."""
    return {
        (name, key): None if isinstance(value, torch.Tensor) else id(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    }


def test_other_models_are_not_counted(zoo):
    applied = Compile(backend="eager").apply(zoo["mlp"].build())
    torch.compile(lambda x: x * 2, backend="eager")(torch.ones(3))
    assert applied.facts() == {"graphs": 0, "recompiles": 0, "graph_breaks": 0, "compile_s": 0}


def test_what_cannot_be_compiled_says_why(zoo, monkeypatch):
    model = zoo["mlp"].build()
    assert (
        "start at capability 7.0; p100-16gb is Pascal, capability 6.0"
        in Compile().supports(lookup("p100"), model).reason
    )
    assert Compile().supports(lookup("t4"), model) and Compile().supports(resolve("cpu"), model)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"compiles for CPU with no-such-compiler, which is not installed"):
        Compile().apply(model)
    assert Compile(backend="eager").supports(resolve("cpu"), model)


def test_cuda_graphs_refuse_accumulation():
    stack = fl.techniques.Stack
    with pytest.raises(ConfigError, match=r"cannot be combined: the CUDA graphs of mode=reduce-overhead.*mode=default"):
        stack([Compile(mode="reduce-overhead"), "accumulation"])
    stack([Compile(mode="max-autotune-no-cudagraphs"), "accumulation"])


def test_cuda_graphs_on_cpu_are_noted(zoo):
    applied = Compile(mode="reduce-overhead").apply(zoo["mlp"].build())
    assert applied.notes == ("mode=reduce-overhead replays CUDA graphs, of which a CPU has none",)
    applied = Compile(mode="max-autotune").apply(zoo["mlp"].build(), lookup("a100"))
    assert "a list of micro-batches fails (pytorch#169545)" in applied.notes[0]


def test_bad_input(zoo):
    with pytest.raises(ConfigError, match=r"compile.mode is 'reduce-overhead'\nhint: modes belong to backend=inductor"):
        Compile(mode="reduce-overhead", backend="eager")
    with pytest.raises(ConfigError, match=r"compile.backend is 'inducter'\nhint: .*inductor"):
        Compile(backend="inducter").apply(zoo["mlp"].build())
    with pytest.raises(ConfigError, match=r"compile.scope is 'block'\nhint: allowed: layers, model"):
        Compile(scope="block")
    model = zoo["mlp"].build()
    model.blocks[1].compile(backend="eager")
    with pytest.raises(ConfigError, match=r"blocks.1 is compiled already\nhint: pass the plain model"):
        Compile(backend="eager").apply(model)
    with pytest.raises(ConfigError, match="OptimizedModule is compiled already"):
        Compile(backend="eager").apply(torch.compile(zoo["mlp"].build(), backend="eager"))


def test_nothing_repeats():
    with pytest.warns(FloatlineWarning, match=r"touched nothing: no layers repeat in Linear; scope=model compiles it"):
        Compile(backend="eager").apply(nn.Linear(2, 2))


def test_fullgraph_fails_at_a_break(zoo):
    with warnings.catch_warnings(), pytest.raises(torch._dynamo.exc.TorchDynamoException):
        warnings.simplefilter("ignore")
        train(zoo["qwen3_vl"], [Compile(backend="eager", fullgraph=True)])
