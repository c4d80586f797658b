"""BSLoRA (PMLR 267:78883; not on arXiv): dW = 2 (B A + T(B_1 A_1) + T(B_2 A_2)).

A, B are the layer's own, A_1, B_1 shared within a block, A_2, B_2 by the whole model. T fits the
shared pairs to the layer: "slice" cuts the middle out of a pair of the largest size; "gate" is
g_ou g_od (B A) g_iu g_id, with vectors g of the layer; "kron" is (K_B ⊗ B)(K_A ⊗ A).

:summary: A local pair beside one shared within the block and one shared by the model
:equation: dW = 2 (B A + T(B_1 A_1) + T(B_2 A_2)), T = slice, gate or Kronecker product
:trap: Alpha has no effect: the authors' code fixes the factor at 2.
:trap: The rank asked for is that of the model's pair; the local one is a quarter of it.
:trap: Gates are vectors, so a gated pair has rank 1 whatever its own rank.
:trap: The authors cut the middle of a shared pair, the survey's code its first rows.
:title: BSLoRA: Enhancing the Parameter Efficiency of LoRA with Intra-Layer and Inter-Layer Sharing
:authors: Yuhua Zhou, Ruifeng Li, Changhai Zhou, Fei Yang, Aimin Pan
:source: ICML 2025, 2025: section 3
:verified: authors' code (yuhua-zhou/BSLoRA, peft/tuners/share_lora/layer.py, and its script and
    README for the ranks) and the survey arXiv 2601.22708; the paper's text was not to be had
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from loralab.bounds import Count, OneOf, Positive
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.recipe import Evidence, Form, Site, Tensors

SIZES = {"slice": 1, "gate": 1024, "kron": 256}  # S; a sliced pair has the layer's own sides
LEVELS = ("_intra", "_inter")  # what the names of the shared pairs' tensors end with


@dataclass(frozen=True)
class BSLoRA(Form):
    """A local pair, one per block and one per model.

    Args:
        transform: T, see above.
        local, intra, inter: ranks of the layer's, the block's and the model's pair as multiples of
            that asked for. The defaults give 2, 4 and 8 at rank 8, as the authors' configuration
            class does; the 2, 4 and 16 of their script are 0.125, 0.25 and 1 times 16.
        size: side of the shared pairs under "gate" and "kron"; None is the authors' 1024 and 256.
    """

    shared: ClassVar[Mapping[str, str]] = {
        "A_intra": "layer",
        "B_intra": "layer",
        "A_inter": "model",
        "B_inter": "model",
    }

    transform: Annotated[str, OneOf(SIZES)] = "kron"
    local: Positive = 0.25
    intra: Positive = 0.5
    inter: Positive = 1.0
    size: Count | None = None

    def scale(self, alpha: float, rank: int) -> float:
        return 2.0

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return the three pairs, their B at 0, and the layer's gates or Kronecker factors."""
        m, n, S = site.d_out, site.d_in, self.size or SIZES[self.transform]
        fitting = {
            "slice": {},
            "gate": {"g_id": (1, n), "g_iu": (S, 1), "g_od": (1, S), "g_ou": (m, 1)},
            "kron": {"K_A": (1, -(-n // S)), "K_B": (-(-m // S), 1)},
        }
        t: Tensors = {}
        for level, share in zip(("", *LEVELS), (self.local, self.intra, self.inter), strict=True):
            r = max(1, round(share * site.rank))
            high, wide = (S, S) if level and self.transform != "slice" else (m, n)
            random = {"A": (r, wide)} | (fitting[self.transform] if level else {})
            for name, shape in random.items():
                name += level
                t[name] = uniform(evidence, name, *shape, bound=shape[1] ** -0.5)
            t[f"B{level}"] = evidence.weight.new_zeros(high, r)
        return t

    def _fitted(self, t: Tensors, level: str, site: Site) -> tuple[Tensor, Tensor]:
        """Return the factors of T(B A)."""
        m, n = site.d_out, site.d_in
        own = {k.removesuffix(level): v for k, v in t.items() if k.endswith(level)}
        A, B = own["A"], own["B"]
        if self.transform == "gate":
            return own["g_ou"] @ (own["g_od"] @ B), (A @ own["g_iu"]) @ own["g_id"]
        if self.transform == "kron":
            high = own["K_B"].unsqueeze(-1) * B.unsqueeze(-3)  # [*, out / S, S, r]
            wide = own["K_A"].unsqueeze(-1) * A.unsqueeze(-2)  # [*, r, in / S, S]
            return high.flatten(-3, -2)[..., :m, :], wide.flatten(-2)[..., :n]
        top, left = (B.shape[-2] - m) // 2, (A.shape[-1] - n) // 2
        return B[..., top : top + m, :], A[..., left : left + n]

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        pairs = [(t["B"], t["A"]), *(self._fitted(t, level, site) for level in LEVELS)]
        return torch.cat([B for B, _ in pairs], -1), torch.cat([A for _, A in pairs], -2)


register("bslora", "sharing", __doc__, BSLoRA())
