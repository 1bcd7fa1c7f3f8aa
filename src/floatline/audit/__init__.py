"""Audit a model's precision, op by op, and find the cheapest policy that is safe. `fl.audit(model, batch)` calls it."""
