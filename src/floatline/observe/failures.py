"""Turn what a traced program raises into an error that says what to provide.

A plan runs the user's factories, model, loss and optimizer. What they raise has four kinds of cause: the program asks
for a GPU by name, an op has no kernel for tensors without data, the batch is too large to be made on this machine, or
the program itself is wrong (a batch without the key that the loss reads, shapes that do not match). Each is told with
the line of the program where it came up; the error as it was stays the `__cause__`.

An error that comes up in Floatline's own code is not the program's fault, and passes as it is.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from floatline.errors import FloatlineError, ModelError
from floatline.observe.real import is_ours, is_torch, short_place

_NO_FAKE_KERNEL = re.compile(r"no fake impl registered for <CustomOpDef\((\S+?)\)>")

_TOO_MUCH = re.compile(r"can't allocate memory: you tried to allocate (\d+) bytes")


@contextmanager
def explained() -> Iterator[None]:
    """Raise errors of the traced program as errors that a user can act on.

    Raises:
        ModelError: Instead of what the program raised.
    """
    torchs = logging.getLogger("torch._subclasses.fake_tensor")
    before = torchs.disabled
    torchs.disabled = True  # it logs each failure with a trace of its own
    try:
        yield
    except FloatlineError:
        raise
    except Exception as error:
        told = explain(error)
        if told is None:
            raise
        raise told from error
    finally:
        torchs.disabled = before


def explain(error: Exception) -> ModelError | None:
    """Return the error that tells of one raised by a traced program; None for one of Floatline's own."""
    said = first_line(error)[:200]
    if isinstance(error, RuntimeError | AssertionError) and "cuda" in _but_for_lists(str(error)).lower():
        return ModelError(
            f"the program asks for a GPU by name, but a plan runs on the CPU: {said[:120]}{_place(error)}",
            hint='take the device of an input (x.device) instead of "cuda" or .cuda()',
        )
    asked = _TOO_MUCH.search(str(error))
    if asked is not None or isinstance(error, MemoryError):
        size = f": {int(asked.group(1)) / 2**30:.1f} GiB in one piece" if asked else ""
        return ModelError(
            f"this machine has no memory for the part of the program that runs for real, its batch above all{size}"
            f"{_place(error)}",
            hint="plan a smaller batch or shorter samples",
        )
    custom = _NO_FAKE_KERNEL.search(str(error))
    if custom is not None:
        return ModelError(
            f"{custom.group(1)} has no fake kernel, so its results cannot be predicted{_place(error)}",
            hint=f"register one: @torch.library.register_fake({custom.group(1)!r})",
        )
    if is_ours(traceback.extract_tb(error.__traceback__)[-1].filename):
        return None
    return ModelError(
        f"the program does not run: {type(error).__name__}: {said}{_place(error)}",
        hint="run one update of it on the CPU; where that works, plan a variant that does not need values",
    )


def _but_for_lists(text: str) -> str:
    """Leave out the list of all backends that torch adds where an op lacks a kernel for one of them."""
    return text.partition("is only available for these backends")[0] if text.startswith("Could not run") else text


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that is not empty, else its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _place(error: BaseException) -> str:
    """Return the innermost line that is neither torch's nor Floatline's, as " (file.py:12)"; "" where there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not is_torch(frame.filename) and not is_ours(frame.filename)]
    named = [frame for frame in theirs if not frame.filename.startswith("<") and "/lib/python" not in frame.filename]
    for frame in reversed(named or theirs):
        return f" ({short_place(frame.filename, frame.lineno)})"
    return ""
