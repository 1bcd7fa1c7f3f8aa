"""Make a group of ranks: with torchrun's other processes, of this one alone, or a pretended one.

torchrun starts one process a GPU and tells each its rank, their number and where to meet in environment variables.
Without it a group of one needs no network. `fake_ranks` pretends a rank of many, for planning.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from floatline.techniques.distributed.ranks import PretendedRanks, RankGroup


def launched() -> tuple[int, int]:
    """Return this process's rank and how many torchrun has started, (0, 1) where it was not used."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def join_ranks(device_type: str) -> RankGroup:
    """Return the group of all ranks; where none exists it is made, under torchrun with the others, else of one.

    Args:
        device_type: "cpu" (gloo) or "cuda" (NCCL, and gloo for what the hosts tell each other).
    """
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        if launched()[1] > 1:
            if device_type == "cuda":
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    return PretendedRanks(group) if dist.get_backend(group) == "fake" else RankGroup(group)


def leave_ranks() -> None:
    """End the group of all ranks, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def fake_ranks(size: int) -> Iterator[None]:
    """Pretend, in this one process, to be rank 0 of `size`: shards have their real sizes, collectives move nothing.

    For planning: memory and shapes are those of a real rank, numbers are not.

    Args:
        size: How many ranks to pretend.

    Raises:
        RuntimeError: A process group exists already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("fake_ranks needs a process without a process group: end it with leave_ranks() first")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
