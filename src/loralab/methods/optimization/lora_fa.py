"""LoRA-FA: A keeps its random start, only B is trained.

dW = s B A0 then lives in the row space of A0, and the backward pass needs x A0ᵀ instead of x. The
paper's second version (April 2026) corrects the gradient of B, as PEFT does; that is `project`.

:summary: Freezes A at its random start and trains B alone
:equation: dW = s B A0
:trap: Whatever re-enables gradients on A (toggling an adapter, say) undoes the method.
:title: LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning
:authors: Longteng Zhang, Lin Zhang, Shaohuai Shi, Xiaowen Chu, Bo Li
:source: arXiv 2308.03303, 2023: section 3
:verified: the survey arXiv 2601.22708 and LoRAFactory's code; `project` by equality with installed
    PEFT and the second version's abstract; the paper's text was not to be had
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from loralab.methods import register
from loralab.methods.expansion.lora import LoRA
from loralab.recipe import Hyper, Recipe, SiteState
from loralab.training.adamw import AdamW, per_slot
from loralab.training.gram import inverse_gram, with_gradients


@dataclass(frozen=True)
class FrozenA(AdamW):
    """AdamW on everything but A.

    Args:
        project: correct B's gradient to G_B (A Aᵀ)⁻¹ / s², along which a plain step moves W by its
            own gradient's part in the row space of A.
    """

    singles_out: ClassVar[frozenset[str]] = frozenset({"A"})

    project: bool = False

    def objection(self, recipe: Recipe) -> tuple[str, str] | None:
        if not self.project or recipe.form.pair:
            return None
        return "form", "project corrects the gradient of a pair's B, and the form has no pair"

    def trains(self, name: str) -> bool:
        return name != "A"

    def step(self, sites: Sequence[SiteState], hyper: Hyper) -> None:
        super().step([corrected(site) for site in sites] if self.project else sites, hyper)


def corrected(site: SiteState) -> SiteState:
    """Return the site with B's gradient times (A Aᵀ)⁻¹ / s²; the user's gradient stays."""
    inverse = inverse_gram(site.fixed["A"].mT, 1e-8)
    B = (site.g["B"].double() @ inverse) / per_slot(site.scale.double(), inverse) ** 2
    return with_gradients(site, site.g | {"B": B.to(site.g["B"])})


register("lora_fa", "optimization", __doc__, LoRA(), rule=FrozenA())
