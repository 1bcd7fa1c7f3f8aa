"""Call a function in a process of its own, forked from one that has imported torch and transformers and run nothing.

What one measurement of memory leaves behind cannot be freed in another's, and one that dies takes no other with it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

PRELOAD = ["torch", "transformers", "floatline"]


class Failed(Exception):
    """The call raised, took too long, or its process died; the text says which."""


def _serve(function: Callable[..., Any], given: tuple[Any, ...], connection: Any) -> None:
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        connection.send((True, function(*given)))
    except Exception as error:
        connection.send((False, f"{type(error).__name__}: {error}"))


def in_clean_process(function: Callable[..., Any], *given: Any, limit: float = 300.0) -> Any:
    """Return `function(*given)`, called in a fresh process.

    Args:
        function: At module level, so that it can be pickled.
        given: Its arguments.
        limit: Seconds after which the process is ended.

    Raises:
        Failed: The call raised, was not done in time, or its process died.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(function, given, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            raise Failed(f"not done after {limit:.0f} s")
        done, value = ours.recv()
    except EOFError:
        raise Failed("the process died") from None
    finally:
        process.kill()
        process.join()
    if not done:
        raise Failed(value)
    return value
