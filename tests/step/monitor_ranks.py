"""What two gloo processes do for test_monitor_ranks: monitor sharded gradients. Rank 0 prints what it saw as JSON.

python monitor_ranks.py    under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
"""

import json
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import floatline as fl
from floatline.step.norm import norms_of


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))  # its last layer has no rows for rank 1


def look(model: nn.Module) -> dict:
    model(torch.linspace(-1, 1, 12).view(4, 3)).square().sum().backward()
    monitor = fl.GradientMonitor(model)
    with CommDebugMode() as exchanges:
        norms_of(model.named_parameters())
    healthy = monitor.check()
    first = model[0].weight.grad
    local = first.to_local() if isinstance(first, DTensor) else first
    if dist.get_rank() == 1 or not isinstance(first, DTensor):
        local[-1, 0] = float("nan")  # an element that one rank alone has
    model[2].bias.grad = None
    bad = monitor.check()
    return {
        "numbers": [healthy.norm, healthy.largest, healthy.mean],
        "bad": [[one.name, one.nan, one.inf, one.elements] for one in bad.bad],
        "missing": bad.missing,
        "rows": monitor.history.rows.table()[0],
        "exchanges": exchanges.get_total_counts(),
    }


def partly(model: nn.Module) -> nn.Module:
    """Shard one layer and leave the other whole, as `ignored_params` does."""
    fully_shard(model[0])
    return model


def main() -> None:
    dist.init_process_group("gloo")
    sharded = fully_shard(make())
    seen = {"whole": look(make()), "sharded": look(sharded), "partly": look(partly(make()))}
    both: list = [None, None]
    dist.all_gather_object(both, seen)
    if dist.get_rank() == 0:
        with open(os.environ["RESULT"], "w") as file:
            json.dump(both, file)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends in the usual way while one of them is at work


if __name__ == "__main__":
    main()
