"""The table of causes: what an op did to its numbers, why that is not finite, and what to change.

Each rule looks at an origin and gives a cause or nothing; the first that gives one has it, so the special ones come
first. Facts behind the rules: shared knowledge of the field (fp16 ends at 65504, Adam's eps of 1e-8 is 0 in fp16, the
derivative of sqrt at 0 is infinite) and public issues (pytorch#41508 masked rows, pytorch#16317 where over a bad
branch, transformers#27114 two masks added).
"""

from floatline.diagnose.causes.cause import Cause, gone_over, limit_of
from floatline.diagnose.causes.table import cause_of

__all__ = ["Cause", "cause_of", "gone_over", "limit_of"]
