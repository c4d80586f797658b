"""COLA (Chain of LoRA): tune a pair, tie it to the frozen part, go on with a new pair and a new
optimizer, as Frank-Wolfe's steps do.

The paper merges into W; here the sum is the adapter's own frozen low-rank term. The chain has at
most three links in the paper, five epochs in all, and gains with each. Links of equal length are
ours; smaller ranks for later links are not offered, an ablation to save parameters.

:summary: Trains a chain of pairs, each on what the ones before it left over
:equation: dW = s (B_1 A_1 + ... + B_k A_k), pair i trained in link i
:trap: The optimizer begins again with each link; its first Adam steps have full size.
:trap: With one link it is LoRA.
:title: Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning
:authors: Wenhan Xia, Chengwei Qin, Elad Hazan
:source: arXiv 2401.04151, 2024: section 3.2, algorithm 1; section 6.2 for the lengths
:verified: the abstract, the survey arXiv 2601.22708 and a public section-by-section note of the
    paper, whose own text was not to be had
"""

from collections.abc import Sequence
from dataclasses import dataclass

from loralab.bounds import Count
from loralab.methods import register
from loralab.methods.expansion._phases import Phases, forget
from loralab.methods.expansion.lora import LoRA
from loralab.recipe import SiteState


@dataclass(frozen=True)
class Chain(Phases):
    """Fold and start anew with an empty optimizer.

    Args:
        n_links: length of the chain, used when `every` is None; 3 is the paper's longest.
    """

    n_links: Count = 3

    def after_step(self, sites: Sequence[SiteState], step: int, n_steps: int) -> None:
        if count := self.ended(self.n_links, step, n_steps):
            for site in sites:
                site.restart(count)
                forget(site)


register("cola", "expansion", __doc__, LoRA(), schedule=Chain())
