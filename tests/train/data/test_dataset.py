from __future__ import annotations

import pytest
import torch

from floatline.errors import ConfigError
from floatline.train.data import SampleDataset


class CountingEncoder:
    """Encodes number n as n + 1 tokens and counts how often it is asked."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def encode(self, sample: int) -> dict[str, torch.Tensor]:
        self.calls.append(sample)
        return {"input_ids": torch.full((10,), sample)}


def test_without_a_cache_each_access_encodes():
    encoder = CountingEncoder()
    data = SampleDataset([5, 6], encoder)
    assert len(data) == 2
    assert data[0]["input_ids"][0] == data[0]["input_ids"][0] == 5
    assert encoder.calls == [5, 5]


def test_the_cache_keeps_what_fits_and_stays_within_its_bytes():
    encoder = CountingEncoder()
    data = SampleDataset([5, 6, 7], encoder, cache_bytes=170)  # two samples of 80 bytes
    for _ in range(3):
        assert [int(data[index]["input_ids"][0]) for index in range(3)] == [5, 6, 7]
    assert encoder.calls == [5, 6, 7, 7, 7]
    assert data.cached_bytes == 160


def test_a_caller_that_adds_a_key_does_not_change_the_cache():
    data = SampleDataset([5], CountingEncoder(), cache_bytes=1000)
    data[0]["extra"] = torch.zeros(1)
    data[0]["extra"] = torch.zeros(1)
    assert list(data[0]) == ["input_ids"]


def test_a_negative_cache_is_an_error():
    with pytest.raises(ConfigError, match=r"data.cache_bytes=-1"):
        SampleDataset([], CountingEncoder(), cache_bytes=-1)
