"""What must stay fp32: audit a model's precision and emit the cheapest policy that is safe."""
