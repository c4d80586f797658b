"""Exact Hessian-vector products of adapter blocks, one packed double backward for K blocks."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from loralab.core.pack import Pack
from loralab.curvature.blocks import Block, block_tensors, flat, inner
from loralab.curvature.lanczos import Ends, Lanczos
from loralab.seeds import generator
from loralab.tasks.base import Batch, tile

RowLosses = Callable[[nn.Module, Batch], tuple[Tensor, Tensor]]


@contextlib.contextmanager
def differentiable_twice(model: nn.Module) -> Iterator[None]:
    """Switch dropout off and fused attention, which has no second backward, to the plain form."""
    training = model.training
    model.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        model.train(training)


class PackedHessian:
    """The Hessian of one loss in K copies of one adapter, each slot asked about its own block.

    All slots hold the same values and see the same data, so the Hessian of the summed loss is
    block-diagonal over slots, and its product with a vector that has block k in slot k holds
    H_kk v_k in slot k. The loss is the mean over valid tokens (or items) of all batches.
    """

    def __init__(self, pack: Pack, batches: Sequence[Batch], losses: RowLosses) -> None:
        self.pack, self.batches, self.losses = pack, list(batches), losses
        self.n_passes = 0

    def products(self, vectors: Mapping[int, tuple[Block, Tensor]]) -> dict[int, Tensor]:
        """Return {slot: H_block v} for {slot: (block, v [n])}."""
        tensors = {slot: block_tensors(self.pack, block) for slot, (block, _) in vectors.items()}
        unique = list({id(t): t for ts in tensors.values() for t in ts}.values())
        total = {slot: torch.zeros_like(v) for slot, (_, v) in vectors.items()}
        n_valid = 0.0
        for batch in self.batches:
            rows = len(next(iter(batch.values())))
            with self.pack.rows([rows] * self.pack.size):
                sums, counts = self.losses(self.pack.model, tile(batch, self.pack.size))
            grads = torch.autograd.grad(sums.sum(), unique, create_graph=True)
            by_id = {id(t): g for t, g in zip(unique, grads, strict=True)}
            dot = torch.stack(
                [
                    inner([by_id[id(t)] for t in tensors[slot]], slot, v)
                    for slot, (_, v) in vectors.items()
                ]
            ).sum()
            second = self._second(dot, unique)
            for slot in vectors:
                total[slot] += flat([second[id(t)] for t in tensors[slot]], slot)
            n_valid += float(counts.sum()) / self.pack.size
            self.n_passes += 1
        return {slot: v / n_valid for slot, v in total.items()}

    @staticmethod
    def _second(dot: Tensor, unique: Sequence[Tensor]) -> dict[int, Tensor]:
        if not dot.requires_grad:  # the loss is linear in every tensor asked about
            return {id(t): torch.zeros_like(t) for t in unique}
        found = torch.autograd.grad(dot, unique, allow_unused=True)
        return {
            id(t): torch.zeros_like(t) if h is None else h
            for t, h in zip(unique, found, strict=True)
        }


def exact_ends(
    pack: Pack,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    losses: RowLosses,
    *,
    seed: int,
    rtol: float,
    max_products: int,
) -> dict[str, Ends]:
    """Return both ends of every block's spectrum; a slot that is done takes the next block."""
    operator = PackedHessian(pack, batches, losses)
    waiting = list(blocks)
    running: dict[int, tuple[Block, Lanczos]] = {}
    found: dict[str, Ends] = {}
    with differentiable_twice(pack.model):
        while waiting or running:
            for slot in range(pack.size):
                if slot not in running and waiting:
                    block = waiting.pop(0)
                    like = flat(block_tensors(pack, block), slot)
                    stream = generator(seed, "lanczos", block.name)
                    start = torch.randn(like.numel(), generator=stream, dtype=torch.float64)
                    running[slot] = block, Lanczos(start.to(like), rtol, max_products)
            asked = {slot: (block, process.vector) for slot, (block, process) in running.items()}
            for slot, product in operator.products(asked).items():
                block, process = running[slot]
                process.advance(product.detach())
                if process.done:
                    found[block.name] = process.ends()
                    del running[slot]
    return {block.name: found[block.name] for block in blocks}
