from __future__ import annotations

import io
import subprocess
import sys
from itertools import chain, islice
from typing import Any

import pytest
import torch

from floatline.errors import ConfigError, DataError
from floatline.techniques import Batching
from floatline.train.data import Collator, MicroBatches, SampleDataset, SampleEncoder, make_loader, read_samples

EPOCHS = 3


class Numbers(torch.utils.data.Dataset):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def loader_of(size: int = 11, **changes: Any) -> Any:
    settings = {"batch_size": 3, "collate": list, "shuffle": True, "seed": 5, "num_workers": 0, "drop_last": False}
    return make_loader(Numbers(size), **{**settings, **changes})


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """The state as a checkpoint file gives it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run(loader: Any, epoch: int = 0, stop: tuple[int, int] | None = None) -> tuple[list[Any], dict[str, Any]]:
    """Train as the loop does: returns (epoch, batch) pairs and what was saved at `stop` = (epoch, batches done)."""
    seen, state = [], {}
    for number in range(epoch, EPOCHS):
        if stop == (number, 0):
            return seen, saved({"epoch": number, "loader": loader.state_dict()})
        for done, batch in enumerate(loader, start=1):
            seen.append((number, batch))
            if stop == (number, done):
                return seen, saved({"epoch": number, "loader": loader.state_dict()})
    return seen, state


WHOLE = {  # size -> drop_last: 11 has a tail, 9 has none
    (size, drop_last): run(loader_of(size, drop_last=drop_last))[0] for size in (11, 9) for drop_last in (False, True)
}


def check(size: int, drop_last: bool, stop: tuple[int, int], before: int, after: int) -> None:
    first, state = run(loader_of(size, drop_last=drop_last, num_workers=before), stop=stop)
    loader = loader_of(size, drop_last=drop_last, num_workers=after)
    loader.load_state_dict(state["loader"])
    rest, _ = run(loader, state["epoch"])
    assert first + rest == WHOLE[size, drop_last]


@pytest.mark.parametrize("key", WHOLE, ids=str)
def test_an_epoch_is_a_permutation_in_batches(key):
    size, drop_last = key
    for epoch in range(EPOCHS):
        batches = [batch for number, batch in WHOLE[key] if number == epoch]
        flat = [index for batch in batches for index in batch]
        assert len(set(flat)) == len(flat) == (size - size % 3 if drop_last else size)
        assert len(batches) == len(loader_of(size, drop_last=drop_last))


@pytest.mark.parametrize("key", WHOLE, ids=str)
def test_resuming_after_any_batch_equals_not_stopping(key):
    per_epoch = len(WHOLE[key]) // EPOCHS
    for epoch in range(EPOCHS):
        for done in range(per_epoch + 1):
            check(*key, (epoch, done), 0, 0)


@pytest.mark.parametrize("key", WHOLE, ids=str)
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 0), (0, 2)])
def test_resuming_with_workers_equals_not_stopping(key, before, after):
    per_epoch = len(WHOLE[key]) // EPOCHS
    for stop in ((0, 0), (0, 1), (1, per_epoch), (2, 0)):
        check(*key, stop, before, after)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_twice_equals_not_stopping(workers):
    first, state = run(loader_of(num_workers=workers), stop=(0, 2))
    loader = loader_of(num_workers=workers)
    loader.load_state_dict(state["loader"])
    state = {**state, "loader": saved(loader.state_dict())}  # saved again before a batch was drawn
    loader = loader_of(num_workers=workers)
    loader.load_state_dict(state["loader"])
    second, state = run(loader, state["epoch"], stop=(1, 1))
    loader = loader_of(num_workers=workers)
    loader.load_state_dict(state["loader"])
    third, _ = run(loader, state["epoch"])
    assert first + second + third == WHOLE[11, False]


def test_workers_are_not_forks_of_the_training_process():
    context = loader_of(num_workers=2).multiprocessing_context
    assert context.get_start_method() == "forkserver"


def test_workers_end_with_a_killed_run():
    code = (
        "import os; from floatline.train.data import make_loader\n"
        "loader = make_loader(range(11), batch_size=3, collate=list, num_workers=2)\n"
        "next(iter(loader)); os.kill(os.getpid(), 9)"
    )
    # The workers hold the pipe too: its end comes when the last one is gone.
    out = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60, check=False)
    assert out.returncode == -9


def test_what_cannot_be_sent_to_workers_is_named():
    loader = loader_of(num_workers=2, collate=lambda samples: samples)
    with pytest.raises(ConfigError, match=r"2 worker processes: .*lambda.*(\n|.)*num_workers=0"):
        next(iter(loader))


def test_a_new_process_draws_the_same_order(tmp_path):
    code = (
        "import sys, torch; from floatline.train.data import make_loader\n"
        "loader = make_loader(range(11), batch_size=3, collate=list, seed=5, drop_last=False)\n"
        "loader.load_state_dict(torch.load(sys.argv[1], weights_only=True)['loader'])\n"
        "print([batch for batch in loader])"
    )
    _, state = run(loader_of(), stop=(1, 2))
    torch.save(state, tmp_path / "state.pt")
    out = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "state.pt"], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == str([batch for epoch, batch in WHOLE[11, False] if epoch == 1][2:])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_global_random_state_is_left_alone(workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(loader_of(num_workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_of_other_data_is_refused():
    _, state = run(loader_of(11), stop=(0, 1))
    with pytest.raises(DataError, match="samples=11, now samples=12"):
        loader_of(12).load_state_dict(state["loader"])
    with pytest.raises(DataError, match="not one of this loader"):
        loader_of(12).load_state_dict({"step": 3})


class Broken(Numbers):
    def __getitem__(self, index: int) -> int:
        if index == 7:
            raise DataError("data.jsonl:8: image a.png does not exist", hint="put it back")
        return index


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_error_stays_itself_on_its_way_out_of_a_worker(workers):
    loader = make_loader(Broken(11), batch_size=3, collate=list, num_workers=workers, drop_last=False)
    with pytest.raises(DataError) as caught:
        list(loader)
    assert caught.value.message == "data.jsonl:8: image a.png does not exist"
    assert caught.value.hint == "put it back"


def test_no_warnings_are_printed(recwarn):
    list(loader_of(num_workers=2))
    assert [str(warning.message) for warning in recwarn] == []


def test_too_little_data_is_an_error_with_a_way_out():
    with pytest.raises(DataError, match="2 samples cannot fill one batch of 3") as caught:
        loader_of(2, drop_last=True)
    assert "train.batch_size=2" in caught.value.hint
    assert list(loader_of(2, drop_last=False, shuffle=False)) == [[0, 1]]
    with pytest.raises(DataError, match="the data set is empty"):
        loader_of(0)


def test_bad_numbers_are_errors():
    with pytest.raises(ConfigError, match="batch_size=0"):
        loader_of(batch_size=0)
    with pytest.raises(ConfigError, match="num_workers=-1"):
        loader_of(num_workers=-1)


@pytest.mark.parametrize("workers", [0, 2])
def test_from_jsonl_to_batches(write, talk, picture, processor, workers):
    names = [picture(f"{n}.png", (32 * n, 32)) for n in (1, 2, 3, 4)]
    samples = read_samples(write(*(talk("Which?", str(n), images=(name,)) for n, name in enumerate(names))))
    data = SampleDataset(samples, SampleEncoder(processor), cache_bytes=10**6)
    loader = make_loader(data, batch_size=2, collate=Collator(0), num_workers=workers)
    for _ in range(2):
        batches = list(loader)
        assert [batch["input_ids"].shape[0] for batch in batches] == [2, 2]
        assert sum(len(batch["pixel_values"]) for batch in batches) == 4 * (1 + 2 + 3 + 4)


def test_importing_the_data_part_loads_nothing_heavy():
    code = (
        "import sys, floatline.train.data\n"
        "print([name for name in ('transformers', 'torchdata', 'PIL', 'jinja2') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


class Watched(Numbers):
    """Notes which samples were loaded."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.loaded: set[int] = set()

    def __getitem__(self, index: int) -> int:
        self.loaded.add(index)
        return index


