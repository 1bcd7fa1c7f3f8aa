"""How far a step in a lower format is from the exact one: shadows in fp64, a meter over all ops, and the rounding."""

from floatline.observe.error.measures import Measure
from floatline.observe.error.meter import ErrorMeter
from floatline.observe.error.metering import metering
from floatline.observe.error.reading import Reading
from floatline.observe.error.rounding import round_to
from floatline.observe.error.shadows import Shadows

__all__ = ["ErrorMeter", "Measure", "Reading", "Shadows", "metering", "round_to"]
