"""Floatline: mixed-precision training that fits, stays finite and runs fast; measured, not assumed.

The public names load where they are first used, so that `import floatline` (and `floatline --help`) need not import
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from floatline.audit.audit import audit
    from floatline.audit.function import audit_function
    from floatline.audit.function_report import FunctionReport
    from floatline.audit.report import AuditReport
    from floatline.diagnose.diagnose import diagnose
    from floatline.diagnose.finding import Finding
    from floatline.errors import FloatlineError
    from floatline.formats import FORMATS, NumberFormat
    from floatline.plan.estimate import Estimate, estimate
    from floatline.plan.plan import Plan, plan
    from floatline.precision import Policy
    from floatline.step import GradientMonitor, Guard, StepOutput, TrainStep, Workload

_HOMES = {
    "AuditReport": "audit.report",
    "Estimate": "plan.estimate",
    "FORMATS": "formats",
    "Finding": "diagnose.finding",
    "FloatlineError": "errors",
    "FunctionReport": "audit.function_report",
    "GradientMonitor": "step",
    "Guard": "step",
    "NumberFormat": "formats",
    "Plan": "plan.plan",
    "Policy": "precision",
    "StepOutput": "step",
    "TrainStep": "step",
    "Workload": "step",
    "audit_function": "audit.function",
    "estimate": "plan.estimate",
}
_PACKAGES = {"audit", "diagnose", "plan", "techniques"}
"""Public names that are packages; `audit`, `diagnose` and `plan` can be called."""

__all__ = [
    "FORMATS",
    "AuditReport",
    "Estimate",
    "Finding",
    "FloatlineError",
    "FunctionReport",
    "GradientMonitor",
    "Guard",
    "NumberFormat",
    "Plan",
    "Policy",
    "StepOutput",
    "TrainStep",
    "Workload",
    "audit",
    "audit_function",
    "diagnose",
    "estimate",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"floatline.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'floatline' has no attribute {name!r}")
    return getattr(import_module(f"floatline.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, *_PACKAGES])
