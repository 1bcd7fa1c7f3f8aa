"""`floatline` with one batch of one rank spoilt whenever it comes: launched by torchrun.

    SPOIL=rank:place SEEN=directory ... spoilt_rank.py train recipe.yaml ...

The batch is the one that the rank gets at that place, from 0. Each rank writes what it was given to SEEN/rank.
"""

import math
import os
from pathlib import Path

from floatline.cli import main
from floatline.step import TrainStep

RANK, PLACE = map(int, os.environ["SPOIL"].split(":"))
real, seen, bad = TrainStep.__call__, [], None


def micro_batches(batch):
    return batch if isinstance(batch, list) else [batch]


def call(step, batch):
    global bad
    rank = int(os.environ["RANK"])
    seen.append(sum(int((micro["input_ids"] * micro["labels"]).sum()) for micro in micro_batches(batch)))
    Path(os.environ["SEEN"], str(rank)).write_text(" ".join(map(str, seen)))
    if rank == RANK and len(seen) == PLACE + 1:
        bad = seen[-1]
    if rank == RANK and seen[-1] == bad:
        for micro in micro_batches(batch):
            micro["pixel_values"] = micro["pixel_values"] * math.nan
    return real(step, batch)


TrainStep.__call__ = call
main()
