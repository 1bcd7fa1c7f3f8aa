"""`fl.diagnose`: what it refuses, what it leaves behind, which of several faults it tells."""

import functools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import floatline as fl
from floatline.errors import ConfigError

NAN = float("nan")


class Net(nn.Module):
    """Batch norm, dropout and a buffer that counts: all that a forward can change."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.calls += 1
        return self.body(x)


def everything(model, optimizer, leaves=()):
    """A copy of all that a training job holds."""
    state = {f"model {name}": value.clone() for name, value in model.state_dict().items()}
    state |= {f"grad {n}": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    state |= {f"leaf {i}": None if t.grad is None else t.grad.clone() for i, t in enumerate(leaves)}
    for number, values in enumerate(optimizer.state.values() if optimizer else ()):
        state |= {f"state {number} {k}": v.clone() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    state["groups"] = (
        [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] if optimizer else []
    )
    state["modes"] = [module.training for module in model.modules()]
    state["torch"], state["python"] = torch.random.get_rng_state(), random.getstate()
    state["numpy"] = np.random.get_state()[1].copy()
    return state


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, torch.Tensor):
            assert isinstance(other[key], torch.Tensor) and torch.equal(value, other[key]), key
        elif isinstance(value, np.ndarray):
            assert (value == other[key]).all()
        else:
            assert value == other[key], key


def healthy(model, x):
    return model(x).square().mean() + 0 * random.random() + 0 * np.random.rand()


def bad_forward(model, x):
    return (model(x) * 0).log().mean() + 0 * random.random()


def bad_backward(model, x):
    return (model(x) * 0).sqrt().mean()


def raises(model, x):
    model(x)
    model.eval()
    random.random()
    raise RuntimeError("the program stops")


def raises_on_nan(model, x):
    loss = (model(x) * 0).log().mean()
    if not torch.isfinite(loss):
        raise FloatingPointError("loss is not finite")
    return loss


@pytest.mark.parametrize("loss", [healthy, bad_forward, bad_backward, raises, raises_on_nan])
@pytest.mark.parametrize("stepped", [True, False], ids=["with state", "fresh"])
def test_everything_is_bit_for_bit_as_before(loss, stepped):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, amsgrad=True)
    x = torch.randn(6, 4, requires_grad=True)
    if stepped:
        model(x).sum().backward()
        optimizer.step()  # and the gradients stay
    objects = {name: id(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    gradients = [id(p.grad) for p in model.parameters()]
    before = everything(model, optimizer, [x])
    if loss is raises:
        with pytest.raises(RuntimeError, match="the program stops"):
            fl.diagnose(lambda: loss(model, x), model, optimizer)
    else:
        finding = fl.diagnose(lambda: loss(model, x), model, optimizer)
        assert (finding is None) == (loss is healthy)
    same(before, everything(model, optimizer, [x]))
    assert objects == {name: id(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    assert gradients == [id(p.grad) for p in model.parameters()]
    assert not torch.nn.modules.module._global_forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize("loss", [lambda rows: rows.sum(), lambda rows: (rows * 0).log().sum()], ids=["healthy", "bad"])
def test_a_parameter_that_the_forward_writes_is_put_back(loss):
    model = nn.Embedding(5, 4, max_norm=1.0)
    with torch.no_grad():
        model.weight.mul_(100)
    before, identity = model.weight.detach().clone(), model.weight.data_ptr()
    finding = fl.diagnose(lambda: loss(model(torch.tensor([1, 2]))), model)
    assert (finding is None) == (loss(torch.ones(1)).item() == 1)
    assert torch.equal(model.weight, before) and model.weight.data_ptr() == identity


def test_an_island_is_undone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).half()
    with torch.no_grad():
        model[1].weight.fill_(6e4)
        model[0].bias.fill_(4.0)
    x = torch.randn(3, 4).half()
    before = everything(model, None)
    finding = fl.diagnose(lambda: model(x).float().mean(), model)
    assert (finding.op, finding.module, finding.cause_name) == ("addmm", "1", "overflow")
    said = [(tried.kind, tried.module, tried.cured) for tried in finding.tried]
    assert said == [("island", "1", False), ("wide", "", True)]  # the island's result goes back to fp16
    same(before, everything(model, None))


def test_samples_that_were_left_out_come_back():
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    x[1, 2] = NAN
    copy = x.clone()
    finding = fl.diagnose(lambda: model(x).mean(), model)
    assert finding.samples == (1,) and finding.counterfactual.cured
    assert torch.equal(x.nan_to_num(7.0), copy.nan_to_num(7.0))


def test_a_batch_without_a_good_sample_is_not_tried():
    model, x = nn.Linear(4, 2), torch.full((3, 4), NAN)
    finding = fl.diagnose(lambda: model(x).mean(), model)
    assert finding.samples == (0, 1, 2) and finding.counterfactual.cured is None
    assert finding.counterfactual.why == "no sample is good"


def test_a_batch_that_shares_memory_is_not_tried():
    model, x = nn.Linear(4, 2), torch.tensor([1.0, NAN, 1.0, 1.0]).expand(3, 4)
    finding = fl.diagnose(lambda: model(x).mean(), model)
    assert finding.phase == "input" and finding.counterfactual.cured is None


def test_without_cures_the_program_runs_once():
    model, calls = nn.Linear(4, 2), []

    def forward():
        calls.append(1)
        return (model(torch.ones(3, 4)) * 0).log().mean()

    finding = fl.diagnose(forward, model, cures=False)
    assert finding.op == "log" and finding.tried == () and finding.counterfactual is None and len(calls) == 1


def test_a_program_that_does_not_do_the_same_each_time_is_told():
    model, calls = nn.Linear(4, 2), []

    def forward():
        calls.append(1)
        factor = 0.0 if len(calls) == 1 else 1.0
        return (model(torch.ones(3, 4)).abs() * factor).log().mean()

    finding = fl.diagnose(forward, model)
    assert finding.counterfactual.cured is None
    assert "it does not do the same each time" in finding.counterfactual.why or "changed" in finding.counterfactual.why


def test_a_parameter_that_only_the_optimizer_knows():
    model, scale = nn.Linear(4, 2), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([*model.parameters(), scale], lr=0.1)
    finding = fl.diagnose(lambda: (model(torch.ones(3, 4)) + scale.sqrt()).sum(), model, optimizer)
    assert (finding.phase, finding.op) == ("backward", "sqrt") and scale.grad is None


def test_a_learning_rate_that_is_a_tensor():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3))
    optimizer.param_groups[0]["lr"].fill_(NAN)
    finding = fl.diagnose(lambda: model(torch.ones(3, 4)).sum(), model, optimizer)
    assert (finding.phase, finding.cause_name) == ("optimizer", "hyperparameter")


def test_low_bit_state_of_an_optimizer_is_put_back():
    optim = pytest.importorskip("torchao.optim")
    model, x = nn.Linear(128, 64), torch.randn(3, 128)
    optimizer = optim.AdamW8bit(model.parameters(), lr=1e-3)
    with torch.compiler.set_stance("force_eager"):
        model(x).sum().backward()
        optimizer.step()
    codes = optimizer.state[model.weight]["exp_avg"].codes
    before, weight = codes.clone(), model.weight.detach().clone()
    assert fl.diagnose(lambda: model(x).square().mean(), model, optimizer) is None
    assert optimizer.state[model.weight]["exp_avg"].codes is codes and torch.equal(codes, before)
    assert torch.equal(model.weight, weight)


def test_nan_that_this_batch_did_not_meet():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight[3] = NAN
    ids = torch.tensor([0, 1])
    finding = fl.diagnose(lambda: model(ids).sum(), model)
    assert (finding.phase, finding.tensor, finding.op, finding.location) == ("parameter", "0.weight", "", None)
    assert "this step did not meet it" in finding.cause


def test_an_attribute_that_is_no_buffer_is_one_to_its_readers():
    model, x = nn.Linear(4, 2), torch.ones(3, 4)
    model.scale = torch.tensor([1.0, NAN])
    finding = fl.diagnose(lambda: (model(x) * model.scale).sum(), model)
    assert (finding.phase, finding.tensor) == ("buffer", "scale")


@pytest.mark.parametrize("style", ["method", "partial", "default", "global", "local"])
def test_inputs_are_named_however_they_reach_the_program(style):
    model = nn.Linear(4, 2)
    bad = torch.ones(3, 2)
    bad[2, 0] = NAN

    class Job:
        def __init__(self):
            self.target = bad

        def loss(self):
            return F.mse_loss(model(torch.ones(3, 4)), self.target)

    def loss(target):
        return F.mse_loss(model(torch.ones(3, 4)), target)

    def with_default(target=bad):
        return loss(target)

    def with_local():
        made = torch.from_numpy(bad.numpy().copy())
        return F.mse_loss(model(torch.ones(3, 4)), made)

    programs = {
        "method": (Job().loss, "self.target"),
        "partial": (functools.partial(loss, target=bad), "target"),
        "default": (with_default, "target"),
        "global": (lambda: loss(TARGET), "TARGET"),
        "local": (with_local, "made"),
    }
    forward, name = programs[style]
    finding = fl.diagnose(forward, model)
    assert (finding.phase, finding.tensor, finding.samples) == ("input", name, (2,))


TARGET = torch.tensor([[1.0, 1.0], [1.0, 1.0], [NAN, 1.0]])


@pytest.mark.parametrize(
    ("forward", "model", "message"),
    [
        ("loss", nn.Linear(1, 1), "forward is a str"),
        (lambda: None, "model", "model is a str"),
        (lambda: None, nn.Linear(1, 1), "forward returned a NoneType, not a scalar loss"),
        (lambda: torch.ones(3), nn.Linear(1, 1), r"forward returned a tensor of shape \(3,\)"),
    ],
)
def test_what_cannot_be_diagnosed_is_refused(forward, model, message):
    with pytest.raises(ConfigError, match=message):
        fl.diagnose(forward, model)


@pytest.mark.parametrize(("optimizer", "said"), [("adam", "str"), (torch.optim.Adam, "Adam")])
def test_what_is_no_optimizer_is_refused(optimizer, said):
    model = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match=f"optimizer is {said}"):
        fl.diagnose(lambda: model(torch.ones(1, 1)).sum(), model, optimizer)


def test_a_loss_from_outside_of_torch_is_told_though_no_op_made_it():
    finding = fl.diagnose(lambda: torch.tensor(NAN), nn.Linear(1, 1))
    assert (finding.phase, finding.op, finding.location) == ("forward", "", None)
    assert str(finding).startswith("forward: the loss\n  cause   the loss is not finite, and no op under watch")
    assert finding.headline.startswith("forward: the loss is not finite")


def test_evidence_names_the_parameter_that_went_in():
    model = nn.Sequential(nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.fill_(1e5)

    def forward():
        with torch.autocast("cpu", torch.float16):
            return model(torch.ones(1, 2)).float().sum()

    finding = fl.diagnose(forward, model)
    assert (finding.op, finding.cause) == ("_to_copy", "a cast of 1e+05, and float16 ends at 65504")
    assert "self is 0.weight" in finding.evidence.notes
    assert not any("bits below the end" in note for note in finding.evidence.notes)  # it is beyond it


def test_a_finding_prints_and_becomes_json():
    import json

    model, x = nn.Linear(4, 2), torch.ones(3, 4)
    finding = fl.diagnose(lambda: (model(x) * 0).log().mean(), model)
    text = str(finding)
    for part in ("forward: log", f"at      {__file__}:", "cause   log of 0", "self float32[3x2]", "remedy  ", "cured"):
        assert part in text
    assert json.loads(json.dumps(finding.as_dict()))["location"]["line"] == finding.location.line


def test_callable_package_keeps_signature_and_help():
    assert fl.diagnose.__wrapped__.__name__ == "diagnose"
    assert isinstance(fl.diagnose(lambda: torch.tensor(-1.0).sqrt(), nn.Linear(1, 1)), fl.Finding)
