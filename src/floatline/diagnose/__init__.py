"""Find the first bad op of a step, name the cause, try the cure. `fl.diagnose(forward, model)` calls it."""

from floatline.callable_module import make_callable

make_callable(__name__, "floatline.diagnose.diagnose", "diagnose")
