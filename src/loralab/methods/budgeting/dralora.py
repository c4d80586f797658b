"""DRaLoRA, LoRAFactory (hhnqqq/MyTransformers, dralora.py; the survey is arXiv 2601.22708).

RaLoRA-Pro with D, what a few full fine-tuning steps of AdaLomo change in W, in the gradient's
place: importance |D|_F, r_l = ⌊P α_l / (d_in + d_out)⌋, P = Σ_l (d_in + d_out) r_ref, and n_l
from erank(D_l) / r_l. The code's default is one step, which has a closed form in the gradient.

:summary: RaLoRA-Pro that looks at a full fine-tuning step instead of the gradient
:equation: n_l = 2^floor(log2(erank(D_l) / r_l)), r_l from |D_l|_F, D AdaLomo's first step
:trap: A step normalised by rows and columns has a far larger effective rank than the gradient, so
    there are more blocks.
:trap: LoRAFactory can take several AdaLomo steps on W; here it is its default, one. More are not
    offered, as all after the first need a base that moves.
:title: A Unified Study of LoRA Variants
:authors: Haonan He, Jingqi Ye, Minglei Li, Zhengbo Wang, Mengqi Li, Tao Chen, Lei Bai, Peng Ye
:source: arXiv 2601.22708, 2026: its code LoRAFactory: dralora.py, ralora.py, adalomo.py
:verified: LoRAFactory's code; no paper of this name could be found
"""

from loralab.methods import register
from loralab.methods.budgeting.ralora import RaLoRA
from loralab.methods.budgeting.ralora_pro import Sensitivity

register(
    "dralora",
    "budgeting",
    __doc__,
    RaLoRA(update="adalomo"),
    start=Sensitivity(smoothing="none", importance="adalomo"),
)
