"""DyLoRA: h = W0 x + (α/b) W_up↓b W_dw↓b x, where ↓b keeps the first b columns of W_up and rows of
W_dw, with a random b at every training step.

The ranks get sorted by importance, so that afterwards any b serves without training anew. One b ~
p_B, uniform as in the authors' script or geometric by `p`, serves all modules of a step.
`last_only` trains the b-th column and row alone: the paper's DyLoRA (Frozen), and what that script
does. Evaluation uses all r ranks until `Truncate` cuts at another b.

:summary: Trains with a random number of leading ranks, so that any rank works afterwards
:equation: h = W x + (alpha / b) B[:, :b] A[:b] x, b random in 1..r at every step
:trap: The scale is alpha over the b of the step, not over r; a truncation must keep that.
:trap: Ranks are nested: rank b uses the first b, never the b best by some later measure.
:title: DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free Low Rank
    Adaptation
:authors: Mojtaba Valipour, Mehdi Rezagholizadeh, Ivan Kobyzev, Ali Ghodsi
:source: arXiv 2210.07558, 2022: section 4, eqs. 5, 7, 9 and 10, algorithm 1
:verified: authors' code (huawei-noah/Efficient-NLP, DyLoRA/loralib and run_glue.py) and a public
    reading of the paper with the equations' numbers; the text itself was not to be had
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loralab.bounds import InnerShare
from loralab.methods import register
from loralab.methods.budgeting._ranks import Truncate
from loralab.methods.expansion.lora import plain_pair
from loralab.recipe import Evidence, Form, Recipe, Site, Tensors


@dataclass(frozen=True)
class DyLoRA(Form):
    """LoRA that is trained for all ranks up to r at once.

    Args:
        last_only: train only the b-th rank of the b in use.
        p: None for the uniform p_B; else the geometric one's, (1-p)^(b-1) p cut at r (paper: 0.15).
    """

    pair: ClassVar[bool] = True
    owns: ClassVar[frozenset[str]] = frozenset({"A", "B"})
    draws_alike: ClassVar[bool] = True  # one b per step for the whole model

    last_only: bool = False
    p: InnerShare | None = None

    def objection(self, recipe: Recipe) -> tuple[str, str] | None:
        if not recipe.schedule.resizes or isinstance(recipe.schedule, Truncate):
            return None
        return "schedule", "its ranks are nested, so they can be cut off at the end, not moved"

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        return plain_pair(site, evidence)

    def draw(self, site: Site, n: int, generator: torch.Generator) -> Tensors:
        """Return weights [r] that are r/b for the first b ranks, and a mask [r] of the b-th."""
        i = torch.arange(site.rank)
        chance = (1 - (self.p or 0.0)) ** i.double()
        b = int(torch.multinomial(chance, 1, generator=generator))
        return {"weights": (i <= b) * (site.rank / (b + 1)), "last": (i == b).float()}

    def factors(self, t: Tensors, site: Site) -> tuple[Tensor, Tensor]:
        B, A = t["B"], t["A"]
        if "weights" not in t:
            return B, A
        if self.last_only:
            last = t["last"].to(B.dtype)
            B = B.detach().lerp(B, last.unsqueeze(-2))
            A = A.detach().lerp(A, last.unsqueeze(-1))
        return B * t["weights"].to(B.dtype).unsqueeze(-2), A


register("dylora", "budgeting", __doc__, DyLoRA(), schedule=Truncate())
