"""Logits are spared where nothing is trained, only where that changes no loss and no gradient."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from longrun.training import head
from longrun.training.data import Collator
from longrun.training.masks import IGNORED
from longrun.training.tiny import make_model
from tests.training.templates import random_weights_folder


def sample(number, context, trained, after=0):
    tokens = [(7 * number + at) % 250 for at in range(context + trained + after)]
    labels = [IGNORED] * context + tokens[context : context + trained] + [IGNORED] * after
    return {"input_ids": torch.tensor(tokens).numpy(), "labels": torch.tensor(labels).numpy(), "row": number}


SAMPLES = [sample(1, 0, 9), sample(2, 5, 4, 3), sample(3, 20, 1), sample(4, 2, 30)]


def loss_and_gradients(model, samples, *, spared):
    collator = Collator(0)
    collator.only_trained = spared
    batch = collator(samples)
    batch.pop("rows")
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


@pytest.mark.parametrize("family", ["qwen3", "llama3", "gemma3", "smollm2", "phi3"])
def test_real_architectures_spare_their_head_and_lose_nothing(tmp_path, family):
    random_weights_folder(tmp_path / family, family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / family)
    assert head.can_be_spared(model)
    for samples in (SAMPLES, *([one] for one in SAMPLES)):
        whole, spared = (loss_and_gradients(model, samples, spared=spared) for spared in (False, True))
        assert float(spared[0]) == pytest.approx(float(whole[0]), rel=1e-6)
        assert float((spared[1] - whole[1]).norm()) < 1e-5 * float(whole[1].norm())


def test_logits_are_made_only_where_a_row_trains_the_next_token():
    no = IGNORED
    batch = head.where_trained(torch.tensor([[no, no, 5, 6, no], [no, 8, no, no, no]]))
    assert batch["logits_to_keep"].tolist() == [0, 1, 2]
    assert batch["shift_labels"].tolist() == [[no, 5, 6], [8, no, no]]


class Unable(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(input_ids, attention_mask=attention_mask, labels=labels)


class Deaf(LlamaForCausalLM):
    """Takes the positions, but makes the labels itself."""

    def forward(self, input_ids=None, logits_to_keep=0, shift_labels=None, **rest):
        return super().forward(input_ids, logits_to_keep=logits_to_keep, **rest)


class Shifting(LlamaForCausalLM):
    """Shifts labels that are shifted already."""

    def forward(self, input_ids=None, logits_to_keep=0, shift_labels=None, **rest):
        if shift_labels is not None:
            shift_labels = shift_labels.roll(-1, dims=1)
        return super().forward(input_ids, logits_to_keep=logits_to_keep, shift_labels=shift_labels, **rest)


@pytest.mark.parametrize("kind", [Unable, Deaf, Shifting])
def test_a_model_that_would_lose_something_makes_all_its_logits(kind):
    assert head.can_be_spared(make_model())
    assert not head.can_be_spared(kind(make_model().config))


def test_a_model_without_memory_to_try_it_is_not_taken_for_one_that_cannot():
    class Full(LlamaForCausalLM):
        def forward(self, input_ids=None, logits_to_keep=0, **rest):
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        head.can_be_spared(Full(make_model().config))
