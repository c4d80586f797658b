"""LoRA-α: plain LoRA, s = α / r, with α = 256 √r and full fine-tuning's rates.

Raising α raises the signal of the update without raising the drift ratio, which η cannot do; the
best α follows a square-root law in r.

:summary: LoRA with a large scale that falls as 1 / sqrt(r), for small learning rates
:equation: dW = (alpha / r) B A, alpha = 256 sqrt(r)
:trap: s = 256 / sqrt(r) is large: use full fine-tuning's learning rates, not LoRA's.
:trap: An alpha given by the user replaces the law.
:trap: The coefficient was calibrated on Tulu 3 with models of a few billion parameters and depends
    on the width: 256 is a start, and small models want a smaller one.
:title: The Hidden Power of Scaling Factor in LoRA Optimization
:authors: Zicheng Zhang, Haoran Li, Jiaxing Wang, Guoqiang Gong, Anqi Li, Yudong Hu, Ting Xiong,
    Yurong Gao, Junxing Hu, Zhida Jiang, Yifeng Zhang, Pengzhang Liu, Qixia Jiang
:source: arXiv 2606.12883, 2026: the square-root law of the abstract; the coefficient from notes on
    v1
:verified: abstract and two independent notes on v1's text; the paper's equations could not be read
"""

from loralab.methods import register
from loralab.methods.expansion.lora import LoRA

register("lora_alpha", "optimization", __doc__, LoRA(alpha_base=256.0, alpha_power=0.5))
