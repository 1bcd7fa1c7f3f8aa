"""Planning: whether a training run fits a GPU, and with what, without that GPU."""
