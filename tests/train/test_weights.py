"""Weights and sharded state in and out of a checkpoint directory, in a group of one; several ranks: test_sharded.py."""

import copy

import pytest
import torch
from torch import nn

import floatline as fl
from floatline.techniques.distributed.groups import leave_ranks
from floatline.techniques.distributed.shards import full_tensor, is_sharded
from floatline.train.adapter_weights import make_weights
from floatline.train.checkpoint import STATE
from floatline.train.weights import PlainWeights, ShardedWeights, _emptied, _filled, _keys_in


class Saved:
    """Stands for a processor."""

    def save_pretrained(self, directory):
        (directory / "processor.txt").write_text("processor")


class Net(nn.Module):
    """Saves itself as transformers' models do."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(5, 5, bias=False)
        self.head.weight = self.layers[0][0].weight
        self.norm = nn.BatchNorm1d(5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(self.head(x)).square().mean()

    def save_pretrained(self, directory, state_dict=None):
        torch.save(state_dict or self.state_dict(), directory / "model.pt")


def load(path):
    model = Net(seed=5)
    model.load_state_dict(torch.load(path / "model.pt"))
    return model


@pytest.fixture(autouse=True)
def one_group_a_test():
    yield
    leave_ranks()


def make(techniques=(), seed=0):
    return fl.TrainStep(Net(seed), torch.optim.AdamW, precision="32-true", techniques=list(techniques))


def save(step, directory):
    weights = make_weights(step, Saved(), load)
    plain, shards = weights.split(step.state_dict())
    weights.write(directory, shards)
    torch.save(plain, directory / STATE)
    return plain, shards


def values(step):
    """Everything that training changes, whole."""
    found = {name: full_tensor(p.detach()).clone() for name, p in step.model.state_dict().items()}
    for index, state in enumerate(step.optimizer.state.values()):
        found |= {f"{index}.{key}": full_tensor(value).clone() for key, value in state.items()}
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("before", [[], ["sharding"]], ids=["plain", "sharded"])
@pytest.mark.parametrize("after", [[], ["sharding"]], ids=["to plain", "to sharded"])
def test_any_kind_reads_any_kind(tmp_path, before, after):
    step = make(before)
    step(X)
    save(step, tmp_path)
    assert (tmp_path / "shards").is_dir() == bool(before) and (tmp_path / "processor.txt").exists()
    other = make(after, seed=1)
    other(X)
    weights = make_weights(other, Saved(), load)
    assert type(weights) is (ShardedWeights if after else PlainWeights)
    state = weights.resume(tmp_path)
    weights.read(tmp_path)
    other.load_state_dict(state)
    assert same(values(step), values(other)) and other.updates == 1
    step(X), other(X)
    assert same(values(step), values(other))


class Wide(Net):
    """Large enough for low-bit state, which leaves tensors of less than 4096 elements alone."""

    def __init__(self, seed=0):
        nn.Module.__init__(self)
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, x):
        return self.down(self.up(x).tanh()).square().mean()


def load_wide(path):
    model = Wide()
    model.load_state_dict(torch.load(path / "model.pt"))
    return model


@pytest.mark.parametrize("before", [["low_bit_optimizer"], ["low_bit_optimizer", "sharding"]], ids=["plain", "sharded"])
@pytest.mark.parametrize("after", [["low_bit_optimizer"], ["low_bit_optimizer", "sharding"], []], ids=str)
def test_low_bit_state_goes_through_shards_as_what_it_stands_for(tmp_path, before, after):
    pytest.importorskip("torchao")
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    step, other = (
        fl.TrainStep(Wide(seed), torch.optim.AdamW, precision="32-true", techniques=techniques)
        for seed, techniques in enumerate((before, after))
    )
    step(x)
    weights = make_weights(step, Saved(), load_wide)
    plain, shards = weights.split(step.state_dict())
    assert all(type(shard.to_local()) is torch.Tensor for shard in shards.values())
    weights.write(tmp_path, shards)
    torch.save(plain, tmp_path / STATE)
    weights = make_weights(other, Saved(), load_wide)
    other.load_state_dict(weights.resume(tmp_path))
    weights.read(tmp_path)
    assert float(step(x).loss) == float(other(x).loss)
    assert float(step(x).loss) == pytest.approx(float(other(x).loss), rel=5e-3)  # the moments were quantised anew


def test_the_model_directory_is_whole_and_ties_stay_ties(tmp_path):
    step = make(["sharding"])
    with torch.no_grad():
        step.model.eval()(X)  # leaves the root's weights gathered
    save(step, tmp_path)
    written = torch.load(tmp_path / "model.pt")
    assert written.keys() == Net().state_dict().keys()
    assert written["head.weight"].data_ptr() == written["layers.0.0.weight"].data_ptr()
    assert same(written, Net().state_dict())


def test_tensors_in_shards_leave_their_keys():
    step = make(["sharding"])
    step(X)
    state = step.state_dict()
    shards = {}
    plain = _emptied(state, "state", shards)
    assert "state.optimizer.state.0.exp_avg" in shards and all(map(is_sharded, shards.values()))
    assert sorted(_keys_in(plain)) == sorted(shards)
    assert not any(is_sharded(leaf) for leaf in plain["optimizer"]["state"][0].values() if torch.is_tensor(leaf))
    assert plain["optimizer"]["state"][0]["step"] == 1
    back = _filled(copy.deepcopy(plain), shards)
    assert back["optimizer"]["state"][0]["exp_avg"] is shards["state.optimizer.state.0.exp_avg"]
    assert back["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]


def test_a_failed_write_is_the_ranks_own_error(tmp_path):
    step = make(["sharding"])
    (tmp_path / "shards").write_text("in the way")
    with pytest.raises(OSError, match="shards"):
        save(step, tmp_path)
