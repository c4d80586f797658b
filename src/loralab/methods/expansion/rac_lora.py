"""RAC-LoRA: W_{t+1} = W_t + s B_t A_t, one factor random and frozen, the other trained from 0.

A gradient step of a link is a projected one of W: W ← W - γ ∇f(W) H_A with H_A the projection on
the rows of the random A (right sketch), or H_B ∇f(W) with the columns of a random B (left sketch).
The paper merges into W; here the sum is the adapter's own frozen low-rank term. Its GLUE runs have
ten links. Its MNIST code keeps AdamW's moments from link to link; here they begin anew.

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
:verified: authors' MNIST code (hammoudhasan/RACLora), public reviews that quote algorithm 1 and
    eqs. 3 and 4, and the description in arXiv 2606.13767; the paper's text was not to be had
"""

from dataclasses import dataclass
from typing import Literal

from loralab.methods import register
from loralab.methods.expansion.cola import Chain
from loralab.methods.expansion.lora import Pair, normal, uniform
from loralab.recipe import Evidence, Site, Tensors


@dataclass(frozen=True)
class Asymmetric(Pair):
    """A pair with one trained factor.

    Args:
        train: which factor; the other is random and frozen. The paper analyses both.
        distribution: of the frozen factor: "uniform" as LoRA's A, "normal" as N(0, 1), which the
            authors' MNIST code has, or "projection" as N(0, 1/r), with E[AᵀA] = 1 (Flora).
    """

    train: Literal["A", "B"] = "B"
    distribution: Literal["uniform", "normal", "projection"] = "uniform"

    @property
    def frozen(self) -> frozenset[str]:  # type: ignore[override]
        """Return the other factor."""
        return frozenset({"A", "B"} - {self.train})

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [r, in] and B [out, r], one of them random and the trained one 0."""
        shapes = {"A": (site.rank, site.d_in), "B": (site.d_out, site.rank)}
        (name,) = self.frozen
        shape = shapes[name]
        if self.distribution == "uniform":
            random = uniform(evidence, name, *shape, bound=shape[1] ** -0.5)
        else:
            std = 1.0 if self.distribution == "normal" else site.rank**-0.5
            random = normal(evidence, name, *shape, std=std)
        return {name: random, self.train: evidence.weight.new_zeros(shapes[self.train])}


register("rac_lora", "expansion", __doc__, Asymmetric(), schedule=Chain(n_links=10))
