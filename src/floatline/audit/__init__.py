"""What must stay fp32: audit a model's precision, op by op. `fl.audit(model, batch)` calls it."""

from floatline.callable_module import make_callable

make_callable(__name__, "floatline.audit.audit", "audit")
