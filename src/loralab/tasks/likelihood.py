"""The loss of each row's answer tokens, without logits that nobody reads.

Prompts and padding carry no label. The output head is by far the largest layer of a small model
with a large vocabulary, so it is applied at the labelled positions only, where that is the same.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loralab.tasks.base import Batch

IGNORED = -100


def row_losses(model: nn.Module, batch: Batch, sparse: bool) -> tuple[Tensor, Tensor]:
    """Return (summed negative log-likelihood of each row's labelled tokens, their number).

    Args:
        batch: `input_ids`, `attention_mask` and `labels` (-100 where nothing is asked), each
            [rows, length]; the label at position t is predicted from the tokens before t.
        sparse: `head_stands_alone(model)` is known to hold.
    """
    labels = batch["labels"][:, 1:]
    asked = labels != IGNORED
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    where = asked.flatten().nonzero().squeeze(-1)
    parts = _parts(model) if sparse else None
    if parts is not None:
        decoder, head = parts
        hidden = decoder(**inputs, use_cache=False).last_hidden_state[:, :-1]
        logits = head(hidden.flatten(0, 1).index_select(0, where))
    else:
        logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        logits = logits.index_select(0, where)
    wanted = labels.flatten().index_select(0, where)
    each = cross_entropy(_wide(logits), wanted, reduction="none")
    # Scattered into rows and summed along them: a row's number has no part of another's.
    total = each.new_zeros(labels.numel()).index_copy(0, where, each)
    return total.view(labels.shape).sum(-1), asked.sum(-1)


@torch.no_grad()
def head_stands_alone(model: nn.Module) -> bool:
    """Return whether logits are the output head applied to the decoder's states, and no more.

    Measured on a few tokens: models that scale or cap logits afterwards show it.
    """
    parts = _parts(model)
    if parts is None:
        return False
    decoder, head = parts
    ids = torch.arange(10, device=head.weight.device).view(2, 5) % head.out_features
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    full = model(**inputs).logits
    short = head(decoder(**inputs).last_hidden_state)
    return full.shape == short.shape and torch.allclose(full, short, rtol=1e-4, atol=1e-5)


def _parts(model: nn.Module) -> tuple[nn.Module, nn.Linear] | None:
    """Return decoder and output head, if the head is a bare linear layer without an adapter."""
    find_head = getattr(model, "get_output_embeddings", None)
    find_decoder = getattr(model, "get_decoder", None)
    if find_head is None or find_decoder is None:
        return None
    head, decoder = find_head(), find_decoder()
    if decoder is None or decoder is model:
        return None
    return (decoder, head) if type(head) is nn.Linear and not hasattr(head, "loralab") else None


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
