"""What to train (Workload), the one visible loop body (TrainStep) with its guard, and the gradient monitor."""

from floatline.step.batch import call_model, default_loss, move, target_count
from floatline.step.clip_advice import ClipAdvice
from floatline.step.gradient_report import BadGradient, GradientReport
from floatline.step.guard import Guard
from floatline.step.monitor import GradientMonitor
from floatline.step.norm import GradientNorms, norms_of
from floatline.step.sentinel import Sentinel
from floatline.step.step import StepOutput, TrainStep
from floatline.step.verdict import Alarm, Skip, What
from floatline.step.workload import Workload

__all__ = [
    "Alarm",
    "BadGradient",
    "ClipAdvice",
    "GradientMonitor",
    "GradientNorms",
    "GradientReport",
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
    "norms_of",
    "target_count",
]
