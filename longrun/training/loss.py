"""The loss of a step: made only where a token is trained, and in parts that add up.

Of a chat, half of the tokens are context; their logits, a vocabulary wide in full precision, are most of the memory of
a small model's step and a good part of its time, and the loss ignores them. transformers' models leave them out when
they are given `logits_to_keep` (positions) and `shift_labels` (the tokens there). And a step may be computed in
micro-batches when each one's loss is its share of the step's, which they are given as `num_items_in_batch`.

Not all models do either rightly, or at all. Each is tried when it is loaded.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from longrun.training.base_model import is_out_of_memory
from longrun.training.masks import IGNORED

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

Batch = dict[str, torch.Tensor]

CONTEXT, TRAINED, PADDING = 5, 3, 2  # tokens of the rows that a model is tried with
# Of a loss. Labels that are off by one change it by more, and rounding by far less, in bfloat16 too.
SAME = 1e-2
# A row alone may go through other kernels than one that is padded, and rounding adds up through all layers. Losses of
# parts that are no shares of the whole are off by as many times as there are parts.
SAME_IN_PARTS = 5e-2


def where_trained(labels: torch.Tensor) -> Batch:
    """The positions after which any row trains a token, shape (kept,), and the tokens there, shape (rows, kept).

    `labels` has the shape (rows, tokens). Logits predict the next token, so a position's label is the one after it.
    """
    following = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    positions = (following != IGNORED).any(dim=0).nonzero().squeeze(1)
    return {"logits_to_keep": positions, "shift_labels": following[:, positions].contiguous()}


def only_where_trained(model: PreTrainedModel) -> bool:
    """Whether the loss is the same without the logits that nothing is trained at."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return False

    def without_them(batch: Batch) -> float:
        return _loss(model, {**batch, **where_trained(batch["labels"])})

    return _agree(model, SAME, lambda batch: _loss(model, batch), without_them)


def adds_up(model: PreTrainedModel) -> bool:
    """Whether the losses of two micro-batches are together the loss of both, when each is told of how many tokens."""
    count = 2 * TRAINED

    def in_parts(batch: Batch) -> float:
        rows = ({name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(2))
        return sum(_loss(model, row, num_items_in_batch=count) for row in rows)

    return _agree(model, SAME_IN_PARTS, lambda batch: _loss(model, batch), in_parts)


@torch.no_grad()
def _agree(
    model: PreTrainedModel, within: float, wanted: Callable[[Batch], float], found: Callable[[Batch], float]
) -> bool:
    model.eval()  # type: ignore[no-untyped-call]  # a training step sets its own mode
    try:
        batch = _batch(model)
        loss = wanted(batch)
        return abs(found(batch) - loss) <= within * loss
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False  # it does not take what it was given


def _batch(model: PreTrainedModel) -> Batch:
    """Two rows, one of them padded, both trained in the middle.

    The tokens to train are by turns those that the model finds likeliest and least likely: wherever a label is held
    against the logits of another place, the loss is another one.
    """
    tokens = 2 * CONTEXT + TRAINED
    input_ids = torch.arange(2 * tokens, device=model.device).reshape(2, tokens)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, -PADDING:] = 0
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    likeliest, least = logits.argmax(dim=-1), logits.argmin(dim=-1)
    labels = torch.full_like(input_ids, IGNORED)
    for row in range(2):
        for at in range(CONTEXT + row, CONTEXT + row + TRAINED):
            labels[row, at] = (likeliest if at % 2 else least)[row, at - 1]
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def _loss(model: PreTrainedModel, batch: Batch, **more: Any) -> float:
    return float(model(**batch, **more).loss)
