"""Which modules of a model the rules of a policy name.

A rule names modules that are called, for an island replaces a forward. `fp8` rules are for the linear layers inside of
what they name, so they may name a mere container.
"""

from __future__ import annotations

from torch import nn

from floatline.errors import PrecisionError
from floatline.precision.policy import Policy
from floatline.select import near_names, select_modules


def match_rules(model: nn.Module, policy: Policy) -> dict[str, str]:
    """Return dotted module name -> format for the policy's rules.

    Raises:
        PrecisionError: A rule that matches no module or a mere container, or one module matched by rules with
            different formats.
    """
    found: dict[str, tuple[str, str]] = {}
    for rule in policy.rules:
        names = select_modules(model, rule.pattern)
        if not names:
            near = near_names(model, rule.pattern)
            raise PrecisionError(
                f"precision rule {rule} matches no module of {type(model).__name__}",
                hint="near names: " + ", ".join(near) if near else "names are dotted paths from the model's root",
            )
        for name, module in names.items():
            if type(module).forward is nn.Module.forward and rule.format != "fp8":  # which is for the linears inside
                raise PrecisionError(
                    f"precision rule {rule} matches {name}, a {type(module).__name__} that is never called itself",
                    hint=f"name what is in it: {name}.*={rule.format}",
                )
            first_pattern, first_format = found.setdefault(name, (rule.pattern, rule.format))
            if first_format != rule.format:
                raise PrecisionError(
                    f"precision rules contradict each other on {name}: {first_pattern}={first_format} and {rule}",
                    hint="narrow one of the patterns so that each module matches one rule",
                )
    return {name: number_format for name, (_, number_format) in found.items()}
