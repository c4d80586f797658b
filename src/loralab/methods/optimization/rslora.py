"""rsLoRA: h = W x + γ_r B A x with γ_r = α / √r.

Definition 3.1 asks for outputs and input gradients that neither vanish nor grow with r; theorem 3.2
gives γ_r ∈ Θ(1/√r). Only the scale differs from LoRA.

:summary: LoRA with the scale alpha / sqrt(r), so that large ranks still learn
:equation: dW = (alpha / sqrt(r)) B A
:trap: With alpha = r the scale grows as sqrt(r); keep alpha fixed when r changes.
:trap: At equal alpha the scale is sqrt(r) times LoRA's, so the best rate is lower.
:title: A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA
:authors: Damjan Kalajdzievski
:source: arXiv 2312.03732, 2023: theorem 3.2
:verified: equality with installed PEFT (use_rslora); the paper's text was not to be had
"""

from loralab.methods import register
from loralab.methods.expansion.lora import LoRA

# alpha stays 16 whatever r: alpha = r would undo the law (s = √r).
RSLORA_FORM = LoRA(scaling="alpha/sqrt(r)", alpha_base=16.0, alpha_power=0.0)

register("rslora", "optimization", __doc__, RSLORA_FORM)
