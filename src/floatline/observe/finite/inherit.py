"""What of an op's bad inputs can be seen in its result, and whether the op did something new to them."""

from __future__ import annotations

from typing import Any

import torch

from floatline.observe.finite.meant import SOFTMAX
from floatline.observe.finite.numbers import dense, has_nan
from floatline.observe.finite.origins import Kind, Origin
from floatline.observe.finite.ran import Given, Ran


def seen(ran: Ran, bad: list[Given], out: torch.Tensor) -> list[Given]:
    """Return those bad inputs that reach the result; of `where`'s two branches, the one that was chosen."""
    if ran.name != "where" or len(ran.args) != 3 or not isinstance(ran.args[0], torch.Tensor):
        return bad
    taken, left, _ = ran.args
    spoilt = ~torch.isfinite(dense(out))
    kept = []
    for given in bad:
        chosen = taken if given.tensor is left else ~taken
        if bool((spoilt & chosen & ~torch.isfinite(dense(given.before))).any()):
            kept.append(given)
    return kept or bad


def makes_nan(bad: list[Given], spoilt: list[torch.Tensor]) -> bool:
    """Say whether an op made NaN out of infinities."""
    return any(has_nan(tensor) for tensor in spoilt) and not any(has_nan(given.before) for given in bad)


def masks_only(ran: Ran, bad: list[Given], origins: frozenset[Origin]) -> bool:
    """Say whether a softmax met nothing but -inf, from tensors of before: a bias that masks, whatever else it holds."""
    given = all(origin.kind is Kind.GIVEN and not origin.inputs[0].nan + origin.inputs[0].positive for origin in origins
                if origin.kind not in (Kind.MEANT, Kind.TAKEN))  # fmt: skip
    return ran.name in SOFTMAX and given and not any(bool((g.before == float("inf")).any()) for g in bad)


def spoils_more(ran: Ran, bad: list[Given], out: torch.Tensor) -> bool:
    """Say whether a pointwise op made elements bad whose inputs were not."""
    if torch.Tag.pointwise not in ran.func.tags:
        return False
    explained: Any = False
    for given in bad:
        explained = explained | ~torch.isfinite(dense(given.before))
    try:
        return bool((~torch.isfinite(dense(out)) & ~explained).any())
    except RuntimeError:  # shapes that do not broadcast
        return False


def leaves_nothing_else(bad: list[Given], spoilt: list[torch.Tensor]) -> bool:
    """Say whether an op put finite numbers and infinities together and only infinities came out.

    Either nothing of a result is finite although something of what went in was, or a reduction has a result that is
    infinite: the row that it reduced held an infinity that counted.
    """
    fewer = all(tensor.numel() < min(given.before.numel() for given in bad) for tensor in spoilt)
    if fewer:
        return True
    some_left = any(bool(torch.isfinite(dense(given.before)).any()) for given in bad)
    return some_left and not any(bool(torch.isfinite(dense(tensor)).any()) for tensor in spoilt)
