"""From what fp8 would do to each layer to the policy that trains so.

`fp8-mixed` chooses by size and place (precision/float8_layers.py); here come the rules for what it would choose and the
measured rows speak against. Layers that the run did not call were not measured, and stay high.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from floatline.audit.fp8_row import POLICIES, Fp8Row
from floatline.audit.patterns import shortest_patterns
from floatline.errors import ConfigError
from floatline.precision import Policy
from floatline.precision.float8_layers import choose_linears
from floatline.precision.rules import match_rules


def fp8_policy(
    rows: Sequence[Fp8Row], model: nn.Module, scaling: str = "tensor", *, beside: Policy | None = None
) -> str:
    """Return the fp8 policy that keeps every layer in bf16 that fp8 would cost too much.

    Args:
        rows: From `what_if`.
        model: The model that was measured.
        scaling: "tensor" for `fp8-mixed`, "row" for `fp8-rowwise-mixed`.
        beside: The bf16 policy that the rest of the model is safe with; its rules come first.

    Raises:
        ConfigError: No such scaling.
    """
    name = _policy_of(scaling)
    rules = beside.rules if beside is not None else ()
    chosen = choose_linears(model, Policy(name), match_rules(model, Policy(name, rules))).chosen
    good = {row.name for row in rows if row.fits(scaling)}
    names = [module for module, _ in model.named_modules()]
    kept = shortest_patterns(set(chosen) - good, names)
    return "; ".join([name, *map(str, rules), *(f"{pattern}=bf16" for pattern in kept)])


def filter_of(rows: Iterable[Fp8Row], scaling: str = "tensor") -> Callable[[nn.Module, str], bool]:
    """Return the `module_filter_fn` for torchao's `convert_to_float8_training` that converts the same layers.

    Args:
        rows: From `what_if`.
        scaling: "tensor" or "row", as the recipe given to torchao.

    Raises:
        ConfigError: No such scaling.
    """
    _policy_of(scaling)
    good = {row.name for row in rows if row.fits(scaling) and scaling not in row.kept}
    return lambda module, name: name in good and type(module) is nn.Linear


def _policy_of(scaling: str) -> str:
    if scaling not in POLICIES:
        raise ConfigError(
            f"no fp8 policy scales by {scaling!r}", hint=f"allowed: {', '.join(POLICIES)}; torchao trains with no other"
        )
    return POLICIES[scaling]
