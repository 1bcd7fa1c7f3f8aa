"""The helper's side of parallel.py: `python -m floatline.plan.helper` reads trials and writes estimates, pickled.

First come the arguments of `load_source`, then one trial after the other; each answer is an `Outcome`. Nothing else
reaches standard output. It ends when its input does.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from typing import BinaryIO

import torch

from floatline.errors import FloatlineError
from floatline.plan.command import quiet
from floatline.plan.parallel import Outcome
from floatline.plan.sources import Source, load_source
from floatline.plan.traces import TraceCache
from floatline.plan.trial import Trial


def serve(asked: BinaryIO, answers: BinaryIO) -> None:
    """Load the source, then answer until the input ends.

    Args:
        asked: Where pickled questions come from.
        answers: Where pickled answers go.
    """
    text, shape, task = pickle.load(asked)
    source = load_source(text, shape, task=task)
    traces = TraceCache(source.work)
    _send(answers, "loaded")
    while True:
        try:
            trial = pickle.load(asked)
        except EOFError:
            return
        _send(answers, answer(source, trial, traces))


def _send(answers: BinaryIO, value: object) -> None:
    answers.write(pickle.dumps(value))
    answers.flush()


def answer(source: Source, trial: Trial, traces: TraceCache) -> Outcome:
    """Return what is sent for a trial."""
    try:
        if trial.shape is not None:
            return Outcome(estimate=trial.estimate(source.reshaped(trial.shape).work))
        return Outcome(estimate=trial.estimate(source.work, traces))
    except FloatlineError as error:
        return Outcome(error=error)
    except Exception:  # an error of torch or of the model: it may hold anything, so it is raised where it is shown
        return Outcome()


def main() -> None:
    """Serve on the standard streams; what libraries print goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks, which ends this one
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(1)
    with quiet():
        serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
