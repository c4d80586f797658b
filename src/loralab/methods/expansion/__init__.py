"""More rank from the same parameters."""
