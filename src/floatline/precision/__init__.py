"""Precision policies: parse and print, choose and check, put on a model and take off, loss scaling, master weights."""

from floatline.precision.apply import AppliedPrecision, apply_precision, extend_precision
from floatline.precision.choose import Choice, choose, legal_names, resolve
from floatline.precision.master import MasterWeights, NoMasterWeights
from floatline.precision.policy import BASES, Policy, Rule
from floatline.precision.scaling import LossScaling, NoLossScaling

__all__ = [
    "BASES",
    "AppliedPrecision",
    "Choice",
    "LossScaling",
    "MasterWeights",
    "NoLossScaling",
    "NoMasterWeights",
    "Policy",
    "Rule",
    "apply_precision",
    "choose",
    "extend_precision",
    "legal_names",
    "resolve",
]
