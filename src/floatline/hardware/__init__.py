"""What a device can do: the catalog of GPUs, this machine, and what is legal where."""

from floatline.hardware.catalog import CATALOG, Hardware, lookup
from floatline.hardware.described import target
from floatline.hardware.detect import detect, resolve
from floatline.hardware.legality import Verdict, attention_verdict, format_verdict, fp8_emulated

__all__ = [
    "CATALOG",
    "Hardware",
    "Verdict",
    "attention_verdict",
    "detect",
    "format_verdict",
    "fp8_emulated",
    "lookup",
    "resolve",
    "target",
]
