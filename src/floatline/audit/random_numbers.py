"""Random numbers of an audit: every run draws the same ones, and a reader is told where there are any.

Torch's, Python's and numpy's own generators start at the audit's seed in each run, and go on afterwards as if nothing
had been. A generator that a model holds starts where it stood (model_state.py).

Two runs with one seed and one with another tell what there is. Not covered: numbers from elsewhere (`secrets`, the
clock), and a generator that a plain function holds itself: two runs with one seed differ then, and that is told.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from floatline.step.random_state import python_random_kept

Values = Mapping[str, torch.Tensor]


@contextmanager
def seeded(seed: int, devices: Iterable[torch.device]) -> Iterator[None]:
    """Context in which all random numbers start at a seed; after it they go on as before.

    Args:
        seed: Any whole number that torch takes; numpy gets its lower 32 bits.
        devices: Where the program runs.
    """
    cuda = [device.index or 0 for device in devices if device.type == "cuda"]
    with python_random_kept(), torch.random.fork_rng(devices=cuda):
        torch.random.default_generator.manual_seed(seed)  # torch.manual_seed seeds all devices, in use here or not
        for index in cuda:
            torch.cuda.default_generators[index].manual_seed(seed)
        random.seed(seed)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed(seed % 2**32)
        yield


def randomness(run: Callable[[int], Values], seed: int, who: str, when: str = "") -> str:
    """Say where a program gives other results from run to run, or with another seed.

    Args:
        run: Seed -> what the program gives, by name.
        seed: That of the audit.
        who: What the program is called.
        when: In which state it draws them.

    Returns:
        One sentence; empty where all runs are alike.
    """
    first, again, other = run(seed), run(seed), run(seed + 1)
    if not _same(first, again):
        return f"two runs of {who} with one seed differ by up to {_off(first, again):.2g}: that is in every error below"
    return "" if _same(first, other) else f"{who} draws random numbers{when}; every run uses seed {seed}"


def _same(one: Values, other: Values) -> bool:
    return one.keys() == other.keys() and all(_equal(value, other[name]) for name, value in one.items())


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two tensors are alike, NaN being like NaN."""
    if one.shape != other.shape:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())


def _off(one: Values, other: Values) -> float:
    """Return the largest distance between two runs; infinite where they gave tensors of other shapes."""
    if one.keys() != other.keys() or any(a.shape != other[name].shape for name, a in one.items()):
        return math.inf
    return max(
        float((a.double() - other[name].double()).nan_to_num(math.inf).abs().max())
        for name, a in one.items()
        if a.numel()
    )
