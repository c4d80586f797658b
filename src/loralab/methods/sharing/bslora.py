"""BSLoRA, ICML 2025 (PMLR 267:78883; not on arXiv): dW = 2 (B A + T(B_1 A_1) + T(B_2 A_2)).

A, B are the layer's own, A_1, B_1 shared within a block, A_2, B_2 by the whole model. T fits the
shared pairs to the layer: "slice" cuts the middle out of a pair of the largest size; "gate" is
g_ou g_od (B A) g_iu g_id, with vectors g of the layer; "kron" is (K_B ⊗ B)(K_A ⊗ A).

:summary: A local pair beside one shared within the block and one shared by the model
:equation: dW = 2 (B A + T(B_1 A_1) + T(B_2 A_2)), T = slice, gate or Kronecker product
:trap: Alpha has no effect: the authors' code fixes the factor 2.
:trap: The rank asked for is that of the model's pair; the local one is a quarter of it.
:trap: Gates are vectors, so a gated pair has rank 1 whatever its own rank.
:trap: The authors cut the middle of a shared pair, the survey's code its first rows.
:title: BSLoRA: Enhancing the Parameter Efficiency of LoRA with Intra-Layer and Inter-Layer Sharing
:authors: Yuhua Zhou, Ruifeng Li, Changhai Zhou, Fei Yang, Aimin Pan
:source: ICML 2025, 2025: section 3
:verified: authors' code (yuhua-zhou/BSLoRA, peft/tuners/share_lora/layer.py) and the survey arXiv
    2601.22708; the paper's text was not to be had
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.recipe import Evidence, Form, Site, Tensors

SIZES = {"slice": 0, "gate": 1024, "kron": 256}
LEVELS = ("intra", "inter")


@dataclass(frozen=True)
class BSLoRA(Form):
    """A local pair, one per block and one per model.

    Args:
        transform: T: "slice", "gate" or "kron".
        local: rank of the layer's own pair as a multiple of the rank asked for.
        intra: the same of the pair within a block.
        inter: the same of the model's pair. The defaults give the authors' 2, 4 and 8 at rank 8.
        size: side of the shared pairs under "gate" and "kron"; None is the authors' 1024 and 256.
    """

    shared: ClassVar[Mapping[str, str]] = {
        "A_intra": "layer",
        "B_intra": "layer",
        "A_inter": "model",
        "B_inter": "model",
    }

    transform: str = "kron"
    local: float = 0.25
    intra: float = 0.5
    inter: float = 1.0
    size: int | None = None

    def __post_init__(self) -> None:
        if self.transform not in SIZES:
            raise UserError(
                f"transform of BSLoRA is one of {', '.join(SIZES)}, not {self.transform!r}"
            )
        if not (self.local > 0 and self.intra > 0 and self.inter > 0):
            raise UserError("local, intra and inter of BSLoRA are positive multiples of the rank")
        if self.size is not None and self.size < 1:
            raise UserError(f"size of BSLoRA counts entries, so it is not {self.size}")

    def scale(self, alpha: float, rank: int) -> float:
        """Return 2, which the authors' code fixes whatever alpha is."""
        return 2.0

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return the three pairs, their B at 0, and the layer's gates or Kronecker factors."""
        m, n, zeros = site.d_out, site.d_in, evidence.weight.new_zeros
        S = self.size or SIZES[self.transform]
        r = max(1, round(self.local * site.rank))
        t = {"A": uniform(evidence, "A", r, n, bound=n**-0.5), "B": zeros(m, r)}
        for level, share in zip(LEVELS, (self.intra, self.inter), strict=True):
            r = max(1, round(share * site.rank))
            wide, high = (n, m) if self.transform == "slice" else (S, S)
            name = f"A_{level}"
            t |= {name: uniform(evidence, name, r, wide, bound=wide**-0.5)}
            t |= {f"B_{level}": zeros(high, r)}
            for part, shape in self._fitting(m, n, S).items():
                name = f"{part}_{level}"
                t |= {name: uniform(evidence, name, *shape, bound=shape[1] ** -0.5)}
        return t

    def _fitting(self, m: int, n: int, S: int) -> dict[str, tuple[int, int]]:
        """Return names and shapes of the layer's tensors in T."""
        if self.transform == "gate":
            return {"g_id": (1, n), "g_iu": (S, 1), "g_od": (1, S), "g_ou": (m, 1)}
        return {"K_A": (1, -(-n // S)), "K_B": (-(-m // S), 1)} if self.transform == "kron" else {}

    def _fitted(self, t: Tensors, level: str, site: Site) -> tuple[Tensor, Tensor]:
        """Return the factors of T(B A)."""
        m, n = site.d_out, site.d_in
        own = {k.removesuffix(f"_{level}"): v for k, v in t.items() if k.endswith(level)}
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
