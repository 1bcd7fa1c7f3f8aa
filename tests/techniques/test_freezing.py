"""Freezing: what is frozen stays, keeps no activations, and gradients still pass through it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.errors import ConfigError, FloatlineWarning
from floatline.techniques.freezing import Freezing, requires_grad


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


class Saved:
    """Counts the elements that autograd saves while a module's forward runs, parameters left out."""

    def __init__(self, module):
        self.numel, self.inside = 0, False
        own = {parameter.data_ptr() for parameter in module.parameters()}
        module.register_forward_pre_hook(lambda *_: setattr(self, "inside", True))
        module.register_forward_hook(lambda *_: setattr(self, "inside", False))

        def pack(tensor):
            if self.inside and tensor.data_ptr() not in own:
                self.numel += tensor.numel()
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def require_grad_of_the_output(module, inputs, output):
    output.requires_grad_(True)


HOOKS = {
    "no hook": lambda model: None,
    "hook inside": lambda model: model.model.visual.patch_embed.register_forward_hook(require_grad_of_the_output),
    "transformers' own": lambda model: model.enable_input_require_grads(),
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_frozen_tower_keeps_no_activations(zoo, hook, precision):
    case = zoo["qwen3_vl"]

    def saved(techniques, frozen):
        model = case.build()
        model.model.visual.requires_grad_(not frozen)
        HOOKS[hook](model)
        step = fl.TrainStep(model, sgd, precision=precision, techniques=techniques)
        counter = Saved(model.model.visual)
        with counter.hooks:
            assert step(case.batch(0)).applied
        return counter.numel

    assert saved([], frozen=False) > 0
    assert (saved([], frozen=True) > 0) == (hook == "hook inside")  # the leak that is cured here
    assert saved([Freezing(modules=("model.visual",))], frozen=False) == 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_rest_is_trained_as_without(zoo, precision):
    case = zoo["qwen3_vl"]
    models, outs = [], []
    for techniques in ([], [Freezing(modules=("model.visual",))]):
        model = case.build()
        model.model.visual.requires_grad_(bool(techniques))
        step = fl.TrainStep(model, sgd, precision=precision, techniques=techniques)
        outs.append(step(case.batch(0)))
        models.append(model)
    assert torch.equal(outs[0].loss, outs[1].loss) and torch.equal(outs[0].grad_norm, outs[1].grad_norm)
    assert all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))
    start = case.build()
    assert torch.equal(models[1].model.visual.patch_embed.proj.weight, start.model.visual.patch_embed.proj.weight)
    assert not torch.equal(models[1].model.language_model.norm.weight, start.model.language_model.norm.weight)


def test_gradients_pass_through_a_frozen_part(zoo):
    """The middle of an MLP is frozen; its stem below must learn as if nothing were wrapped."""
    case = zoo["mlp"]
    plain, frozen = case.build(), case.build()
    plain.blocks.requires_grad_(False)
    applied = Freezing(modules=("blocks",)).apply(frozen)
    assert applied.touched == ("blocks.0", "blocks.1", "blocks.2")  # a ModuleList is never called itself
    for model in (plain, frozen):
        case.loss(model, case.batch(0)).backward()
    assert frozen.stem.weight.grad is not None and torch.equal(frozen.stem.weight.grad, plain.stem.weight.grad)
    assert all(parameter.grad is None for parameter in frozen.blocks.parameters())


def test_gradients_pass_to_inputs_and_prefixes():
    torch.manual_seed(0)
    model = nn.ModuleDict({"tower": nn.Linear(3, 3), "out": nn.Linear(3, 1)})
    Freezing(modules=("tower",)).apply(model)
    prompt = nn.Parameter(torch.ones(2, 3))
    model["tower"](prompt).sum().backward()
    assert prompt.grad is not None
    assert model["tower"](torch.ones(2, 3)).grad_fn is None
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=torch.ones(1, requires_grad=True))])
    assert requires_grad(((), {"past_key_values": cache}))
    cache.layers[0].keys = torch.ones(1)
    assert not requires_grad(((torch.ones(1), None, 3, torch.float32), {"past_key_values": cache}))


def test_what_is_unfrozen_later_learns(zoo):
    model = zoo["mlp"].build()
    Freezing(modules=("stem",)).apply(model)
    model.stem.weight.requires_grad_(True)
    zoo["mlp"].loss(model, zoo["mlp"].batch(0)).backward()
    assert model.stem.weight.grad is not None


