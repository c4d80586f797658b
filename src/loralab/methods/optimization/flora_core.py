"""FLoRA (core space): dW = s B G A with a trained core G [r, r].

The Tucker form for a matrix; A and B are random at the start, and trained. For convolutions the
paper keeps the kernel's axes (G and two more factors in four dimensions), which a layer seen as one
matrix does not show; so Conv2d is left out. The authors' code takes s itself (1 by default), not
alpha / r. Another FLoRA, arXiv 2402.03293, compresses gradients.

:summary: A core matrix that starts at 0 between two random, trained factors
:equation: dW = s B G A, G [r, r] = 0, A and B ~ N(0, 1/(2r))
:trap: Only the core has a gradient at step 0; A and B follow once it has moved.
:trap: A's entries are of size 1/sqrt(2r), far above LoRA's 1/sqrt(n): s acts accordingly.
:title: Maintaining Structural Integrity in Parameter Spaces for Parameter Efficient Fine-tuning
:authors: Chongjie Si, Xuehui Wang, Xue Yang, Zhengqin Xu, Qingyun Li, Jifeng Dai, Yu Qiao, Xiaokang
    Yang, Wei Shen
:source: arXiv 2405.14739, 2024: section 3, Tucker form of order two
:verified: authors' code (SJTU-DeepVisionLab/FLoRA flora/layers.py); the paper's text was not to be
    had
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loralab.methods import register
from loralab.methods.expansion.lora import normal
from loralab.recipe import LAYERS, Evidence, Form, Site, Tensors


@dataclass(frozen=True)
class FLoRACore(Form):
    """A low-rank core between two trained factors."""

    owns: ClassVar[frozenset[str]] = frozenset({"A", "B", "G"})
    layers: ClassVar[frozenset[str]] = LAYERS - {"Conv2d"}

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        """Return G = 0 and A, B ~ N(0, 1/(2r)): the authors' Kaiming-normal with a = √3."""
        r = site.rank
        std = (2 * r) ** -0.5
        return {
            "A": normal(evidence, "A", r, site.d_in, std=std),
            "B": normal(evidence, "B", site.d_out, r, std=std),
            "G": evidence.weight.new_zeros(r, r),
        }

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        return t["B"] @ t["G"], t["A"]


register("flora_core", "optimization", __doc__, FLoRACore())
