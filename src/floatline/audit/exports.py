"""A report's policy as other systems take it: FSDP2's mixed precision, torchao's filter for float8.

FSDP casts at the borders of modules, not op by op: what autocast keeps in fp32 (norms, softmax, the residual stream) it
lowers with everything else. An audit in mode "true" measures just that; after one in mode "mixed" such ops are lower
under FSDP than what was audited.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from floatline.audit.trials import inside
from floatline.errors import ConfigError
from floatline.precision import Policy
from floatline.precision.islands import DTYPES
from floatline.select import matches

if TYPE_CHECKING:
    from floatline.audit.report import AuditReport


def fsdp_policy(report: AuditReport) -> dict[str, Any]:
    """Return module name -> MixedPrecisionPolicy, in the order in which `fully_shard` must be called.

    Args:
        report: Its policy's islands become units of their own; the last one is the root, "".
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    base = Policy.parse(report.policy).base
    if base.compute == "fp32":
        return {"": MixedPrecisionPolicy()}
    low, fp32 = DTYPES[base.arithmetic], DTYPES["fp32"]
    units = {}
    for name, high in sorted(_units(report).items(), key=lambda unit: -unit[0].count(".")):
        inner, outer = (fp32, low) if high else (low, fp32)  # the module around goes on in its own format
        units[name] = MixedPrecisionPolicy(param_dtype=inner, reduce_dtype=fp32, output_dtype=outer)
    root = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=fp32, output_dtype=fp32)
    return {**units, "": root}


def _units(report: AuditReport) -> dict[str, bool]:
    """Return island -> True, and modules inside of one that are lowered again -> False."""
    candidate = next(c for c in report.candidates.values() if c.policy == report.policy)
    again = [rule.pattern for rule in Policy.parse(report.policy).rules if rule.format != "32"]
    known = [row.module for row in report.modules if row.candidate == candidate.name and row.module]
    lowered = {name: False for name in known if any(matches(pattern, name) for pattern in again)}
    return {**dict.fromkeys(candidate.islands, True), **lowered}


def float8_filter(report: AuditReport, scaling: str = "tensor") -> Callable[[nn.Module, str], bool]:
    """Return the `module_filter_fn` for torchao's `convert_to_float8_training`.

    Args:
        report: Of an audit with fp8; what it keeps in fp32 under bf16 is not converted.
        scaling: "tensor" or "row", as the recipe given to torchao.

    Raises:
        ConfigError: The audit was made without fp8, or no such scaling.
    """
    from floatline.audit.fp8 import filter_of

    if not report.fp8:
        raise ConfigError("the audit has not looked at fp8", hint="audit with fp8=True, or floatline audit --fp8")
    bf16 = report.candidates.get("bf16")
    islands = frozenset(bf16.islands if bf16 is not None else ())
    return filter_of([row for row in report.fp8 if not inside(row.name, islands)], scaling)
