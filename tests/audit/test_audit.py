"""fl.audit from outside: what it answers, what it leaves alone, what it refuses."""

import copy
import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import floatline as fl
from floatline.audit.tolerance import Tolerance
from floatline.errors import ConfigError, ModelError

QUICK = {"repeats": 0, "probes": 0, "hardware": "cpu"}


class Overflowing(nn.Module):
    """A block whose second linear layer leaves fp16 and comes back."""

    def __init__(self, scale: float = 1e5) -> None:
        super().__init__()
        self.inside = nn.Linear(16, 16)
        self.large = nn.Linear(16, 16)
        self.small = nn.Linear(16, 16)
        self.head = nn.Linear(16, 4)
        with torch.no_grad():
            self.large.weight.mul_(scale)
            self.small.weight.div_(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.small(self.large(self.inside(x)))))


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(32, 16), torch.randint(4, (32,))


def test_a_healthy_model_needs_nothing(batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    report = fl.audit(model, batch, cross_entropy, **QUICK)
    assert report.policy == "bf16-mixed" and report.failures == () and report.safe
    assert report.candidates["fp16"].policy == "16-mixed"
    assert "safe as it is" in report.verdict


def test_an_overflow_is_placed_and_its_layers_become_islands(batch):
    torch.manual_seed(0)
    model = Overflowing()
    report = fl.audit(model, batch, cross_entropy, ("fp16",), **QUICK)
    first = next(row for row in report.failures if row.phase == "forward")
    assert (first.failure, first.module, first.op) == ("range", "large", "addmm")
    assert first.location.file == __file__ and "self.large" in first.location.code and first.kept
    assert "large=32" in report.policy and report.candidates["fp16"].islands == ("large", "small")
    assert not report.candidates["fp16"].all_lowered.finite and report.candidates["fp16"].effect.finite


def test_the_policy_is_what_a_step_takes(batch):
    torch.manual_seed(0)
    model = Overflowing()
    policy = fl.audit(model, batch, cross_entropy, ("fp16",), **QUICK).policy
    step = fl.TrainStep(model, torch.optim.SGD(model.parameters(), lr=1e-5), precision=policy, loss=cross_entropy)
    outs = [step(batch) for _ in range(3)]
    assert all(bool(out.applied) and math.isfinite(out.loss) for out in outs)


def test_the_model_is_left_alone(batch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fl.audit(model, batch, cross_entropy, **QUICK)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "forward" not in vars(model[0])


def test_two_audits_say_the_same(batch):
    torch.manual_seed(0)
    model = Overflowing()
    one, two = (fl.audit(model, batch, cross_entropy, ("bf16",), hardware="cpu", repeats=2, probes=2) for _ in range(2))
    assert one.as_dict() | {"seconds": 0} == two.as_dict() | {"seconds": 0}


def test_probes_end_after_four_that_hardly_matter_unless_all_are_asked_for(batch):
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(7)], nn.Linear(16, 4))
    settings = {"candidates": ("fp16",), "hardware": "cpu", "repeats": 0}
    assert fl.audit(model, batch, cross_entropy, **settings).passes["probes"] == 4
    assert fl.audit(model, batch, cross_entropy, probes=None, **settings).passes["probes"] == 8
    matters = fl.audit(model, batch, cross_entropy, tolerance=1e-3, **settings)
    assert matters.passes["probes"] > 4


def test_noise_probes_and_passes_are_told(batch):
    torch.manual_seed(0)
    report = fl.audit(Overflowing(), batch, cross_entropy, ("bf16",), hardware="cpu", repeats=3, probes=None)
    found = report.candidates["bf16"]
    assert len(found.noise.ratios) == 4 and 0.8 < found.noise.confidence < 1
    rows = {row.module: row for row in report.modules}
    assert 0 < rows["large"].gradient_change < found.all_lowered.gradient_error * 1.5
    assert rows["large"].weight_gradient > 0
    assert report.passes["probes"] == len([r for r in report.modules if r.module])
    assert report.forward_passes == sum(report.passes.values())


def test_several_batches_are_each_held_against_their_own_exact_step(batch):
    torch.manual_seed(0)
    other = torch.randn(32, 16), torch.randint(4, (32,))
    report = fl.audit(Overflowing(), [batch, other], cross_entropy, ("bf16",), **QUICK)
    assert len(report.candidates["bf16"].noise.ratios) == 2 and report.passes["batches"] == 1


def test_json_holds_what_is_infinite_as_text(batch):
    report = fl.audit(Overflowing(), batch, cross_entropy, ("fp16",), **QUICK)
    tree = json.loads(json.dumps(report.as_dict()))
    assert tree["candidates"]["fp16"]["all_lowered"]["loss_error"] == "inf"
    assert tree["rows"][0]["location"]["line"] > 0


