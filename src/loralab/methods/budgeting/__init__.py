"""Which layers get how much rank."""
