"""Batches for every kind of model: which tensors, of which shapes, and why."""