def test_outputs_are_audited_where_there_is_no_loss(batch):
    report = fl.audit(nn.Linear(16, 4), batch[0], candidates=("bf16",), **QUICK)
    assert report.policy == "bf16-mixed" and 0 < report.candidates["bf16"].all_lowered.loss_error < 0.01


def test_the_forward_alone(batch):
    model = nn.Linear(16, 4).requires_grad_(False)
    report = fl.audit(model, batch[0], candidates=("bf16",), backward=False, **QUICK)
    assert report.policy == "bf16-mixed" and all(row.phase == "forward" for row in report.rows)


def test_half_weights_and_random_models_are_told(batch):
    class Drops(nn.Linear):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.1, training=True)

    report = fl.audit(Drops(16, 4).bfloat16(), batch[0], candidates=("bf16",), **QUICK)
    assert any("weights are bfloat16" in note for note in report.notes)
    assert any("random numbers in evaluation mode" in note for note in report.notes)


def test_an_optimizer_whose_updates_are_lost(batch):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    tiny = torch.optim.AdamW(model.parameters(), lr=1e-6)
    report = fl.audit(model, batch, cross_entropy, ("bf16",), mode="true", optimizer=tiny, **QUICK)
    assert report.updates["bf16"].worst.failure == "stagnation"
    assert any("kahan" in advice for advice in report.candidates["bf16"].advice)
    mixed = fl.audit(model, batch, cross_entropy, ("bf16",), optimizer=tiny, **QUICK)
    assert mixed.updates["bf16"].worst is None and mixed.candidates["bf16"].advice == ()


class Returns(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.fc = nn.Linear(16, 4)
        self.what = what

    def forward(self, x):
        return self.what(self.fc(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Flatten()),
            "no floating-point parameters: there is no precision to audit\nhint: audit_function",
        ),
        (Returns(lambda x: "text"), r"Returns returned no floating tensor \(str\)\nhint: pass loss="),
        (Returns(lambda x: x.argmax(-1)), r"no floating tensor \(tensor of int64\)"),
        (Returns(lambda x: x.log() - x.log() + math.nan), "not finite in fp32 already\nhint: .*fl.diagnose"),
        (Returns(lambda x: x.detach()), "no gradient arrives.*\nhint: look for detach"),
        (nn.Linear(16, 4).requires_grad_(False), "no gradient arrives"),
    ],
)
def test_models_that_cannot_be_audited(model, message, batch):
    with pytest.raises(ModelError, match=message):
        fl.audit(model, batch[0], **QUICK)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidates": ("bf61",)}, "unknown candidate 'bf61'\nhint: did you mean 'bf16'"),
        ({"candidates": "bf16"}, "candidates='bf16'\nhint: give a tuple"),
        ({"candidates": ()}, "candidates="),
        ({"mode": "mixd"}, "unknown mode 'mixd'\nhint: did you mean 'mixed'"),
        ({"tolerance": -1}, "tolerance=-1 is no positive number\nhint: write e.g. 0.05"),
        ({"tolerance": math.nan}, "tolerance=nan"),
        ({"tolerance": True}, "tolerance=True"),
        ({"hardware": "t5"}, "unknown hardware 't5'"),
        ({"repeats": -1}, "repeats=-1"),
        ({"batch": []}, "batch is an empty list"),
    ],
)
def test_settings_that_are_refused(settings, message, batch):
    given = {**QUICK, "batch": batch[0], **settings}
    with pytest.raises(ConfigError, match=message):
        fl.audit(nn.Linear(16, 4), **given)


def test_what_is_no_module_is_sent_elsewhere():
    with pytest.raises(ConfigError, match=r"model is a function\nhint: .*audit_function"):
        fl.audit(lambda x: x, torch.ones(2))


def test_a_loss_that_is_no_tensor(batch):
    with pytest.raises(ModelError, match=r"the loss function returned a float\nhint: return a floating tensor"):
        fl.audit(nn.Linear(16, 4), batch[0], lambda model, x: 1.0, **QUICK)


def test_a_model_that_does_not_take_the_batch():
    with pytest.raises(
        ModelError, match=r"raises RuntimeError in fp32.*mat1 and mat2.*\nhint: run loss\(model, batch\)"
    ):
        fl.audit(nn.Linear(16, 4), torch.ones(2, 3), **QUICK)


def test_a_stricter_tolerance_asks_for_more(batch):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)), nn.Linear(16, 4))
    report = fl.audit(model, batch, cross_entropy, ("bf16",), Tolerance(gradient=2e-3), **QUICK)
    found = report.candidates["bf16"]
    assert found.islands and found.effect.gradient_error <= 2e-3 < found.all_lowered.gradient_error
    assert found.front and found.front[0].cost <= found.front[-1].cost
    impossible = fl.audit(model, batch, cross_entropy, ("bf16",), Tolerance(gradient=1e-12, loss=1e-12), **QUICK)
    assert impossible.policy == "32-true" and not impossible.safe and "Stay in fp32" in impossible.verdict
