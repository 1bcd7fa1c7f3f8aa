"""Memory and speed techniques, one file each, all of one shape (base.py)."""

from floatline.techniques.base import Applied, Technique

__all__ = ["Applied", "Technique"]
