"""Randomness that depends on what it is for, never on order, packing or hardware."""

import hashlib

import torch


def stable_seed(*parts: object) -> int:
    """Return a 63-bit seed from the text of `parts`; the same in every process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: object) -> torch.Generator:
    """Return a CPU generator seeded by `parts` (say: trial seed, site name, purpose)."""
    return torch.Generator().manual_seed(stable_seed(*parts))
