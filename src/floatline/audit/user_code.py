"""What a user's model, loss, function or optimizer raises while it is audited: an error that says in which line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from floatline.audit.function_report import where
from floatline.errors import FloatlineError, ModelError
from floatline.observe.finite.places import place_of_error


class UserCodeError(ModelError):
    """What is audited has raised."""


@contextmanager
def user_code(who: str, how: str, hint: str) -> Iterator[None]:
    """Context around what a user wrote.

    Args:
        who: What runs: the subject of the sentence.
        how: In which format: "in fp32"; empty where there is none.
        hint: What to do where it raises.

    Raises:
        UserCodeError: It has raised.
        ModelError: It is out of memory.
    """
    try:
        yield
    except FloatlineError:
        raise
    except (Exception, SystemExit) as error:
        in_format = f" {how}" if how else ""
        said = (str(error).strip() or "without a message").splitlines()[0]
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in said:
            raise ModelError(
                f"{who} runs out of memory{in_format}: {said}",
                hint="take a smaller batch, or fewer layers",
            ) from error
        place = place_of_error(error)
        at = f" at {where(place)} ({place.code})" if place is not None else ""
        raise UserCodeError(f"{who} raises {type(error).__name__}{in_format}{at}: {said}", hint=hint) from error
