"""DuDe, arXiv 2505.14367: W' = m (W0 + B A - B0 A0) / ‖...‖, DoRA's magnitude and direction, with A
and B started as PiSSA's leading singular triplets of W0.

:summary: DoRA started from PiSSA's singular triplets
:equation: W' = m (W + s (B A - B0 A0)) / |W + s (B A - B0 A0)| per row, B0 A0 = top r of W
:trap: LoRAFactory's code does not train the magnitude; the paper and we do.
:trap: As with PiSSA the best learning rate is below LoRA's.
:title: Dual Decomposition of Weights and Singular Value Low Rank Adaptation
:authors: Jialong Han, Si Zhang, Ke Zhang
:source: arXiv 2505.14367, 2025: figure 1(b)
:verified: the abstract, the figure's caption and LoRAFactory's dude.py; the paper's text could not
    be read
"""

from loralab.methods import register
from loralab.methods.initialization.pissa import PiSSA
from loralab.methods.optimization.dora import DoRA

register("dude", "optimization", __doc__, DoRA(), start=PiSSA())
