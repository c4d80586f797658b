"""Greedy decoding with a key-value cache, for batches whose rows may belong to different adapters.

Rows never look at each other and none is dropped before all have ended, so the row layout that a
pack was given (`with pack.rows(...)`) holds for every step.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def greedy(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
) -> Tensor:
    """Return the most likely continuation token by token, [rows, n] with n <= max_new_tokens.

    Args:
        model: a transformers causal language model.
        input_ids: left-padded prompts, [rows, length].
        attention_mask: 1 for tokens and 0 for padding, [rows, length]; None means no padding.
        eos_token_ids: a row ends with the first of these, which is kept; `pad_token_id` follows.

    Decoding stops when all rows have ended. Equal to `model.generate(do_sample=False)`.
    """
    known = inspect.signature(model.forward).parameters
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    padded = not bool(mask.all())  # without padding the model can take its faster causal path
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    ends = torch.tensor(list(eos_token_ids), device=input_ids.device, dtype=input_ids.dtype)
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    cache, tokens, out = None, input_ids, []
    for _ in range(max_new_tokens):
        if padded:
            extra["attention_mask"] = mask
        if "position_ids" in known:
            extra["position_ids"] = position
        result = model(input_ids=tokens, past_key_values=cache, use_cache=True, **extra)
        cache = result.past_key_values
        best = result.logits[:, -1].argmax(-1).masked_fill(ended, pad_token_id)
        out.append(best)
        ended = ended | torch.isin(best, ends)
        if bool(ended.all()):
            break
        tokens = best.unsqueeze(-1)
        position = position[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], -1)
    return torch.stack(out, -1) if out else input_ids[:, :0]
