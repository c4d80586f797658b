"""EVA, arXiv 2410.07170, section 3: A0 = V[:, :r]ᵀ and B0 = 0, with X = U Σ Vᵀ the layer's inputs;
the ranks go to the directions that explain most variance, over all layers.

V and σ² are here the eigenvectors and eigenvalues of the inputs' second moment (mean of x xᵀ),
which is what the paper's incremental SVD converges to.

:summary: A starts from the inputs' leading directions, ranks follow explained variance
:equation: A0 = V[:, :r]^T of X = U S V^T, B0 = 0; the sum of ranks is kept
:trap: The ranks keep their sum, not the parameter count: wide layers may grow.
:trap: A layer that explains little gets rank 0 and is left out.
:trap: PEFT (the authors' code) centres the inputs and compares layers by σ²/Σσ²; the paper's SVD is
    of the inputs as they are, and its ratio divides by Σσ, so that large inputs win ranks. Centring
    is not offered: it needs the inputs' mean, and what is looked at is mean x xᵀ.
:trap: Layers with the same input have the same directions; ties go to the earlier layer.
:title: Parameter Efficient Fine-tuning via Explained Variance Adaptation
:authors: Fabian Paischer, Lukas Hauzenberger, Thomas Schmied, Benedikt Alkin, Marc Peter
    Deisenroth, Sepp Hochreiter
:source: arXiv 2410.07170, 2024: sections 3.2 and 3.5, eq. 6
:verified: paper (section 3); equality with installed PEFT (the authors' code) on centred inputs
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from loralab.bounds import AtLeastOne, OneOf
from loralab.methods import register
from loralab.methods.budgeting._evidence import covariance_of
from loralab.methods.expansion.lora import LoRA
from loralab.recipe import Evidence, Look, Site, Start, Tensors

# ξ per direction of one layer, up to a factor that all layers have in common.
RATIOS: dict[str, Callable[[Tensor], Tensor]] = {
    # σ_j² / Σσ²: what "explained variance ratio" means, and the authors' code (PEFT).
    "explained": lambda variance: variance / variance.sum().clamp_min(1e-300),
    # σ_j² / ((M - 1) ‖σ‖₁), as printed.
    "printed": lambda variance: variance / variance.sqrt().sum().clamp_min(1e-300),
}


@dataclass(frozen=True)
class EVA(Start):
    """Directions of the inputs, and as many per layer as they explain.

    Args:
        rho: ρ, the largest rank of a layer in units of the rank asked for; 1 keeps all ranks.
        ratio: how directions of different layers are compared, one of `RATIOS`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"covariance"})
    keeps_scale: ClassVar[bool] = True

    rho: AtLeastOne = 2.0
    ratio: Annotated[str, OneOf(RATIOS)] = "printed"

    def ranks(self, sites: Sequence[Site], evidence: Look) -> dict[str, int] | None:
        if self.rho == 1:
            return None
        found = []
        for i, site in enumerate(sites):
            variance = torch.linalg.eigvalsh(covariance_of(evidence(site), "EVA")).clamp_min(0)
            most = min(round(self.rho * (site.asked or site.rank)), site.d_in, site.d_out)
            ratio = RATIOS[self.ratio](variance).flip(0)[:most]
            found += [(-value, i) for value in ratio.tolist()]
        budget = sum(site.asked or site.rank for site in sites)
        chosen = [i for _, i in sorted(found)[:budget]]
        return {site.name: chosen.count(i) for i, site in enumerate(sites)}

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        V = torch.linalg.eigh(covariance_of(evidence, "EVA")).eigenvectors
        A = V.flip(-1)[:, : site.rank].mT
        # Signs are free; as in PEFT the entry largest in size is positive.
        A = A * A.gather(-1, A.abs().argmax(-1, keepdim=True)).sign()
        return {"A": A.to(evidence.weight), "B": evidence.weight.new_zeros(site.d_out, site.rank)}


register("eva", "budgeting", __doc__, LoRA(), start=EVA())
