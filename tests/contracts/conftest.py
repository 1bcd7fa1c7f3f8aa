"""What the contracts leave behind in torch, and how it goes away again."""

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="module", autouse=True)
def one_rank_group():
    """Sharding in one process: a group of one rank, made by the technique, gone afterwards."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def forgotten_graphs():
    """torch keeps compiled graphs by code, not by model: those of one test count against the next one's limit."""
    yield
    torch._dynamo.reset()
