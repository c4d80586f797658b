"""Where the update begins."""
