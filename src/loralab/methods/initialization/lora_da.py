"""LoRA-DA: A0 spans the r lowest eigenvectors of the guidance matrix Ω (W is [in, out] here).

D estimates how far the target is from W, the other term the variance of learning it from N samples.
J is the Fisher matrix in K-FAC's form: (J⁻¹)_i = (Y⁻¹)_ii Z⁻¹, with Z and Y the second moments of
the layer's inputs and of its outputs' gradients. D is divided by its largest singular value and
both factors by √γ, as in the authors' code.

:summary: Starts along the natural gradient, where it stands out from sampling noise
:equation: A0 = lowest eigenvectors of Omega = beta tr(Y^-1) Z^-1 / N - D D^T, B0 = A0^T D, D =
    -Z^-1 G^T diag(Y^-1)
:trap: LoRAFactory's method of this name is another one: the SVD of a few full fine-tuning steps.
:trap: The lowest eigenvectors of Omega, not the highest.
:trap: The model begins away from the base, and W is never corrected, unless anchored.
:trap: Without variance and with Z = Y = I it is LoRA-One's subspace.
:trap: Y is of each token's own gradient; the authors' code takes that of the mean loss, so small
    beside the damping that its Y hardly differs from the identity.
:title: LoRA-DA: Data-Aware Initialization for Low-Rank Adaptation via Asymptotic Analysis
:authors: Qingyue Zhang, Chang Chu, Tianren Peng, Qi Li, Xiangyang Luo, Zhihao Jiang, Shao-Lun Huang
:source: arXiv 2510.24561, 2025: algorithm 1
:verified: authors' code and configuration (zqy0126/LoRA-DA, lora_da.py and conf/lora_da.yaml) and
    a public reading of the paper (papernotes, ICML 2026)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from loralab.bounds import Count, NonNegative, Positive
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.budgeting.eva import covariance_of
from loralab.methods.budgeting.gora import gradient_of
from loralab.methods.optimization.rslora import RSLORA_FORM
from loralab.recipe import Evidence, Site, Start, Tensors


@dataclass(frozen=True)
class LoRADA(Start):
    """Directions with much to learn and little noise.

    Args:
        gamma: γ; larger starts smaller. 1024 in the authors' configuration.
        variance: β, the weight of the variance term; 1 in theory, 0.03 in their configuration.
        n_samples: N, how many samples the fine-tuning will see.
        damping: added to the diagonals of Z and Y.
        diagonal: take 1 / Y_ii for (Y⁻¹)_ii as the authors' code does; False is the paper.
        anchored: begin at the base; the paper's model begins at W + s B0 A0.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradient", "covariance", "gradient_covariance"})
    departs: ClassVar[bool] = True

    gamma: Positive = 1024.0
    variance: NonNegative = 0.03
    n_samples: Count = 100_000
    damping: Positive = 1e-6
    diagonal: bool = False
    anchored: bool = False

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        G = gradient_of(evidence, "LoRA-DA").double().mT
        Z, Y = covariance_of(evidence, "LoRA-DA"), evidence.gradient_covariance
        if Y is None:
            raise UserError("LoRA-DA looks at gradients: give `data`, an iterable of batches")
        Z_inverse = torch.linalg.inv(Z + self.damping * torch.eye(len(Z)).to(Z))
        Y = Y.double() + self.damping * torch.eye(len(Y)).to(Z)
        y = Y.diagonal().reciprocal() if self.diagonal else torch.linalg.inv(Y).diagonal()
        D = -(Z_inverse @ G) * y
        size = torch.linalg.matrix_norm(D, 2).clamp_min(1e-30)
        noise = self.variance * y.sum() / self.n_samples / size**2
        D = D / size
        omega = noise * Z_inverse - D @ D.mT
        A = torch.linalg.eigh((omega + omega.mT) / 2).eigenvectors[:, : site.rank]
        A = A * A.gather(0, A.abs().argmax(0, keepdim=True)).sign()  # signs are free
        t = {"A": A.mT, "B": D.mT @ A}
        return {name: (x / self.gamma**0.5).to(evidence.weight) for name, x in t.items()}


register("lora_da", "initialization", __doc__, RSLORA_FORM, start=LoRADA())
