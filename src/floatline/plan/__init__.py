"""Plan a run before it starts: will it fit, with what, and at what cost."""