def test_patterns_name_modules_and_parameters_and_keep(zoo):
    model = zoo["tied"].build()
    applied = Freezing(modules=("layers.*", "**.bias"), keep=("layers.*.norm*",)).apply(model)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    norms = {f"layers.{i}.norm{j}.{kind}" for i in (0, 1) for j in (1, 2) for kind in ("weight", "bias")}
    assert trainable == {"embed.weight", *norms}
    assert "layers.0.linear1" in applied.touched and "layers.0" not in applied.touched
    assert applied.facts()["parameters"] == sum(p.numel() for p in model.parameters() if not p.requires_grad)


def test_a_tied_weight_is_frozen_with_the_other(zoo):
    applied = Freezing(modules=("embed",)).apply(zoo["tied"].build())
    assert applied.touched == ("embed", "head")
    assert "head.weight is tied to embed.weight and frozen with it" in applied.notes


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_batch_norm_statistics(zoo, mode):
    case = zoo["conv"]
    model = case.build()
    with torch.no_grad():
        model.blocks[0].norm.running_mean += 0.5
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    plain = case.build()
    plain.load_state_dict(model.state_dict())
    plain.blocks.requires_grad_(False)
    if mode == "eval":
        plain.blocks.eval()
    technique = Freezing(modules=("blocks",), batch_norm=mode)
    out = fl.TrainStep(model, sgd, precision="32-true", loss=case.loss, techniques=[technique])(case.batch(0))
    expected = fl.TrainStep(plain, sgd, precision="32-true", loss=case.loss)(case.batch(0))
    assert torch.equal(out.loss, expected.loss) and model.blocks[0].norm.training
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert bool(moved) == (mode == "train")


def test_undo_restores_everything(case):
    model = case.build()
    name = next(name for name, _ in model.named_parameters())
    pattern = name.split(".")[0]
    next(model.parameters()).requires_grad_(False)  # frozen by its owner: stays so
    before = {
        n: (dict(m.__dict__), {k: p.requires_grad for k, p in m.named_parameters()}) for n, m in model.named_modules()
    }
    applied = Freezing(modules=(pattern,)).apply(model)
    twin = copy.deepcopy(model)
    applied.undo()
    after = {
        n: (dict(m.__dict__), {k: p.requires_grad for k, p in m.named_parameters()}) for n, m in model.named_modules()
    }
    assert after == before
    assert all(not p.requires_grad for n, p in twin.named_parameters() if n.split(".")[0] == pattern)


def test_freezing_everything_leaves_nothing_to_train(zoo):
    model = zoo["gpt2"].build()
    with pytest.raises(ConfigError, match="GPT2LMHeadModel has no trainable parameters"):
        fl.TrainStep(model, sgd, precision="32-true", techniques=["freezing(modules=['**'])"])
    assert all(parameter.requires_grad for parameter in model.parameters())  # taken off again


def test_bad_input(zoo):
    model = zoo["qwen3_vl"].build()
    message = (
        r"freezing.modules: 'model.visal' matches no module with parameters and no parameter of "
        r"Qwen3VLForConditionalGeneration\nhint: near names: .*model.visual"
    )
    with pytest.raises(ConfigError, match=message):
        Freezing(modules=("model.visal",)).apply(model)
    with pytest.raises(
        ConfigError, match=r"freezing.keep: 'model.visual.mergr' .*\nhint: near names: .*model.visual.merger"
    ):
        Freezing(modules=("model.visual",), keep=("model.visual.mergr",)).apply(model)
    outside = r"freezing.keep: 'lm_head' names nothing that freezing.modules \(model.visual\) names\nhint: drop it"
    with pytest.raises(ConfigError, match=outside):
        Freezing(modules=("model.visual",), keep=("model.visual.merger", "lm_head")).apply(model)
    with pytest.raises(ConfigError, match=r"near names: .*model.language_model.norm.weight"):
        Freezing(modules=("model.language_model.norm.wieght",)).apply(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ConfigError, match=r"freezing.modules is \(\)\nhint: name at least one"):
        Freezing(modules=())
    with pytest.raises(ConfigError, match=r"freezing needs modules\nhint: write freezing\(modules=...\)"):
        fl.techniques.make_technique("freezing")
    with pytest.warns(FloatlineWarning, match="touched nothing"):
        Freezing(modules=("stem",), keep=("stem",)).apply(zoo["mlp"].build())


def test_a_keep_that_names_all_is_told(zoo):
    with pytest.warns(FloatlineWarning, match="touched nothing: keep names all that modules names"):
        Freezing(modules=("stem",), keep=("stem",)).apply(zoo["mlp"].build())
