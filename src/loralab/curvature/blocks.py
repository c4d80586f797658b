"""Blocks of adapter tensors as flat vectors, slot by slot of a pack."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loralab.core.pack import Pack
from loralab.core.targets import matches_suffix
from loralab.errors import UserError, near_misses


@dataclass(frozen=True)
class Block:
    """A named set of an adapter's trained tensors: those of one or more sites.

    Attributes:
        sites: positions in `pack.names`.
    """

    name: str
    sites: tuple[int, ...]


def choose_blocks(pack: Pack, wanted: str) -> list[Block]:
    """Return the blocks that `wanted` names.

    Args:
        wanted: "all" (one block per adapted layer), "whole" (one block with all of them), or
            suffixes of layer names joined by commas.

    Raises:
        UserError: a suffix fits no adapted layer.
    """
    if wanted == "whole":
        return [Block("whole", tuple(range(len(pack.names))))]
    every = [Block(name, (i,)) for i, name in enumerate(pack.names)]
    if wanted == "all":
        return every
    chosen = []
    for suffix in wanted.split(","):
        found = [b for b in every if matches_suffix(b.name, suffix.strip())]
        if not found:
            leaves = sorted({n.rsplit(".", 1)[-1] for n in pack.names})
            hint = near_misses(suffix, leaves) or f"; there are {', '.join(leaves)}"
            raise UserError(f"--blocks {suffix.strip()!r} fits no adapted layer{hint}")
        chosen += [b for b in found if b not in chosen]
    return chosen


def block_tensors(pack: Pack, block: Block) -> list[Tensor]:
    """Return the block's trained tensors, each [K, ...]; a shared one once."""
    found: dict[int, Tensor] = {}
    for i in block.sites:
        (bank,) = pack.sites[i].banks
        for name in bank.trained:
            tensor = getattr(bank, name)
            found[id(tensor)] = tensor
    return list(found.values())


def flat(tensors: Sequence[Tensor], slot: int) -> Tensor:
    """Return one slot's part of tensors [K, ...] as one vector."""
    return torch.cat([t[slot].flatten() for t in tensors])


def inner(tensors: Sequence[Tensor], slot: int, vector: Tensor) -> Tensor:
    """Return <one slot's part of the tensors, vector>."""
    sizes = [t[slot].numel() for t in tensors]
    parts = vector.split(sizes)
    return torch.stack(
        [(t[slot] * p.view(t[slot].shape)).sum() for t, p in zip(tensors, parts, strict=True)]
    ).sum()
