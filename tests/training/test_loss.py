"""What a step computes: logits only where a token is trained, parts that add up, and neither where it would change."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from longrun.training import loss
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
    found = model(**batch).loss
    found.backward()
    return found.detach(), torch.cat(
        [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    )


@pytest.mark.parametrize("family", ["qwen3", "llama3", "gemma3", "smollm2", "phi3"])
def test_real_architectures_make_only_the_logits_that_are_trained_and_lose_nothing(tmp_path, family):
    random_weights_folder(tmp_path / family, family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / family)
    assert loss.only_where_trained(model)
    assert loss.adds_up(model)
    for samples in (SAMPLES, *([one] for one in SAMPLES)):
        whole, spared = (loss_and_gradients(model, samples, spared=spared) for spared in (False, True))
        assert float(spared[0]) == pytest.approx(float(whole[0]), rel=1e-6)
        assert float((spared[1] - whole[1]).norm()) < 1e-5 * float(whole[1].norm())


def test_logits_are_made_only_where_a_row_trains_the_next_token():
    no = IGNORED
    batch = loss.where_trained(torch.tensor([[no, no, 5, 6, no], [no, 8, no, no, no]]))
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


class Averaging(LlamaForCausalLM):
    """Does not know of how many tokens its part of a step is."""

    def forward(self, input_ids=None, logits_to_keep=0, num_items_in_batch=None, **rest):
        return super().forward(input_ids, logits_to_keep=logits_to_keep, **rest)


def of(kind):
    torch.manual_seed(1)
    return kind(make_model().config)


@pytest.mark.parametrize(("kind", "only_where_trained", "adds_up"), [
    (LlamaForCausalLM, True, True),
    (Unable, False, False),
    (Deaf, False, True),
    (Shifting, False, True),
    (Averaging, True, False),
])  # fmt: skip
def test_a_model_is_spared_only_what_it_can_do_without(kind, only_where_trained, adds_up):
    assert loss.only_where_trained(of(kind)) is only_where_trained
    assert loss.adds_up(of(kind)) is adds_up


def test_a_micro_batch_in_which_nothing_is_trained_has_no_loss_and_no_gradient():
    collator = Collator(0)
    collator.only_trained = True
    batch = collator([{"input_ids": torch.tensor([0]).numpy(), "labels": torch.tensor([IGNORED]).numpy(), "row": -1}])
    assert batch.pop("rows") == []
    model = make_model()
    found = model(**batch, num_items_in_batch=torch.tensor(7)).loss
    found.backward()
    assert float(found.detach()) == 0
    assert not any(weight.grad.any() for weight in model.parameters() if weight.grad is not None)


def test_a_model_without_memory_to_try_it_is_not_taken_for_one_that_cannot():
    class Full(LlamaForCausalLM):
        def forward(self, input_ids=None, logits_to_keep=0, **rest):
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        loss.only_where_trained(of(Full))
