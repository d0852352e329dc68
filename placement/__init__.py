"""How a plan is found, written down, applied and verified."""
