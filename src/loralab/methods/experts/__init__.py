"""Several adapters and a choice between them."""
