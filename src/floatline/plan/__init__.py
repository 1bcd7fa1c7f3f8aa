"""The planner: will it fit, and with what."""
