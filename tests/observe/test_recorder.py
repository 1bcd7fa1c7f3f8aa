"""The recorder on a perceptron whose every byte is counted by hand.

64 inputs, 128 hidden, 16 outputs, 32 rows, fp32:

    weights  64 x 128 x 4 = 32768 and 128 x 16 x 4 = 8192;  biases 512 and 64;  all 41536
    batch    32 x 64 x 4 = 8192;  hidden 32 x 128 x 4 = 16384;  output 32 x 16 x 4 = 2048
"""

from collections import Counter

import pytest
import torch
from torch import nn

from floatline.errors import ModelError
from floatline.observe.events import Category, Phase, peak_of
from floatline.observe.trace import trace
from floatline.step import Workload

PARAMETERS, BATCH, HIDDEN, OUTPUT = 41536, 8192, 16384, 2048
STATE = 2 * PARAMETERS + 4 * 4  # two moments, and a step count for each of four tensors


def perceptron():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))


def squares(model, batch):
    return model(*batch).square().mean()


def traced(make=perceptron, batch=lambda: (torch.ones(32, 64),), loss=squares, **settings):
    optimizer = settings.pop("optimizer", torch.optim.AdamW)
    return trace(Workload(make, batch, loss, optimizer), hardware="cpu", precision="32-true", **settings)


@pytest.fixture(scope="module")
def plain():
    return traced()


def alive(found, end):
    """Numbers of the storages that are alive after `end` events."""
    live = Counter()
    for number, nbytes in found.events[:end]:
        live[number] += nbytes
    return [number for number, nbytes in live.items() if nbytes]


def by_category(found, end):
    totals = Counter()
    for number in alive(found, end):
        totals[found.storages[number].category] += found.storages[number].nbytes
    return totals


def born(found, **wanted):
    """Index in the events where the first storage with these attributes was born."""
    for index, (number, nbytes) in enumerate(found.events):
        storage = found.storages[number]
        if nbytes > 0 and all(getattr(storage, key) == value for key, value in wanted.items()):
            return index
    raise AssertionError(wanted)


def test_the_record_begins_with_the_model(plain):
    start = [plain.storages[number] for number, _ in plain.events[: plain.begins[0]]]
    assert [(s.nbytes, s.category, s.module, s.phase) for s in start] == [
        (32768, Category.PARAMETER, "0", Phase.START),
        (512, Category.PARAMETER, "0", Phase.START),
        (8192, Category.PARAMETER, "2", Phase.START),
        (64, Category.PARAMETER, "2", Phase.START),
    ]


def test_what_the_forward_keeps(plain):
    at = born(plain, phase=Phase.BACKWARD, update=1)
    assert by_category(plain, at) == {
        Category.PARAMETER: PARAMETERS,
        Category.OPTIMIZER: STATE,
        Category.INPUT: BATCH,
        Category.ACTIVATION: HIDDEN + OUTPUT + 4 + 4,  # what ReLU and square save, the loss, its gradient
    }


def test_what_is_alive_after_the_backward(plain):
    at = born(plain, phase=Phase.OPTIMIZER, update=1)
    assert by_category(plain, at) == {
        Category.PARAMETER: PARAMETERS,
        Category.GRADIENT: PARAMETERS,
        Category.OPTIMIZER: STATE,
        Category.INPUT: BATCH,
        Category.ACTIVATION: 4,  # the loss
    }


def test_the_peak_is_in_the_optimizer_to_the_byte(plain):
    """AdamW of the largest weight has a root and a quotient of its size at once; besides loss, norm and verdict."""
    peak, at = peak_of(plain.events)
    made = plain.storages[plain.events[at][0]]
    assert (made.op, made.phase) == ("aten.div", Phase.OPTIMIZER)
    assert peak == 2 * PARAMETERS + STATE + BATCH + 2 * 32768 + 4 + 4 + 1


