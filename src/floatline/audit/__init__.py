"""What must stay fp32: audit a model's precision, op by op. `fl.audit(model, batch)` calls it."""
