"""MELoRA: mini pairs, each from its own n-th of the inputs to its own n-th of the outputs: rank n r
with the parameters of rank r.

:summary: Small pairs side by side on the diagonal: n times the rank at LoRA's count
:equation: dW = s diag(B_1 A_1, ..., B_n A_n), each of rank r
:trap: The rank asked for is that of one mini pair, the whole has n r, and s = alpha / r;
    LoRAFactory gives each mini pair r / n.
:trap: Part i of the outputs sees part i of the inputs only.
:trap: Inputs and outputs must be multiples of n.
:title: MELoRA: Mini-Ensemble Low-Rank Adapters for Parameter-Efficient Fine-Tuning
:authors: Pengjie Ren, Chengshun Shi, Shiguang Wu, Mengqi Zhang, Zhaochun Ren, Maarten de Rijke,
    Zhumin Chen, Jiahuan Pei
:source: arXiv 2402.17263, 2024: section 3, eq. 4 for the rank
:verified: authors' code (ChasonShi/MELoRA), a public summary of the paper (ACL 2024) and the survey
    arXiv 2601.22708; the text itself was not to be had
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import Count
from loralab.errors import UserError
from loralab.methods import register
from loralab.methods.expansion.lora import uniform
from loralab.recipe import Evidence, Form, Site, Tensors


def block_diagonal(blocks: Tensor) -> Tensor:
    """Return blocks [*, n, p, q] along the diagonal of a matrix [*, n p, n q]."""
    spread = torch.diag_embed(blocks.movedim(-3, -1))  # [*, p, q, n, n]
    return spread.movedim((-2, -1), (-4, -2)).flatten(-2).flatten(-3, -2)


def check_parts(form: Form, k: int, site: Site, **sizes: int) -> None:
    """Raise UserError unless all of the site's `sizes` are multiples of k."""
    for what, size in sizes.items():
        if size % k or size < k:
            raise UserError(
                f"{type(form).__name__} cannot adapt {site.name}: its {what} ({size}) cannot be "
                f"cut into {k} equal parts; choose another number of them, or leave it out"
            )


@dataclass(frozen=True)
class MELoRA(Form):
    """An ensemble of mini pairs.

    Args:
        n_mini: n; 2, 4 or 8 on GLUE and 8 to 64 with Llama-2 in the paper, 2 in the survey.
    """

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    rank_axis: ClassVar[Mapping[str, int]] = {"A": -2, "B": -1}

    n_mini: Count = 2

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return A [n, r, in/n] and B [n, out/n, r] = 0."""
        k = self.n_mini
        check_parts(self, k, site, inputs=site.d_in, outputs=site.d_out)
        n = site.d_in // k
        return {
            "A": uniform(evidence, "A", k, site.rank, n, bound=n**-0.5),
            "B": evidence.weight.new_zeros(k, site.d_out // k, site.rank),
        }

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return block_diagonal(t["B"]), block_diagonal(t["A"])


register("melora", "expansion", __doc__, MELoRA())
