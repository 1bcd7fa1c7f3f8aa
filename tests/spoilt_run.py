"""A `floatline train` one batch of which is spoilt whenever it comes, and that is killed at a moment around a rollback.

    python spoilt_run.py BATCH FACTOR SIGNAL MOMENT train recipe.yaml ...

BATCH is a fingerprint of token ids, its pixels are multiplied by FACTOR. MOMENT is where SIGNAL reaches the process:
`before` the update at fault, `after` the rollback and what the run does about it, or `save`: while the next checkpoint
is written.
"""

import os
import signal
import sys

import floatline.train.loop as loop
from floatline.step import TrainStep


def fingerprint(batch):
    """Return a number that tells the batches of the small data set apart."""
    return sum(int(micro["input_ids"].sum()) for micro in (batch if isinstance(batch, list) else [batch]))


def spoiling(bad, factor, seen=None):
    """Return a `TrainStep.__call__` that spoils one batch; `seen` gets the fingerprint of each."""
    real = TrainStep.__call__

    def call(step, batch):
        found = fingerprint(batch)
        if seen is not None:
            seen.append(found)
        if found == bad:
            for micro in batch if isinstance(batch, list) else [batch]:
                micro["pixel_values"] = micro["pixel_values"] * factor
        return real(step, batch)

    return call


def kill_at(moment, number, bad):
    """Let a signal reach this process once."""
    real, sum_up, save, done = loop.Loop._went_back, loop.Loop._sum_up, loop.save_checkpoint, []

    def strike():
        if not done:
            done.append(number)
            os.kill(os.getpid(), number)

    def summed(self, batch):
        if moment == "before" and fingerprint(batch) == bad:
            strike()
        return sum_up(self, batch)

    def went_back(self, *args):
        real(self, *args)
        if moment == "after":
            strike()
        done.extend([0] if moment != "save" else [])
        loop.save_checkpoint = saved

    def saved(directory, step, state, write_model, ranks=None):
        def written(path):
            write_model(path)
            if moment == "save":
                strike()

        return save(directory, step, state, written, ranks)

    loop.Loop._went_back, loop.Loop._sum_up = went_back, summed


if __name__ == "__main__":
    from floatline.cli import main

    batch, factor, name, when = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], sys.argv[4]
    TrainStep.__call__ = spoiling(batch, factor)
    kill_at(when, getattr(signal, name), batch)
    sys.argv = ["floatline", *sys.argv[5:]]
    main()
