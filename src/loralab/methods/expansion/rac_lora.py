"""RAC-LoRA, arXiv 2410.08305, algorithm 1: W_{t+1} = W_t + s B_t A_t, in each link of the chain one
factor drawn at random and frozen, the other trained from 0.

A gradient step of a link is a projected one of W: W ← W - γ ∇f(W) H_A with H_A the projection on
the rows of the random A (right sketch), or H_B ∇f(W) with the columns of a random B (left sketch).
The paper merges into W; here the sum is the adapter's own frozen low-rank term. Its GLUE runs have
ten links.

:summary: A chain of updates whose one factor is random and frozen, anew in each link
:equation: dW = s (B_1 A_1 + ... + B_k A_k), A_i random and frozen, B_i trained from 0
:trap: The frozen factor must be drawn anew in each link, or the chain never leaves its first r
    directions.
:trap: The paper's proofs are for gradient descent; here, as in its runs, the rule is AdamW.
:title: Randomized Asymmetric Chain of LoRA: The First Meaningful Theoretical Framework for Low-Rank
    Adaptation
:authors: Grigory Malinovsky, Umberto Michieli, Hasan Abed Al Kader Hammoud, Taha Ceritli, Hayder
    Elesedy, Mete Ozay, Peter Richtárik
:source: arXiv 2410.08305, 2024: algorithm 1, eqs. 3 and 4
:verified: the abstract, a public review that quotes eqs. 3 and 4, and the description in arXiv
    2606.13767; the paper's text was not to be had
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.cola import Chain
from loralab.methods.expansion.lora import check_scaling, scale_of, uniform
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class Asymmetric(Form):
    """A pair with one trained factor.

    Args:
        train: "B" or "A"; the other is random and frozen. The paper analyses both.
        distribution: of the frozen factor: "uniform" as LoRA's A, or "normal", N(0, 1/r).
        scaling: as in LoRA.
    """

    pair: ClassVar[bool] = True
    owns: ClassVar[frozenset[str]] = frozenset({"A", "B"})

    train: str = "B"
    distribution: str = "uniform"
    scaling: str = "alpha/r"

    def __post_init__(self) -> None:
        check_scaling(self.scaling)
        if self.train not in ("A", "B"):
            raise UserError(f"train of RAC-LoRA is 'A' or 'B', not {self.train!r}")
        if self.distribution not in ("uniform", "normal"):
            raise UserError(
                f"distribution of RAC-LoRA is 'uniform' or 'normal', not {self.distribution!r}"
            )

    @property
    def frozen(self) -> frozenset[str]:  # type: ignore[override]
        """Return the other factor."""
        return frozenset({"A", "B"} - {self.train})

    def scale(self, alpha: float, rank: int) -> float:
        return scale_of(self.scaling, alpha, rank)

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [r, in] and B [out, r], one of them random and the trained one 0."""
        shapes = {"A": (site.rank, site.d_in), "B": (site.d_out, site.rank)}
        (name,) = self.frozen
        if self.distribution == "normal":
            generator = evidence.generator(name)
            random = torch.randn(shapes[name], generator=generator, dtype=torch.float64)
            random = (random * site.rank**-0.5).to(evidence.weight)
        else:
            random = uniform(evidence, name, *shapes[name], bound=shapes[name][1] ** -0.5)
        return {name: random, self.train: evidence.weight.new_zeros(shapes[self.train])}

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return t["B"], t["A"]


register("rac_lora", "expansion", __doc__, Asymmetric(), schedule=Chain(n_links=10))
