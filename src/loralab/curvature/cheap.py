"""Curvature without Hessian products: the closed form at B = 0, and Gauss-Newton plus coupling.

For a pair, d2L = <s(dB A + B dA), H_W s(dB A + B dA)> + 2 s <G, dB dA> with G = dL/dW: a curvature
term and a coupling. The coupling alone has the eigenvalues +-s sigma_i(G). At B = 0 it dominates,
so lambda_max is close to s sigma_max(G) (derivation and measurements: docs/curvature.md).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loralab.core.bank import Bank, has_gain
from loralab.core.evidence import weight_gradients
from loralab.core.pack import Pack
from loralab.curvature.blocks import Block, block_tensors
from loralab.curvature.hessian import RowLosses, differentiable_twice
from loralab.curvature.lanczos import Ends, lanczos
from loralab.errors import UserError
from loralab.seeds import generator
from loralab.tasks.base import Batch

IGNORED = -100


def gradients(
    model: nn.Module, names: Sequence[str], batches: Sequence[Batch], losses: RowLosses
) -> dict[str, Tensor]:
    """Return G = dL/dW [out, in] of each layer, L the mean over all valid tokens."""
    n_valid = 0.0

    def summed(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal n_valid
        sums, counts = losses(model, batch)
        n_valid += float(counts.sum())
        return sums.sum()

    total = weight_gradients(model, names, batches, summed)
    return {name: g * (len(batches) / n_valid) for name, g in total.items()}


def closed_form_ends(pack: Pack, blocks: Sequence[Block], G: dict[str, Tensor]) -> dict[str, Ends]:
    """Return +-s sigma_max(G) per block: exact coupling, the Gauss-Newton part left out.

    Raises:
        UserError: a block is not one plain pair with B = 0.
    """
    found = {}
    for block in blocks:
        bank = _pair_bank(pack, block)
        if bool(bank.tensors()["B"].any()):
            raise UserError(
                f"the closed form holds for starts with B = 0, and {block.name!r} has another; "
                "use the way 'gauss_newton' or 'exact'"
            )
        c = float(bank.scale[0] * torch.linalg.matrix_norm(G[block.name], 2))
        found[block.name] = Ends(c, -c, float("nan"), 0)
    return found


def gauss_newton_ends(
    pack: Pack,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    losses: RowLosses,
    G: dict[str, Tensor],
    *,
    seed: int,
    draws: int,
    rtol: float,
) -> dict[str, Ends]:
    """Return the ends of C^T C + coupling per block.

    The rows of C are per-sequence gradients with labels drawn from the model's own prediction,
    which makes C^T C an unbiased estimate of the Gauss-Newton matrix. Each slot of the pack takes
    one sequence, so one backward serves all blocks and as many sequences as there are slots.
    """
    columns: dict[str, list[Tensor]] = {b.name: [] for b in blocks}
    n_valid = 0.0
    with differentiable_twice(pack.model):
        for draw in range(draws):
            for number, batch in enumerate(batches):
                stream = generator(seed, "labels", draw, number)
                for rows in _rows(batch, pack.size):
                    n_valid += _add_columns(pack, blocks, rows, losses, stream, columns)
    found = {}
    for block in blocks:
        C = torch.stack(columns[block.name]) / n_valid**0.5
        bank = _pair_bank(pack, block)
        t = bank.tensors(0, 1)
        coupling = _coupling(t["A"][0], t["B"][0], float(bank.scale[0]) * G[block.name])

        def matvec(v: Tensor, C: Tensor = C, couple: Callable = coupling) -> Tensor:
            return C.mT @ (C @ v) + couple(v)

        start = torch.randn(C.shape[-1], generator=generator(seed, "lanczos", block.name))
        found[block.name] = lanczos(matvec, start.to(C), rtol)
    return found


def _pair_bank(pack: Pack, block: Block) -> Bank:
    bank = pack.sites[block.sites[0]].banks[0] if len(block.sites) == 1 else None
    if bank is None or not bank.form.pair or has_gain(bank.form) or set(bank.trained) != {"A", "B"}:
        raise UserError(
            f"the cheap ways need one plain trained pair A, B per block, and {block.name!r} is "
            "not; use the way 'exact'"
        )
    return bank


def _coupling(A: Tensor, B: Tensor, sG: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the operator of 2 <sG, dB dA> on vectors ordered as the bank's trained A, B."""

    def apply(v: Tensor) -> Tensor:
        dA, dB = v[: A.numel()].view_as(A), v[A.numel() :].view_as(B)
        return torch.cat([(dB.mT @ sG).flatten(), (sG @ dA.mT).flatten()])

    return apply


def _rows(batch: Batch, size: int) -> list[Batch]:
    n = len(next(iter(batch.values())))
    return [{k: v[lo : lo + size] for k, v in batch.items()} for lo in range(0, n, size)]


def _add_columns(
    pack: Pack,
    blocks: Sequence[Block],
    batch: Batch,
    losses: RowLosses,
    stream: torch.Generator,
    columns: dict[str, list[Tensor]],
) -> float:
    """Append one gradient per sequence to every block's columns; return the valid tokens."""
    n = len(next(iter(batch.values())))
    with pack.rows([1] * n + [0] * (pack.size - n)):
        drawn = sampled_labels(pack.model, batch, stream)
        sums, counts = losses(pack.model, drawn)
        tensors = {b.name: block_tensors(pack, b) for b in blocks}
        unique = list({id(t): t for ts in tensors.values() for t in ts}.values())
        grads = torch.autograd.grad(sums.sum(), unique)
    by_id = {id(t): g for t, g in zip(unique, grads, strict=True)}
    for name, ts in tensors.items():
        stacked = torch.cat([by_id[id(t)].flatten(1) for t in ts], dim=1)
        columns[name] += list(stacked[:n])
    return float(counts.sum())


@torch.no_grad()
def sampled_labels(model: nn.Module, batch: Batch, stream: torch.Generator) -> Batch:
    """Return the batch with every valid label redrawn from the model's own prediction.

    Labels [rows, T] are next tokens (position t predicts label t + 1); labels [rows] are classes.
    """
    labels = batch["labels"]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**inputs).logits.float()
    probabilities = logits.softmax(-1).cpu()
    drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=stream)
    drawn = drawn.view(logits.shape[:-1]).to(labels.device)
    if labels.dim() == 1:
        return batch | {"labels": drawn}
    new = labels.clone()
    valid = labels[:, 1:] != IGNORED
    new[:, 1:][valid] = drawn[:, :-1][valid]
    return batch | {"labels": new}


def default_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return (summed cross entropy [rows], valid labels [rows]) of a Hugging Face model.

    Labels [rows, T] are shifted next tokens with -100 for what does not count; [rows] are classes.
    """
    labels = batch["labels"]
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    if labels.dim() == 1:
        return cross_entropy(logits, labels, reduction="none"), torch.ones_like(labels)
    labels = labels[:, 1:]
    each = cross_entropy(
        logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return each.view(labels.shape).sum(-1), (labels != IGNORED).sum(-1)
