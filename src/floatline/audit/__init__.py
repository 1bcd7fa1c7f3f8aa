"""What must stay fp32: what fails in a format, in which way, and the cheapest policy that is safe."""
