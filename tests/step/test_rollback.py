"""Going back: everything is as at the snapshot, counts stay, and it happens so many times only."""

import copy

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.errors import FloatlineWarning, NonFiniteError
from floatline.step.readback import Readback

NAN = float("nan")


def test_heal_without_anybody_who_diagnoses_goes_back_and_says_so_once():
    step = make(on_fault="heal", max_rollbacks=9)
    with pytest.warns(FloatlineWarning, match=r"loss was nan at update 1; guard.on_fault is heal, but nobody") as told:
        for _ in range(2):
            assert step(torch.full((4, 3), NAN)).rolled_back_to == 0
    assert len(told) == 1


class Counter:
    """Any state of the caller's: a data position, an EMA."""

    def __init__(self):
        self.at, self.mean = 0, torch.zeros(2)

    def state_dict(self):
        return {"at": self.at, "mean": self.mean}

    def load_state_dict(self, state):
        self.at, self.mean = state["at"], state["mean"]


def make(precision="32-true", **guard):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
    return fl.TrainStep(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.01),
        precision,
        loss=lambda m, b: m(b).float().square().mean(),
        guard=fl.Guard(**{"on_fault": "rollback", "snapshot_every": 4, **guard}),
        schedule=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=50),
    )


def everything(step):
    state = step.state_dict()
    state.pop("guard"), state.pop("rollback")
    flat = [p.detach().clone() for p in [*step.model.parameters(), *step.model.buffers()]]
    moments = [v.clone() for s in step.optimizer.state.values() for v in s.values()]
    return flat, moments, state["schedule"]["last_epoch"], state["updates"], torch.get_rng_state(), state["scaling"]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "16-true", "bf16-true"])
def test_all_state_is_that_of_the_snapshot(precision):
    step, extra = make(precision), Counter()
    step.rollback.extras["data"] = extra
    generator = torch.Generator().manual_seed(1)
    kept = None
    for number in range(6):
        if number == 4:
            kept = everything(step)
            mean = extra.mean.clone()
        extra.at, extra.mean = number + 1, extra.mean + 1
        step(torch.randn(4, 3, generator=generator))
    out = step(torch.full((4, 3), NAN))
    assert out.rolled_back_to == 4 == step.updates and extra.at == 4 and torch.equal(extra.mean, mean)
    assert same(everything(step), kept)
    assert step.sentinel.faults == 1 and step.sentinel.skips[-1].rolled_back_to == 4


def test_it_goes_on_as_a_run_that_never_met_the_fault():
    batches = [torch.randn(4, 3, generator=torch.Generator().manual_seed(n)) for n in range(8)]
    plain, other = make(), make()
    torch.manual_seed(5)
    for batch in batches:
        plain(batch)
    torch.manual_seed(5)
    for batch in batches[:6]:
        other(batch)
    back = other(torch.full((4, 3), NAN)).rolled_back_to
    for batch in batches[back:]:
        other(batch)
    assert same(everything(plain), everything(other))


def test_it_stops_when_going_back_does_not_help():
    step = make(max_rollbacks=2)
    step(torch.ones(4, 3))
    with pytest.raises(NonFiniteError, match=r"stopped after going back 2 times to update 0: the loss was nan"):
        for _ in range(4):
            step(torch.full((4, 3), NAN))
    assert all(p.isfinite().all() for p in step.model.parameters())


def test_progress_starts_the_count_anew():
    step = make(max_rollbacks=1, snapshot_every=2)
    for _ in range(3):
        step(torch.full((4, 3), NAN))
        for _ in range(3):
            step(torch.randn(4, 3))
    assert step.rollback.total == 3


def test_weights_that_are_bad_from_the_start_have_no_snapshot():
    step = make()
    with torch.no_grad():
        step.model[0].weight[0, 0] = NAN
    with pytest.raises(NonFiniteError, match="no finite snapshot to go back to"):
        step(torch.randn(4, 3))


@pytest.fixture
def late(monkeypatch):
    """Verdicts that are read an update later, as those of a GPU are."""
    monkeypatch.setattr(Readback, "waits", property(lambda readback: True))


def test_a_late_verdict_is_counted_once_and_takes_the_update_after_it_back(late):
    step = make()
    outs = [step(torch.full((4, 3), NAN) if n in (5, 6) else torch.randn(4, 3)) for n in range(8)]
    assert [out.rolled_back_to for out in outs] == [None] * 6 + [4, None] and step.updates == 5
    assert [(skip.step, skip.rolled_back_to) for skip in step.sentinel.skips] == [(6, 4)]  # 7 has never been


def test_a_late_verdict_on_the_update_of_a_snapshot_goes_back(late):
    step = make()
    outs = [step(torch.full((4, 3), NAN) if n == 3 else torch.randn(4, 3)) for n in range(5)]
    assert [out.rolled_back_to for out in outs] == [None, None, None, 0, None]


def test_a_late_verdict_can_be_asked_for(late):
    step = make()
    step(torch.randn(4, 3))
    assert step.read_verdict() is None
    step(torch.full((4, 3), NAN))
    assert step.read_verdict() == 0 == step.updates and step.sentinel.faults == 1


def test_a_loaded_checkpoint_forgets_snapshots_and_keeps_the_count():
    step = make(snapshot_every=2)
    for _ in range(3):
        step(torch.randn(4, 3))
    step(torch.full((4, 3), NAN))
    step(torch.randn(4, 3))
    state, weights = copy.deepcopy(step.state_dict()), copy.deepcopy(step.model.state_dict())
    for _ in range(4):
        step(torch.randn(4, 3))
    step.model.load_state_dict(weights)
    step.load_state_dict(state)
    assert step.rollback.total == 1
    assert step(torch.full((4, 3), NAN)).rolled_back_to == 3  # where it was loaded, not an update of another time
    old = {key: value for key, value in state.items() if key != "rollback"}
    step.load_state_dict(old)
    assert step.rollback.total == 0


TECHNIQUES = ["accumulation(micro_batches=2)", "low_bit_optimizer", "optimizer_offload", "optimizer_in_backward",
              "kahan", "stochastic_rounding", "master_weights", "kahan(library=optimi)",
              "stochastic_rounding(library=torchao)"]  # fmt: skip


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("bad_at", [0, 3, 4])
def test_with_techniques_it_goes_on_as_a_run_that_never_met_the_fault(technique, bad_at):
    """Before the first update, in the update of a snapshot, right after it."""

    def run(bad):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        step = fl.TrainStep(
            model,
            lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
            "bf16-true",
            loss=lambda m, b: m(b["x"].bfloat16()).float().square().mean(),
            max_grad_norm=None if technique == "optimizer_in_backward" else 1.0,
            guard=fl.Guard(on_fault="rollback", snapshot_every=4, check="after-backward"),
            techniques=[technique],
            count=lambda batch: len(batch["x"]),
        )
        batches = [torch.randn(4, 3, generator=torch.Generator().manual_seed(n)) for n in range(7)]
        if bad:
            for batch in batches[:bad_at]:
                step({"x": batch})
            batches = batches[step({"x": torch.full((4, 3), NAN)}).rolled_back_to :]
        for batch in batches:
            step({"x": batch})
        return step

    plain, other = run(False), run(True)
    assert other.rollback.total == 1 and plain.updates == other.updates == 7
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), other.model.parameters(), strict=True))
