"""Sums that a program makes in a loop: `total = total + x`, a mean by Welford, small steps of an integrator.

No op of such a loop is far off; what is lost is lost over its turns. So the results of one line's additions are
followed from call to call, in the format and exactly. An element is stuck if its bits stay while the exact value goes
by more than an ulp, or in most calls in which the exact value moves. What is lost is the way that stuck elements have
not gone, and it counts beside the value itself:

    lost = ||(exact_n - exact_0) - (low_n - low_0)||, over stuck elements, / ||exact_n||

A value that moves by less than an ulp a call and is rounded well keeps its bits as often, but is never further off than
an ulp: a loss above a few per cent takes many calls.

Where the low addend is zero and the exact one is not, nothing is lost here but before: such calls do not count.

A call goes on with a sum if one of its operands is the result of the call before, or nearly (`0.99 * mean + ...` is, by
1 %). Otherwise a new sum begins.

Not covered: loops whose turns are different modules or lines; loops in fp32, which stop at 2^24.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from floatline.observe.error.measures import format_of, sampled
from floatline.observe.error.sums import spacing

ADDING = frozenset(
    {"add", "add_", "sub", "sub_", "rsub", "lerp", "lerp_", "addcmul", "addcmul_", "addcdiv", "addcdiv_"}
)
FEW = 8
"""Moves from which an element can be stuck: fewer half ulps of bf16 do not come to what counts as a loss."""
NEAR = 0.05
"""Relative distance of such an operand: averages that forget faster than by 5 % a turn settle too close to be lost."""
FOLLOWED = 2**12
"""Elements that are followed of a large tensor."""


@dataclass
class _Chain:
    start: tuple[torch.Tensor, torch.Tensor]
    last: tuple[torch.Tensor, torch.Tensor]
    moves: torch.Tensor
    kept: torch.Tensor
    since: torch.Tensor  # the exact value when the bits last changed
    stood: torch.Tensor


class Chains:
    """Follows the additions of all lines."""

    def __init__(self) -> None:
        self._chains: dict[Hashable, _Chain] = {}

    def follow(
        self,
        line: Hashable,
        low: torch.Tensor,
        exact: torch.Tensor,
        operands: Sequence[tuple[torch.Tensor, torch.Tensor]],
    ) -> float | None:
        """Note one more result of a line.

        Args:
            line: Which.
            low: The result in its format.
            exact: fp64, of its shape.
            operands: What was added, each as it was given and exactly; no sum goes on in those of another shape.

        Returns:
            The loss up to now, relative to the exact value; None while there is no loop.
        """
        now = _few(exact), _few(low).double()
        chain = self._chains.get(line)
        going = None if chain is None else _goes_on(chain, exact, operands)
        if chain is None or going is None:
            none = torch.zeros_like(now[0], dtype=torch.int32)
            self._chains[line] = _Chain(now, now, none, none, now[0], none.bool())
            return None
        added = [given for place, (given, _) in enumerate(operands) if place != going]
        same = (now[1] == chain.last[1]) & _nonzero(added, low)
        chain.since = torch.where(same, chain.since, now[0])
        chain.stood |= (now[0] - chain.since).abs() > spacing(now[1], format_of(low.dtype).mantissa_bits)
        moving = now[0] != chain.last[0]
        chain.moves = chain.moves + moving
        chain.kept = chain.kept + (moving & same)
        chain.last = now
        stuck = chain.stood | ((chain.moves >= FEW) & (2 * chain.kept > chain.moves))
        off = (now[0] - chain.start[0]) - (now[1] - chain.start[1])
        off = torch.where(stuck & off.isfinite(), off, 0.0)
        size = float(torch.where(now[0].isfinite(), now[0], 0.0).norm())
        return float(off.norm()) / size if size and bool(stuck.any()) else None


def _goes_on(chain: _Chain, exact: torch.Tensor, operands: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> int | None:
    """Return the place of the operand that a sum goes on in; None where a new one begins."""
    last = chain.last[0]
    near = NEAR * float(last.norm())
    for place, (_, operand) in enumerate(operands):
        if operand.shape != exact.shape:
            continue
        few = _few(operand)
        if few.shape == last.shape and float((few - last).norm()) <= near:
            return place
    return None


def _nonzero(added: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Return where something is added; a scalar of the program's is no tensor, and is something."""
    some = torch.full_like(like, not added, dtype=torch.bool)
    for tensor in added:
        some |= tensor != 0
    return _few(some)


def _few(tensor: torch.Tensor) -> torch.Tensor:
    flat = sampled(tensor)
    return flat[:: -(-flat.numel() // FOLLOWED) or 1].clone()