TOKENS = [1 + (7 * index) % 20 for index in range(26)]
BUCKETING = {
    "none": {},
    "order": {"bucketing": Batching(window=3), "lengths": TOKENS},
    "tokens": {"bucketing": Batching(window=2, max_tokens=24), "lengths": TOKENS},
}


def flat(batch: Any) -> list[int]:
    return [index for part in batch for index in (part if isinstance(part, list) else [part])]


def shared(ranks: int, way: str, **changes: Any) -> list[Any]:
    settings = {"batch_size": 4, "drop_last": True, **BUCKETING[way], **changes}
    return [loader_of(26, rank=rank, ranks=ranks, **settings) for rank in range(ranks)]


@pytest.mark.parametrize("way", BUCKETING)
@pytest.mark.parametrize("workers", [0, 2])
def test_every_number_of_ranks_makes_the_same_updates(way, workers):
    (alone,) = shared(1, way)
    others = {ranks: shared(ranks, way, num_workers=workers) for ranks in (2, 4)}
    for _ in range(2):
        updates = [sorted(flat(batch)) for batch in alone]
        assert len(updates) == 6 == len(alone)
        for loaders in others.values():
            parts = [list(loader) for loader in loaders]
            assert [sorted(chain.from_iterable(map(flat, step))) for step in zip(*parts, strict=True)] == updates


