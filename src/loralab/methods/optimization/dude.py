"""DuDe: W' = m V / ‖V‖, V = W0 + B A - B0 A0, DoRA's magnitude and direction, with A and B started
as PiSSA's leading singular triplets of W0 (figure 1(b)).

:summary: DoRA started from PiSSA's singular triplets
:equation: W' = m (W + s (B A - B0 A0)) / |W + s (B A - B0 A0)| per row, B0 A0 = top r of W
:trap: LoRAFactory's code does not train the magnitude; the paper and we do.
:trap: The norm is constant in the backward pass as in DoRA; the paper's analysis of gradients, by
    a study of its text, goes through the norm (detach_norm=False).
:trap: As with PiSSA the best learning rate is below LoRA's.
:title: Dual Decomposition of Weights and Singular Value Low Rank Adaptation
:authors: Jialong Han, Si Zhang, Ke Zhang
:source: arXiv 2505.14367, 2025: figure 1(b), sections 3.2 and 3.3
:verified: the abstract, the figure's caption, a study that read the paper (magnitude learned) and
    LoRAFactory's dude.py; the paper's text could not be read
"""

from loralab.methods import register
from loralab.methods.initialization.pissa import PiSSA
from loralab.methods.optimization.dora import DoRA

register("dude", "optimization", __doc__, DoRA(), start=PiSSA())
