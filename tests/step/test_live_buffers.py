"""Buffers that a condemned forward has changed are as before; those of a good one stay changed."""

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.step import What
from floatline.step.live_buffers import LiveBuffers

NAN = float("nan")


class Average(nn.Module):
    """Keeps a running mean in a buffer that it replaces or writes in place."""

    def __init__(self, replaces):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.replaces = replaces
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("fixed", torch.ones(3))

    def forward(self, x):
        now = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        if self.replaces:
            self.mean = now
        else:
            self.mean.copy_(now)
        return self.fc(x * self.fixed)


def step_of(model, **guard):
    return fl.TrainStep(model, torch.optim.SGD(model.parameters(), lr=0.1), precision="32-true",
                        loss=lambda m, b: m(b).square().mean(), guard=fl.Guard(**guard))  # fmt: skip


MODELS = {
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)),
    "in place": lambda: Average(replaces=False),
    "replaced": lambda: Average(replaces=True),
}


@pytest.mark.parametrize("check", ["before-backward", "after-backward"])
@pytest.mark.parametrize("name", MODELS)
def test_a_condemned_forward_leaves_no_trace(name, check):
    torch.manual_seed(0)
    model = MODELS[name]()
    step = step_of(model, check=check)
    bad = torch.randn(4, 3)
    bad[1, 2] = NAN
    step(bad)  # also the very first
    assert all(b.isfinite().all() for b in model.buffers())
    step(torch.randn(4, 3))
    before = {n: b.clone() for n, b in model.named_buffers()}
    step(bad)
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    step(torch.randn(4, 3))
    assert not all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    model.eval()
    assert model(torch.randn(4, 3)).isfinite().all()


def test_only_the_bad_micro_batch_is_taken_back():
    torch.manual_seed(0)
    good, bad = torch.randn(4, 3), torch.full((4, 3), NAN)
    alone, both = MODELS["batch norm"](), MODELS["batch norm"]()
    both.load_state_dict(alone.state_dict())
    step_of(alone)([good])
    step_of(both)([good, bad])
    assert all(torch.equal(a, b) for a, b in zip(alone.buffers(), both.buffers(), strict=True))


def test_a_buffer_alone_condemns_the_update():
    class Poisoned(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 1)
            self.register_buffer("peak", torch.zeros(1))

        def forward(self, x):
            self.peak.copy_(x.detach().amax().log().reshape(1))
            return self.fc(x)

    model = Poisoned()
    step = step_of(model)
    step(torch.ones(2, 3))
    before = model.fc.weight.detach().clone()
    step(torch.zeros(2, 3))  # log(0) = -inf
    assert step.sentinel.skips[-1].what is What.BUFFER and model.peak.isfinite().all()
    assert "a buffer became non-finite at update 2" in step.sentinel.skips[-1].reason
    assert torch.equal(before, model.fc.weight)


def test_a_model_without_such_buffers_keeps_no_copies():
    model = nn.Linear(3, 1)
    model.register_buffer("table", torch.ones(1000))
    buffers = LiveBuffers(model)
    for _ in range(2):
        buffers.keep()
        model(torch.ones(1, 3))
        buffers.settle(True)
    assert not buffers._kept and buffers.fault() is None


def test_select_on_the_device_is_the_same():
    """The path of CUDA: the verdict is a tensor, chosen between by torch.where."""
    model = nn.BatchNorm1d(2)
    buffers = LiveBuffers(model)
    buffers.keep()
    model(torch.full((4, 2), NAN))

    class OnDevice(torch.Tensor):
        is_cuda = True

    for finite in (True, False):
        buffers.settle(torch.tensor(finite).as_subclass(OnDevice))
    assert model.running_mean.isfinite().all() and type(model.running_mean) is torch.Tensor


class Masked(nn.Module):
    """Attention whose causal mask, a buffer with -inf, grows with the sequence."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.register_buffer("mask", self.causal(2), persistent=False)

    @staticmethod
    def causal(length):
        return torch.full((length, length), -torch.inf).triu(1)

    def forward(self, x):
        length = x.shape[1]
        if len(self.mask) < length:
            self.mask = self.causal(length)
        hidden = self.fc(x)
        return (hidden @ hidden.mT + self.mask[:length, :length]).softmax(-1) @ hidden


@pytest.mark.parametrize("on_fault", ["skip", "rollback"])
def test_a_mask_of_infinities_is_no_fault(on_fault):
    step = step_of(Masked(), on_fault=on_fault, snapshot_every=2)
    assert all(bool(step(torch.randn(2, length, 3)).applied) for length in (2, 3, 4, 4, 5))
    assert not step(torch.full((2, 3, 3), NAN)).applied and step.sentinel.faults == 1
    assert bool(step(torch.randn(2, 3, 3)).applied)


def test_a_buffer_at_the_end_of_its_format_is_no_fault():
    class Full(Average):
        def forward(self, x):
            self.mean.fill_(torch.finfo(torch.float32).min)
            return self.fc(x)

    step = step_of(Full(replaces=False))
    assert all(bool(step(torch.randn(2, 3)).applied) for _ in range(3))


@pytest.mark.parametrize("check", ["before-backward", "after-backward"])
def test_a_buffer_that_an_earlier_micro_batch_has_spoilt_is_as_before_the_update(check):
    torch.manual_seed(0)
    step = step_of(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)), check=check)
    step(torch.randn(4, 3))
    before = [b.clone() for b in step.model.buffers()]
    step([torch.randn(4, 3) * 1e25, torch.randn(4, 3)])  # the loss is finite, the running variance is not
    assert step.sentinel.skips[-1].what is What.BUFFER
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.buffers(), strict=True))
    assert bool(step(torch.randn(4, 3)).applied)


def test_a_live_buffer_may_go_away():
    class Forgets(Average):
        def forward(self, x):
            self.mean = None if self.mean is not None and self.mean.any() else torch.ones(3)
            return self.fc(x)

    step = step_of(Forgets(replaces=True))
    assert [bool(step(torch.full((2, 3), v)).applied) for v in (1.0, 1.0, NAN, 1.0, 1.0)] == [
        True,
        True,
        False,
        True,
        True,
    ]
