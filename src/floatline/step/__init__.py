"""What to train (Workload) and the one visible loop body (TrainStep) with its guard."""

from floatline.step.batch import call_model, default_loss, move, target_count
from floatline.step.guard import Guard
from floatline.step.sentinel import Sentinel
from floatline.step.step import StepOutput, TrainStep
from floatline.step.verdict import Alarm, Skip, What
from floatline.step.workload import Workload

__all__ = [
    "Alarm",
    "Guard",
    "Sentinel",
    "Skip",
    "StepOutput",
    "TrainStep",
    "What",
    "Workload",
    "call_model",
    "default_loss",
    "move",
    "target_count",
]
