"""Plan a run before it starts: will it fit, with what, and at what cost. `fl.plan(work, hardware="t4")` calls it."""

from floatline.callable_module import make_callable

make_callable(__name__, "floatline.plan.plan", "plan")
