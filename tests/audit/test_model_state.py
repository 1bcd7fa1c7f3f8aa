"""What a forward leaves in a model is put back, bit for bit; the next run finds the model as the first one did."""

import threading

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.audit.model_state import ModelState
from floatline.precision import Policy
from floatline.precision.apply import apply_precision


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)


class Cache(Base):
    def __init__(self):
        super().__init__()
        self.cache = None

    def forward(self, x):
        h = self.first(x)
        self.cache = h if self.cache is None else torch.cat([self.cache, h])
        return self.last(self.cache).square().mean()


class Counter(Base):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.last(self.first(x)).square().mean() * self.calls


class Lists(Base):
    def __init__(self):
        super().__init__()
        self.kept = {"all": []}

    def forward(self, x):
        self.kept["all"].append(self.first(x))
        return self.last(sum(self.kept["all"])).square().mean()


class HeldTensor(Base):
    def __init__(self):
        super().__init__()
        self.mean = [torch.zeros(16)]

    def forward(self, x):
        h = self.first(x)
        self.mean[0].mul_(0.5).add_(h.detach().mean(0))
        return self.last(h + self.mean[0]).square().mean()


class Grows(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, 16))

    def forward(self, x):
        h = self.first(x)
        self.seen = torch.cat([self.seen, h.detach()])
        return self.last(h + self.seen.mean(0)).square().mean()


class Resizes(Grows):
    def forward(self, x):
        h = self.first(x)
        self.seen.data = torch.cat([self.seen.data, h.detach()])
        return self.last(h + self.seen.mean(0)).square().mean()


class Makes(Base):
    def forward(self, x):
        if not hasattr(self, "scale"):
            self.scale = nn.Parameter(torch.ones(16))
            self.register_buffer("seen", torch.zeros(16))
            self.late = nn.Linear(16, 16)
        self.seen += 1
        return self.last(self.late(self.first(x)) * self.scale + self.seen).square().mean()


class Deletes(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("once", torch.ones(16))

    def forward(self, x):
        h = self.first(x)
        if hasattr(self, "once"):
            h = h + self.once
            del self.once
        return self.last(h).square().mean()


class Hooks(Base):
    def forward(self, x):
        self.first.register_forward_hook(lambda module, args, output: output * 2)
        return self.last(self.first(x)).square().mean()


class Draws(Base):
    def __init__(self):
        super().__init__()
        self.dice = torch.Generator().manual_seed(3)

    def forward(self, x):
        return self.last(self.first(x) * (1 + torch.rand(1, generator=self.dice))).square().mean()


ALL = [Cache, Counter, Lists, HeldTensor, Grows, Resizes, Makes, Deletes, Hooks, Draws]


@pytest.mark.parametrize("kind", ALL)
def test_every_run_gives_the_same(kind):
    torch.manual_seed(0)
    model, x = kind(), torch.randn(8, 16)
    state = ModelState(model)
    losses, parts = [], []
    for _ in range(3):
        with state.kept():
            torch.manual_seed(1)
            loss = model(x)
            loss.backward()
            losses.append(loss.item())
        parts.append((list(model.state_dict()), list(dict(model.named_modules())), list(vars(model))))
    assert losses == losses[:1] * 3
    assert parts == parts[:1] * 3
    assert all(torch.equal(tensor, state.values[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("kind", "mode"),
    [*((kind, "mixed") for kind in ALL), *((kind, "true") for kind in ALL if kind not in (HeldTensor, Makes, Draws))],
)
def test_no_format_is_blamed_for_what_a_run_left_behind(kind, mode):
    torch.manual_seed(0)
    model = kind()
    report = fl.audit(model, torch.randn(8, 16), candidates=("bf16",), mode=mode, hardware="l4", repeats=1, probes=2)
    assert report.policy == f"bf16-{mode}"
    assert not any("differ" in note for note in report.notes)


@pytest.mark.parametrize("size", [4, 64, 256])
@pytest.mark.parametrize("policy", ["bf16-true", "16-true"])
def test_weights_that_were_cast_there_and_back_get_their_bits_back(policy, size):
    """Memory that the cast has freed is given out again: an unchanged address says nothing."""
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(8)))
    state = ModelState(model)
    for _ in range(5):
        with state.kept():
            applied = apply_precision(model, Policy.parse(policy))
            model(torch.randn(2, size, dtype=model[0].weight.dtype))
            applied.undo()
    assert all(torch.equal(p, state.values[name]) for name, p in model.named_parameters())


def test_what_several_attributes_share_stays_shared():
    class Shares(Base):
        def __init__(self):
            super().__init__()
            self.settings = {"scale": 1.0}
            self.last.settings = self.settings
            self.tied = [self.first.weight, self.first]

        def forward(self, x):
            self.settings["scale"] += 1
            return self.last(self.first(x)) * self.last.settings["scale"]

    model = Shares()
    state = ModelState(model)
    for _ in range(2):
        with state.kept():
            model(torch.ones(1, 16))
            assert model.last.settings["scale"] == 2.0
        assert model.last.settings is model.settings
        assert model.tied[0] is model.first.weight and model.tied[1] is model.first


def test_what_cannot_be_copied_stays():
    class Locked(Base):
        def __init__(self):
            super().__init__()
            self.lock, self.calls = threading.Lock(), 0

    model = Locked()
    lock = model.lock
    state = ModelState(model)
    with state.kept():
        model.calls += 1
    assert model.lock is lock and model.calls == 0


def test_what_an_earlier_step_has_left_with_its_graph_is_copied():
    torch.manual_seed(0)
    model, x = Lists(), torch.randn(8, 16)
    model(x)
    kept = model.kept["all"][0]
    assert fl.audit(model, x, candidates=("bf16",), hardware="l4", repeats=0, probes=0).policy == "bf16-mixed"
    assert len(model.kept["all"]) == 1 and model.kept["all"][0] is kept and kept.grad_fn is not None


def test_a_sparse_buffer():
    class Graph(Base):
        def __init__(self):
            super().__init__()
            self.register_buffer("edges", torch.eye(8).to_sparse())

        def forward(self, x):
            return self.last(self.edges.to_dense() @ self.first(x)).square().mean()

    assert fl.audit(Graph(), torch.randn(8, 16), candidates=("bf16",), hardware="l4", repeats=0, probes=0).policy


class Teacher(Base):
    """Moves its teacher by `.data`, which counts up no version, freezes a layer and hooks a weight."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(16, 16).requires_grad_(False)

    def forward(self, x):
        self.teacher.weight.data.mul_(0.9).add_(self.first.weight.data)
        loss = self.last(self.first(x) + self.teacher(x)).square().mean()
        self.first.bias.requires_grad_(False)
        self.last.weight.register_hook(lambda gradient: gradient * 0.5)
        return loss


def test_what_no_version_tells_is_put_back_too():
    torch.manual_seed(0)
    model, x = Teacher(), torch.randn(8, 16)
    state, before, seen = ModelState(model), model.teacher.weight.clone(), []
    for _ in range(2):
        with state.kept():
            model(x).backward()
            seen.append(model.last.weight.grad.clone())
        assert torch.equal(model.teacher.weight, before) and model.first.bias.requires_grad
    assert torch.equal(*seen)
    report = fl.audit(model, x, candidates=("bf16",), hardware="cpu", repeats=0, probes=0)
    assert report.policy == "bf16-mixed" and not any("differ" in note for note in report.notes)