def test_gradients_belong_to_the_modules_whose_forward_made_their_nodes(plain):
    found = {
        (s.module, s.nbytes) for s in plain.storages if s.category is Category.GRADIENT and s.phase is Phase.BACKWARD
    }
    assert found == {("0", 32768), ("0", 512), ("2", 8192), ("2", 64)}


def test_what_dies_in_the_forward_is_temporary(plain):
    before_relu = next(s for s in plain.storages if s.op == "aten.addmm" and s.module == "0")
    assert before_relu.category is Category.TEMPORARY and before_relu.nbytes == HIDDEN


def test_each_storage_dies_at_most_once_and_as_large_as_it_was_born(plain):
    seen = Counter()
    for number, nbytes in plain.events:
        seen[number, nbytes > 0] += 1
        assert abs(nbytes) == plain.storages[number].nbytes
    assert set(seen.values()) == {1}
    assert all((number, True) in seen for number, _ in seen)


def test_momentum_has_half_the_state():
    found = traced(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    assert by_category(found, len(found.events))[Category.OPTIMIZER] == PARAMETERS


def test_micro_batches_keep_gradients_and_one_forward_at_a_time():
    found = traced(batch=lambda: [(torch.ones(16, 64),), (torch.ones(16, 64),)])
    kept = by_category(found, born(found, phase=Phase.BACKWARD, update=1))
    assert kept[Category.INPUT] == BATCH
    assert HIDDEN // 2 + OUTPUT // 2 <= kept[Category.ACTIVATION] <= HIDDEN // 2 + OUTPUT // 2 + 16
    assert found.micro_batches == 2


def test_inference_keeps_nothing_and_needs_no_state():
    found = traced(mode="inference")
    peak, at = peak_of(found.events)
    assert peak == PARAMETERS + BATCH + 2 * HIDDEN
    assert found.storages[found.events[at][0]].op == "aten.relu"
    assert not any(s.category in (Category.OPTIMIZER, Category.GRADIENT) for s in found.storages)


class Twice(nn.Module):
    """Its hidden layer is used three times, so its gradient comes in parts."""

    def __init__(self):
        super().__init__()
        self.stem, self.heads = nn.Linear(64, 128), nn.ModuleList(nn.Linear(128, 128) for _ in range(3))

    def forward(self, x):
        hidden = self.stem(x)
        return sum(torch.tanh(head(hidden)) for head in self.heads)


def test_parts_of_a_gradient_are_added_in_place():
    """The first part is a product of its own, not a view: the engine writes the sum into it (no new storage)."""
    found = traced(Twice)
    sums = [s for s in found.storages if s.op == "aten.add" and s.phase is Phase.BACKWARD and s.update == 1]
    live, most = Counter(), 0
    for number, nbytes in found.events[born(found, phase=Phase.BACKWARD, update=1) :]:
        live[number] += nbytes
        if found.storages[number].phase is Phase.BACKWARD:
            parts = [n for n, b in live.items() if b > 0 and found.storages[n].nbytes == HIDDEN]
            most = max(most, len([n for n in parts if found.storages[n].op in ("aten.mm", "aten.add")]))
    assert not sums and most == 2


def test_a_model_that_fails_leaves_no_mode_behind():
    def fails(model, batch):
        raise ZeroDivisionError

    before = torch.get_rng_state()
    with pytest.raises(ModelError, match="does not run: ZeroDivisionError"):
        traced(loss=fails)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(torch.ones(1) + 1) is torch.Tensor
    assert torch.ones(300, 300).untyped_storage().data_ptr() != 0


def test_costs_are_of_the_last_update(plain):
    products = {
        (phase, op): cost.flops
        for (phase, op, *_), cost in plain.costs.items()
        if cost.flops and op in ("aten.addmm", "aten.mm")
    }
    forward = 2 * 32 * (64 * 128 + 128 * 16)
    assert sum(c.flops for (phase, *_), c in plain.costs.items() if phase is Phase.FORWARD) == forward
    assert plain.flops == forward + 2 * 32 * (64 * 128 + 2 * 128 * 16)  # no gradient for the batch
    assert products