@pytest.mark.parametrize("way", BUCKETING)
def test_a_rank_loads_its_own_samples_only(way):
    sets = []
    for rank in range(2):
        data = Watched(26)
        settings = {"batch_size": 4, "collate": list, "seed": 5, "rank": rank, "ranks": 2, **BUCKETING[way]}
        drawn = [index for batch in make_loader(data, **settings) for index in flat(batch)]
        assert data.loaded == set(drawn)
        sets.append(data.loaded)
    assert not sets[0] & sets[1] and len(sets[0] | sets[1]) == 24
    if way != "tokens":
        assert len(sets[0]) == len(sets[1]) == 12


def test_micro_batches_keep_the_budget_and_are_as_many_on_each_rank():
    for ranks in (1, 2, 4):
        for step in zip(*shared(ranks, "tokens"), strict=True):
            assert len({len(part) for part in step}) == 1
            for micro in chain.from_iterable(step):
                assert len(micro) * max(TOKENS[index] for index in micro) <= 24
    whole = loader_of(11, bucketing=Batching(max_tokens=99), lengths=[3] * 11, drop_last=True)
    assert all(len(batch) == 1 and len(batch[0]) == 3 for batch in whole)  # a list, also of one micro-batch


@pytest.mark.parametrize("way", BUCKETING)
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2), (1, 1)])
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_on_another_number_of_ranks(way, before, after, workers):
    def updates(loaders, count=None):
        return [sorted(chain.from_iterable(map(flat, step))) for step in islice(zip(*loaders, strict=True), count)]

    whole = updates(shared(1, way))
    first = shared(before, way, num_workers=workers)
    done = updates(first, 3)
    states = [saved(loader.state_dict()) for loader in first]
    later = shared(after, way, num_workers=workers)
    for loader in later:
        loader.load_state_dict(states[-1])
    assert done + updates(later) == whole


def test_bucketing_puts_like_lengths_together():
    def spread(way):
        return sum(max(TOKENS[i] for i in b) - min(TOKENS[i] for i in b) for b in map(flat, shared(1, way)[0]))

    assert spread("order") < 0.6 * spread("none")


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(9))


def test_bad_bucketing_is_an_error_with_a_way_out():
    some = {"batch_size": 3, "collate": list}
    with pytest.raises(DataError, match=r"batching\(max_tokens=8\) needs the length .* Stream is a stream") as caught:
        make_loader(Stream(), bucketing=Batching(max_tokens=8), **some)
    assert "give the number of tokens of each sample" in caught.value.hint
    with pytest.raises(DataError, match="Stream is a stream without lengths, so its position cannot be saved"):
        make_loader(Stream(), **some)
    with pytest.raises(DataError, match="lengths is None"):
        loader_of(bucketing=Batching())
    with pytest.raises(DataError, match="3 lengths for 11 samples"):
        loader_of(bucketing=Batching(), lengths=[1, 2, 3])
    with pytest.raises(DataError, match=r"sample 4 has 9 tokens, more than batching\.max_tokens=8") as caught:
        loader_of(bucketing=Batching(max_tokens=8), lengths=[1] * 4 + [9] + [1] * 6)
    assert caught.value.hint == "set batching.max_tokens=9 or more, or shorten the sample"
    with pytest.raises(ConfigError, match="batches are cut twice: by batching"):
        loader_of(bucketing=Batching(max_tokens=8), lengths=[1] * 11, collate=MicroBatches(Collator(0), 2))


def test_bad_ranks_are_errors():
    with pytest.raises(ConfigError, match="a batch of 3 samples cannot be shared out evenly to 2 ranks") as caught:
        loader_of(ranks=2, drop_last=True)
    assert "train.batch_size=4" in caught.value.hint
    with pytest.raises(ConfigError, match="several ranks need drop_last=True"):
        loader_of(batch_size=4, ranks=2)
    with pytest.raises(ConfigError, match="rank=2 of ranks=2"):
        loader_of(batch_size=4, rank=2, ranks=2, drop_last=True)
