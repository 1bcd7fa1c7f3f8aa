"""Which modules can become fp32 islands, what each costs, and how much it is suspected.

A module is a candidate if its own forward runs an op that has to do with the lower format. One that has children
becomes an island with all of them; the search prefers cheaper ones inside. Where weights are cast (`-true`), islands
cast their results back, so what has to stay high between two modules needs an island around both: there modules are
candidates, too, that only call others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from floatline.audit.judging import Judged, suspicion
from floatline.audit.trials import Item, inside, merged
from floatline.observe.error import Reading
from floatline.observe.finite import plain_name

SMALL = 1e-3
"""Cost of an island besides its FLOPs: each one is two casts and a line in the policy."""


def candidates(
    model: nn.Module, judged: Sequence[tuple[Reading, Judged]], kept: frozenset[str], *, around: bool = False
) -> list[Item]:
    """Return the modules that may become islands.

    Args:
        model: Whose modules.
        judged: The readings of one format, each with its judgement.
        kept: Those that are islands anyhow.
        around: Also modules that only call others.
    """
    own: dict[str, float] = defaultdict(float)
    for reading, verdict in judged:
        own[reading.spot.module] = max(own[reading.spot.module], suspicion(reading, verdict))
    for name in list(own) if around else ():
        outer = name.rpartition(".")[0]
        while outer:
            own[outer] = max(own[outer], own[name] / 2)  # after what is inside of it
            outer = outer.rpartition(".")[0]
    costs = cost_shares(model, judged)
    found = []
    for name in callable_modules(model):
        if name in own and not inside(name, kept):
            found.append(Item(name=name, cost=costs[name] + SMALL, suspicion=own[name]))
    return found


def cost_shares(model: nn.Module, judged: Sequence[tuple[Reading, Judged]]) -> Mapping[str, float]:
    """Return each module's share of the FLOPs of all lowered ops, with what is inside of it."""
    flops: dict[str, int] = defaultdict(int)
    for reading, _ in judged:
        flops[reading.spot.module] += reading.flops
    total = sum(flops.values()) or 1
    names = callable_modules(model)
    return {name: sum(n for other, n in flops.items() if inside(other, {name})) / total for name in names}


def with_ties(model: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """Return modules with those that share a weight with them: where weights are cast, one tensor has one format."""
    owners: dict[int, set[str]] = defaultdict(set)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].add(plain_name(name))
    chosen = set(names)
    for shared in owners.values():
        if len(shared) > 1 and any(inside(owner, chosen) for owner in shared):
            chosen |= shared
    return merged(chosen - {""})


def module_of_error(error: BaseException, known: Mapping[str, nn.Module]) -> str | None:
    """Return the innermost module whose forward an exception came through; None where no rule can name one."""
    names = {id(module): name for name, module in known.items()}
    found, trace = None, error.__traceback__
    while trace is not None:
        found = names.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return found


def callable_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that a rule can name: all but the model itself and containers without a forward."""
    return {
        plain_name(name): module
        for name, module in model.named_modules()
        if name and type(module).forward is not nn.Module.forward
    }
