"""Observers of the one step."""

from floatline.observe.memory import peak_memory, reset_peak_memory

__all__ = ["peak_memory", "reset_peak_memory"]
