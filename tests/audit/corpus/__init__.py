"""Models that one lower format breaks in a known place, the same models without the fault, and healthy ones."""

from audit_corpus import aside, backward, geometry, healthy, in_range, models, moving, normals, outside, sums, unseen
from audit_corpus.cases import FAULTS, HEALTHY, Fault, Healthy, Program

__all__ = ["FAULTS", "HEALTHY", "Fault", "Healthy", "Program", "aside", "backward", "geometry", "healthy", "in_range",
           "models", "moving", "normals", "outside", "sums", "unseen"]  # fmt: skip
