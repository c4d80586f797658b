"""AdaMoLE, arXiv 2405.00361: y = W0 x + s Σ_i ω_i(x) B_i A_i x, where a threshold chooses as many
experts as the token needs: p = softmax(W_g x), τ = τ_max σ(W_τ x + b_τ),
ω_i = max(p_i - τ, 0) / Σ_j max(p_j - τ, 0).

:summary: A learned threshold per token decides how many LoRA experts are used
:equation: w_i = max(p_i - tau, 0) / sum_j max(p_j - tau, 0), tau = tau_max sigmoid(...)
:trap: The number of experts at work is not fixed: all, one, or with a large max_threshold none.
:trap: The rank is each expert's: eight experts of rank r have eight times LoRA's parameters.
:title: AdaMoLE: Fine-Tuning Large Language Models with Adaptive Mixture of Low-Rank Adaptation
    Experts
:authors: Zefang Liu, Jiahua Luo
:source: arXiv 2405.00361, 2024: eqs. 5 to 7
:verified: the paper's text (a copy of sections 2 to 6; eqs. 5 to 7, settings of 4.3) and the
    authors' code (zefang-liu/AdaMoLE, src/adamole/layer.py)
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.bounds import Count, NonNegative, SomeShare
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.methods.experts._experts import Routed, expert_tensors
from loralab.methods.experts._routing import balance, logits, mix, router
from loralab.recipe import Evidence, Site, Tensors


@dataclass(frozen=True)
class AdaMoLE(Routed):
    """Experts above a threshold that is learned and differs by token.

    Args:
        n_experts: N.
        max_threshold: τ_max; None takes 1/N, with which at least one expert is always above. The
            paper's table 3 has 1/(2N) a little ahead of it.
        subtract: weigh by p_i - τ, as eqs. 6 and 7 and the authors' code do; False by p_i, as the
            survey arXiv 2601.22708 writes it (then the threshold is trained by the balance loss
            alone).
        balance: weight of the balance loss N Σ f_i P_i, where P_i is the mean of p_i - τ.
    """

    owns: ClassVar[frozenset[str]] = Routed.owns | {"W_tau", "b_tau"}

    n_experts: Count = 8
    max_threshold: SomeShare | None = None
    subtract: bool = True
    balance: NonNegative = 0.001

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [N r, in], B [out, N r] = 0, W_g [N, in], W_tau [1, in] and b_tau [1]."""
        bound = site.d_in**-0.5
        return expert_tensors(site, evidence, self.n_experts) | {
            "W_tau": uniform(evidence, "W_tau", 1, site.d_in, bound=bound),
            "b_tau": uniform(evidence, "b_tau", 1, bound=bound),
        }

    def above(self, t: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return p [*, n, N] and p - τ."""
        most = self.max_threshold if self.max_threshold is not None else 1 / self.n_experts
        p = router(t, x)
        return p, p - most * (logits(t["W_tau"], x) + t["b_tau"].unsqueeze(-1)).sigmoid()

    def branch(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        p, excess = self.above(t, x)
        kept = excess.relu() if self.subtract else p * (excess >= 0)
        total = kept.sum(-1, keepdim=True)
        # With a larger τ_max no expert may be above; then the token gets no update.
        omega = kept / total.where(total > 0, 1.0)
        return mix(omega, x, t["A"], t["B"])

    def aux_loss(self, t: Tensors, x: Tensor, site: Site) -> Tensor:
        _, excess = self.above(t, x)
        return self.balance * balance(excess, (excess >= 0).to(excess.dtype), t)


register("adamole", "experts", __doc__, AdaMoLE())
