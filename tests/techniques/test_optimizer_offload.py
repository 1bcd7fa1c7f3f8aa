"""State on the host: bit-identical for every optimizer, in buckets, through its own copies, with and without."""

import pytest
import torch

import floatline as fl
from floatline.errors import ConfigError
from floatline.techniques.optim_steps.partial_step import state_bytes
from floatline.techniques.optimizer_offload import HostStore, OffloadedOptimizer

from .optimizer_cases import data, make, mse, net, resumed, same, through_a_file, train

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"])
def test_bit_identical_on_every_model(case, precision):
    models = []
    for techniques in ([], ["optimizer_offload(bucket_bytes=3000)"]):
        model, step = make(techniques, precision, model=case.build(), loss=case.loss)
        train(step, [case.batch(0), [case.batch(1), case.batch(2)], case.batch(3)])
        models.append(model)
    assert same(*models)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bucket", [1, 50_000, 2**30])
def test_bit_identical_for_every_optimizer(name, bucket):
    """With the copies made, as on a GPU."""
    plain, ours = net(), net()
    reference = OPTIMIZERS[name](plain.parameters())
    optimizer = OffloadedOptimizer(OPTIMIZERS[name](ours.parameters()), bucket, HostStore(always=True))
    for seed in range(4):
        for model, each in ((plain, reference), (ours, optimizer)):
            mse(model, data(seed)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            each.step()
            each.zero_grad()
    assert same(plain, ours)
    left, right = reference.state_dict()["state"], optimizer.state_dict()["state"]
    assert left.keys() == right.keys()
    for key, state in left.items():
        for what, value in state.items():
            assert (
                torch.equal(value, right[key][what]) if isinstance(value, torch.Tensor) else value is right[key][what]
            )


def test_only_one_bucket_and_the_next_are_out_at_a_time():
    class Watched(HostStore):
        out, most = 0, 0

        def fetch(self, parameter, state):
            super().fetch(parameter, state)
            self.out = len(self._buffers)
            self.most = max(self.most, self.out)

    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64, bias=False) for _ in range(6)])
    store = Watched(always=True)
    bucket = 2 * 4 * 64 * 64  # one layer's two moments
    optimizer = OffloadedOptimizer(torch.optim.AdamW(model.parameters()), bucket, store)
    for _ in range(3):
        model(torch.ones(1, 64)).sum().backward()
        optimizer.step()
    assert store.most == 4 and not store._buffers  # two layers, two moments each


def test_host_buffers_are_kept():
    model = net()
    optimizer = OffloadedOptimizer(torch.optim.AdamW(model.parameters()), 2**30, HostStore(always=True))
    places = []
    for seed in range(3):
        mse(model, data(seed)).backward()
        optimizer.step()
        places.append([state["exp_avg"].data_ptr() for state in optimizer.state.values()])
    assert places[0] == places[1] == places[2]


def test_resumes_bit_for_bit_and_loads_with_and_without():
    assert same(*resumed(["optimizer_offload(bucket_bytes=10000)"]))
    (plain, one), (ours, two) = make(), make(["optimizer_offload"])
    train(one, map(data, range(2)))
    ours.load_state_dict(plain.state_dict())
    two.load_state_dict(through_a_file(one.state_dict()))
    train(one, [data(2)]), train(two, [data(2)])
    assert same(plain, ours)
    one.load_state_dict(through_a_file(two.state_dict()))
    train(one, [data(3)]), train(two, [data(3)])
    assert same(plain, ours)


@pytest.mark.parametrize("bits", [8, 4, "fp8"])
def test_low_bit_state_travels_too(bits):
    pytest.importorskip("torchao")
    low = fl.techniques.LowBitOptimizer(bits=bits)
    plain, one = make([low])
    ours, two = make([fl.techniques.OptimizerOffload(bucket_bytes=9000), low])
    two.optimizer.store.always = True
    train(one, map(data, range(3))), train(two, map(data, range(3)))
    assert same(plain, ours)
    assert same(*resumed([low, "optimizer_offload(bucket_bytes=9000)"]))


def test_undo_leaves_the_optimizer_whole():
    plain, ours = net(), net()
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-3)
    _, step = make(["optimizer_offload"], optimizer=optimizer, model=ours)
    step.optimizer.store.always = True
    _, other = make(optimizer=reference, model=plain)
    train(step, [data(0)]), train(other, [data(0)])
    assert step.stack.facts() == {"optimizer_offload.host_bytes": float(state_bytes(reference))}
    step.undo()
    for model, each in ((plain, reference), (ours, optimizer)):
        mse(model, data(1)).backward()
        each.step()
    assert same(plain, ours)


def test_schedules_go_on_working(recwarn):
    models = []
    for techniques in ([], ["optimizer_offload"]):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
        _, step = make(techniques, optimizer=optimizer, model=model, schedule=schedule)
        train(step, map(data, range(4)))
        assert optimizer.param_groups[0]["lr"] == step.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)
        models.append(model)
    assert same(*models)
    assert not [str(w.message) for w in recwarn if "lr_scheduler" in str(w.message)]


def test_says_that_it_saves_nothing_on_a_cpu():
    _, step = make(["optimizer_offload"])
    assert step.stack.notes == ["optimizer_offload: saves nothing here: on a CPU the state is in host memory already"]


def test_bad_input():
    with pytest.raises(ConfigError, match=r"optimizer_offload.bucket_bytes is 0\nhint: give 1 or more"):
        fl.techniques.OptimizerOffload(bucket_bytes=0)
    model = net()
    before = dict(vars(model))
    with pytest.raises(ConfigError, match="LBFGS runs the model several times in one step"):
        make(["optimizer_offload"], optimizer=torch.optim.LBFGS, model=model)
    assert vars(model) == before
