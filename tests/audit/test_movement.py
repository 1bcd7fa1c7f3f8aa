"""Movement of a low tensor beside its fp64 twin, on paths whose answer is known."""

import pytest
import torch

from floatline.audit.movement import Movement, Track


def follow(exact_path, low_path):
    """Return the movement along two lists of positions, the first being the start."""
    at = {"exact": exact_path[0], "low": low_path[0]}
    track = Track(lambda: at["exact"], lambda: at["low"])
    for exact, low in zip(exact_path[1:], low_path[1:], strict=True):
        at["exact"], at["low"] = exact, low
        track.look()
    return track.movement()


def points(*rows):
    return [torch.tensor(row, dtype=torch.float64) for row in rows]


def test_half_the_way_in_the_right_direction():
    moved = follow(points([0.0, 0.0], [4.0, 0.0]), points([0.0, 0.0], [2.0, 0.0]))
    assert moved == Movement(swallowed=0.0, progress=0.5, ratio=0.5, error=0.5, noise=0.0)


def test_what_lies_across_the_way_is_noise_and_no_progress():
    moved = follow(points([0.0, 0.0], [4.0, 0.0]), points([0.0, 0.0], [4.0, 3.0]))
    assert (moved.progress, moved.ratio, moved.error) == (1.0, 1.25, 0.75)
    assert moved.noise == pytest.approx(0.75 / 2**0.5)


def test_swallowed_counts_updates_and_only_exact_ones_that_are_not_zero():
    exact = points([0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0])
    low = points([0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [4.0, 0.0])
    assert follow(exact, low).swallowed == 0.75


def test_nothing_moved_nothing_to_judge():
    assert follow(points([1.0], [1.0]), points([1.0], [1.0])) == Movement()


def test_elements_that_are_not_finite_are_left_out():
    moved = follow(points([0.0, 0.0], [1.0, 1.0]), points([0.0, 0.0], [1.0, float("inf")]))
    assert moved.progress == 1.0 and moved.error == 0.0


def test_the_ratio_is_the_median_where_exact_is_not_zero():
    track = Track(lambda: torch.tensor([0.0, 1.0, 2.0, 4.0]).double(), lambda: torch.tensor([9.0, 1.0, 1.0, 8.0]))
    assert track.median_ratio() == 1.0
