"""Bounds of ReLU nets by one dual: slopes, multipliers of splits and of shared budgets; any values are valid."""
