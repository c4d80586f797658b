"""Base models by reference: `tiny`, a folder, or a hub id."""

from loralab.models.loading import load_model as load_model

__all__ = ["load_model"]
