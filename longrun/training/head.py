"""The model's head, spared where nothing is trained.

Of a chat, half of the tokens are context; their logits, a vocabulary wide in full precision, are most of the memory of
a small model's step and a good part of its time, and the loss ignores them. transformers' models leave them out when
they are given `logits_to_keep` (positions) and `shift_labels` (the tokens there). Not all do it rightly, or at all:
a model is tried once, when it is loaded.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch

from longrun.training.base_model import is_out_of_memory
from longrun.training.masks import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT, TRAINED, PADDING = 5, 3, 2  # tokens of the rows that a model is tried with
SAME = 1e-3  # of a loss; in bfloat16, too, labels that are off by one are much further off


def where_trained(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The positions after which any row trains a token, shape (kept,), and the tokens there, shape (rows, kept).

    `labels` has the shape (rows, tokens). Logits predict the next token, so a position's label is the one after it.
    """
    following = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    positions = (following != IGNORED).any(dim=0).nonzero().squeeze(1)
    return {"logits_to_keep": positions, "shift_labels": following[:, positions].contiguous()}


def can_be_spared(model: PreTrainedModel) -> bool:
    """Whether this model's loss is the same without the logits that nothing is trained at."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return False
    try:
        wanted, found = _losses(model)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False  # it takes the positions, but not the labels
    return abs(found - wanted) <= SAME * wanted


@torch.no_grad()
def _losses(model: PreTrainedModel) -> tuple[float, float]:
    """Of two rows, one of them padded, both trained in the middle: with all logits, and with those needed."""
    tokens = 2 * CONTEXT + TRAINED
    input_ids = torch.arange(2 * tokens).reshape(2, tokens)
    labels = torch.full_like(input_ids, IGNORED)
    for row in range(2):
        labels[row, CONTEXT + row : CONTEXT + row + TRAINED] = input_ids[row, CONTEXT + row : CONTEXT + row + TRAINED]
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -PADDING:] = 0
    batch = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
    model.eval()  # type: ignore[no-untyped-call]  # a training step sets its own mode
    found = [
        float(model(**{name: tensor.to(model.device) for name, tensor in inputs.items()}).loss)
        for inputs in (batch, batch | where_trained(labels))
    ]
    return found[0], found[1]
