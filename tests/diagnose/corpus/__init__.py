"""Programs that go wrong in a known place, and programs that only look as if they did."""

from corpus import (
    attention,
    backward,
    domains,
    functions,
    given,
    groups,
    half,
    healthy,
    models,
    optimizers,
    structure,
    unseen,
)
from corpus.cases import FAULTS, HEALTHY, Fault, Healthy

__all__ = ["FAULTS", "HEALTHY", "Fault", "Healthy", "attention", "backward", "domains", "functions", "given", "groups",
           "half", "healthy", "models", "optimizers", "structure", "unseen"]  # fmt: skip
