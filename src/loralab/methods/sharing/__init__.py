"""One set of tensors for many layers."""
