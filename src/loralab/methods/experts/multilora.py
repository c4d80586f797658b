"""MultiLoRA, arXiv 2311.11501: y = W0 x + s Σ_i scaling_i B_i A_i x, with n parallel pairs.

A and B both start Kaiming-uniform and the learned scaling at 0, so that no pair is tied to
another's directions. Whether the scaling is one number per module or one per output is an option;
the only code found, a baseline of MTL-LoRA's authors, has one per output.

:summary: Several parallel pairs whose learned scales start at 0 instead of B
:equation: dW = s sum_i scaling_i B_i A_i, A, B Kaiming-uniform, scaling_i = 0
:trap: There is no router: the pairs add up and merge like LoRA.
:trap: While the scales are 0, A and B have no gradient: they move one step later.
:trap: The rank is each pair's: three pairs of rank r have three times LoRA's parameters.
:title: MultiLoRA: Democratizing LoRA for Better Multi-Task Learning
:authors: Yiming Wang, Yu Lin, Xiaodong Zeng, Guannan Zhang
:source: arXiv 2311.11501, 2023: parallel modules with scaling_i
:verified: our reading of the abstract and of summaries, and pUmpKin-Co/MTL-LoRA's
    src/adapter/multilora.py, which has one scale per output; the text was not to be had
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from loralab.bounds import Count
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.recipe import Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class MultiLoRA(Form):
    """Parallel pairs with learned scales.

    Args:
        n_modules: n; the paper tries 3 and 5.
        scaling: "module" for one learned scale per pair, "output" for one per pair and output.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "scaling"})

    n_modules: Count = 3
    scaling: Literal["module", "output"] = "module"

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [n r, in], B [out, n r] and scaling = 0, [1 or out, n].

        Kaiming-uniform as in LoRA's code, a = √5: U(±1/√fan_in).
        """
        width, rows = self.n_modules * site.rank, 1 if self.scaling == "module" else site.d_out
        return {
            "A": uniform(evidence, "A", width, site.d_in, bound=site.d_in**-0.5),
            "B": uniform(evidence, "B", site.d_out, width, bound=site.rank**-0.5),
            "scaling": evidence.weight.new_zeros(rows, self.n_modules),
        }

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        pairs = t["B"].unflatten(-1, (self.n_modules, -1))  # [*, out, n, r]
        return (t["scaling"].unsqueeze(-1) * pairs).flatten(-2), t["A"]


register("multilora", "experts", __doc__, MultiLoRA())
