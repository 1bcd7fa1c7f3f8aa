"""What to train (Workload) and the one visible loop body (TrainStep) with its guard."""

from floatline.step.batch import call_model, default_loss, move, target_count
from floatline.step.guard import Guard, Sentinel, Skip
from floatline.step.step import StepOutput, TrainStep
from floatline.step.workload import Workload

__all__ = [
    "Guard",
    "Sentinel",
    "Skip",
    "StepOutput",
    "TrainStep",
    "Workload",
    "call_model",
    "default_loss",
    "move",
    "target_count",
]
