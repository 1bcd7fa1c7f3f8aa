"""Pools: blocks of a segment lie side by side, nothing overlaps, nothing is lost, and the cache knows what is free."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from floatline.plan.allocator_settings import MIB, AllocatorSettings
from floatline.plan.expandable import ExpandablePool
from floatline.plan.pool import Block, Driver, SegmentPool

STEPS = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 60), st.integers(0, 9)), max_size=80)


def chain_of(block: Block) -> list[Block]:
    """All blocks of the segment that `block` is in."""
    while block.previous is not None:
        block = block.previous
    chain = [block]
    while chain[-1].next is not None:
        assert chain[-1].next.previous is chain[-1]
        chain.append(chain[-1].next)
    return chain


def check(pool: SegmentPool, driver: Driver, live: list[Block]) -> None:
    chains = {id(chain[0]): chain for chain in map(chain_of, [*live, *(entry[2] for entry in pool.cached)])}
    blocks = [block for chain in chains.values() for block in chain]
    for chain in chains.values():
        for left, right in pairwise(chain):
            assert left.address + left.size == right.address  # side by side, so nothing overlaps or is lost
            assert not (left.free and right.free and left.mapped == right.mapped)  # neighbours that are free merged
    assert sum(block.size for block in blocks if block.mapped) == driver.reserved
    assert {id(block) for block in blocks if not block.free} == {id(block) for block in live}
    free = [(block.size, block.address, block) for block in blocks if block.free and block.mapped]
    assert pool.cached == sorted(free, key=lambda entry: entry[:2])
    if isinstance(pool, ExpandablePool):
        gaps = [(block.address, block) for block in blocks if not block.mapped]
        assert pool.unmapped == gaps or not blocks
        assert all(block.address % pool.page == block.size % pool.page == 0 for _, block in gaps)
        assert pool.segments == sum(a.mapped and not b.mapped for chain in chains.values() for a, b in pairwise(chain))
    else:
        assert pool.segments == len(chains)
        starts = sorted(chain[0].address for chain in chains.values())
        ends = sorted(chain[-1].address + chain[-1].size for chain in chains.values())
        assert all(end <= start for end, start in zip(ends, starts[1:]))


@settings(max_examples=200, deadline=None)
@given(STEPS, st.booleans(), st.booleans(), st.integers(20, 200))
def test_blocks_tile_their_segments(steps, by_page, small, capacity):
    """Some random life: requests (in MiB or 16 KiB), frees, and now and then everything cached is returned."""
    driver = Driver(capacity * MIB, None)
    pool = (ExpandablePool if by_page else SegmentPool)(driver, AllocatorSettings(), small=small)
    live: list[Block] = []
    for which, length, kind in steps:
        if kind < 4:
            size = length * 16 * 1024 if small else (length + 2) * MIB
            block = pool.find(size) or pool.grow(size)
            if block is not None:
                assert block.size >= size
                live.append(pool.use(block, size))
        elif kind < 8 and live:
            pool.put_back(live.pop(which % len(live)))
        else:
            held = driver.reserved
            pool.release()
            returned = held - driver.reserved
            assert returned % pool.page == 0 if by_page else returned % (2 * MIB) == 0
            assert live or driver.reserved == 0
        check(pool, driver, live)


@pytest.mark.parametrize("pool", [SegmentPool, ExpandablePool])
def test_equal_blocks_are_taken_from_the_lowest_address(pool):
    made = pool(Driver(None, None), AllocatorSettings(), small=False)
    blocks = [made.use(made.find(5 * MIB) or made.grow(5 * MIB), 5 * MIB) for _ in range(8)]
    for block in (blocks[5], blocks[1], blocks[3]):
        made.put_back(block)
    assert [made.find(5 * MIB).address for _ in range(3)] == sorted(blocks[k].address for k in (1, 3, 5))


def expandable(*sizes: int) -> tuple[ExpandablePool, list[Block]]:
    """A large pool with blocks of so many MiB, side by side from address 0."""
    pool = ExpandablePool(Driver(None, None), AllocatorSettings(), small=False)
    return pool, [pool.use(pool.find(n * MIB) or pool.grow(n * MIB), n * MIB) for n in sizes]


def test_only_whole_pages_are_unmapped_and_only_needed_ones_mapped():
    """The hole 10..65 holds the pages 20..40 and 40..60; 25 MiB over its first part need one of them."""
    pool, blocks = expandable(10, 55, 10)
    pool.put_back(blocks[1])
    pool.release()
    assert [(entry[1] // MIB, entry[0] // MIB) for entry in pool.cached] == [(60, 5), (75, 5), (10, 10)]
    assert (pool.driver.reserved, pool.segments) == (40 * MIB, 2)
    check(pool, pool.driver, [blocks[0], blocks[2]])
    block = pool.grow(25 * MIB)
    assert (block.address, block.size, pool.driver.reserved) == (10 * MIB, 30 * MIB, 60 * MIB)


def test_of_blocks_before_gaps_the_one_that_could_grow_least_is_taken():
    """Free are 10..20 before a gap of 20, 51..60 before one of 40, and 112..120 before the open end; all hold 5."""
    pool, blocks = expandable(10, 30, 11, 49, 12)
    pool.put_back(blocks[1])
    pool.put_back(blocks[3])
    pool.release()
    assert [(entry[1] // MIB, entry[0] // MIB) for entry in pool.cached] == [(112, 8), (51, 9), (10, 10)]
    assert pool.find(5 * MIB).address == 10 * MIB


def test_pages_mapped_before_memory_ran_out_stay():
    """60 MiB fit over two gaps and a free block between them; memory is there for the first gap only."""
    pool, blocks = expandable(20, 20, 20, 20)
    driver = pool.driver
    pool.put_back(blocks[0])
    pool.put_back(blocks[2])
    pool.release()
    pool.put_back(blocks[1])
    assert (driver.reserved, pool.segments) == (40 * MIB, 2)
    driver.capacity = 60 * MIB
    assert pool.grow(60 * MIB) is None
    assert (driver.reserved, pool.segments) == (60 * MIB, 2)
    assert [entry[:2] for entry in pool.cached] == [(40 * MIB, 0)]
    check(pool, driver, [blocks[3]])
    driver.capacity = 80 * MIB
    whole = pool.grow(60 * MIB)
    assert (whole.address, whole.size, driver.reserved, pool.segments) == (0, 60 * MIB, 80 * MIB, 1)


def test_the_driver_keeps_its_limits():
    driver = Driver(100, 50)
    assert driver.take(60) and not driver.take(41) and driver.take(40)
    assert (driver.reserved, driver.peak) == (100, 100)
    driver.give_back(70)
    assert (driver.reserved, driver.peak) == (30, 100)
    assert driver.allows(20) and not driver.allows(21)
