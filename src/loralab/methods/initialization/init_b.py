"""Init[B], arXiv 2406.08447: A = 0 and B random, the other of the two starts with B A = 0.

The paper's analysis: B of variance Θ(1/r), independent of the width, and A = 0 learn stably but
less than LoRA's Init[A], whose A has variance Θ(1/n) and B = 0.

:summary: Starts B at random and A at zero
:equation: A0 = 0, B0 ~ U(±1/sqrt(r)), dW = s B A
:trap: The gradient of B is zero at step 0: here A moves first.
:trap: B's start does not shrink with the width, so it wants smaller learning rates than LoRA's own
    start, and the paper finds it worse.
:title: The Impact of Initialization on LoRA Finetuning Dynamics
:authors: Soufiane Hayou, Nikhil Ghosh, Bin Yu
:source: arXiv 2406.08447, 2024: Init[B]
:verified: the abstract, the survey arXiv 2601.22708 and the same authors' LoRA+ paper (section 3.1,
    Init[2]: A = 0, a variance of B that the width does not enter); the law 1/r is our reading, the
    uniform draw LoRA's; the paper's own text was not to be had
"""

from dataclasses import dataclass
from typing import ClassVar

from loralab.bounds import Positive
from loralab.methods import register
from loralab.methods.expansion.lora import LoRA, uniform
from loralab.recipe import Evidence, Site, Start, Tensors


@dataclass(frozen=True)
class InitB(Start):
    """A is zero and B ~ U(±gain/√r): Kaiming-uniform over B's own inputs, as A's in LoRA.

    Args:
        gain: 1 is the a = √5 of LoRA's code; √3 gives variance 1/r.
    """

    trained: ClassVar[frozenset[str]] = frozenset({"A"})  # it is 0

    gain: Positive = 1.0

    def init(self, site: Site, evidence: Evidence) -> Tensors:
        bound = self.gain * site.rank**-0.5
        return {
            "A": evidence.weight.new_zeros(site.rank, site.d_in),
            "B": uniform(evidence, "B", site.d_out, site.rank, bound=bound),
        }


register("init_b", "initialization", __doc__, LoRA(), start=InitB())
