"""A map-style data set that encodes samples when they are asked for, and keeps what fits into its cache.

The cache fills up and then stays: each epoch asks for every sample once, in a new order, and a cache that evicts the
oldest would throw out every sample just before it is asked for again. Worker processes have a cache each and share
the budget.

Not covered: a cache on disk.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from floatline.errors import ConfigError
from floatline.train.data.encode import SampleEncoder
from floatline.train.data.samples import Sample


class SampleDataset(Dataset[dict[str, Tensor]]):
    """Samples as encoded tensors.

    Args:
        samples: What to encode.
        encoder: How.
        cache_bytes: Memory for encoded samples; 0 encodes anew on each access.

    Raises:
        ConfigError: A negative `cache_bytes`.
    """

    def __init__(self, samples: Sequence[Sample], encoder: SampleEncoder, *, cache_bytes: int = 0) -> None:
        if cache_bytes < 0:
            raise ConfigError(f"data.cache_bytes={cache_bytes} is negative", hint="give 0 for no cache")
        self.samples = samples
        self.encoder = encoder
        self.cache_bytes = cache_bytes
        self.cached_bytes = 0
        self._cache: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of one sample.

        Raises:
            DataError: As `SampleEncoder.encode`.
            IndexError: No such sample.
        """
        if index in self._cache:
            return dict(self._cache[index])
        encoded = self.encoder.encode(self.samples[index])
        size = sum(tensor.nbytes for tensor in encoded.values())
        if self.cached_bytes + size <= self._budget():
            self._cache[index] = encoded
            self.cached_bytes += size
        return dict(encoded)

    def _budget(self) -> int:
        worker = get_worker_info()
        return self.cache_bytes // worker.num_workers if worker else self.cache_bytes
