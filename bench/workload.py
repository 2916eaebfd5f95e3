"""Models and files to measure with, made in code."""

from __future__ import annotations

import itertools
import json
import random
from typing import TYPE_CHECKING, Any

from longrun.plan import held_out

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WORDS = ["sum", "apple", "river", "seven", "green", "train", "paper", "cloud", "maple", "stone"]


def numbered(name: str, rows: int, dice: random.Random) -> list[dict[str, Any]]:
    """Rows of different lengths that carry their names."""
    texts = [" ".join(dice.choices(WORDS, k=dice.randint(2, 12))) for _ in range(rows)]
    return [marked(name, number, [chat("user", text), chat("assistant", text)]) for number, text in enumerate(texts)]


def marked(name: str, number: int, messages: list[dict[str, str]]) -> dict[str, Any]:
    first = {**messages[0], "content": f"Row {name}-{number:04d}. {messages[0]['content']}"}
    return {"messages": [first, *messages[1:]]}


def chat(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def rows_for(trained: int) -> int:
    """The rows of a file of which Longrun trains so many: some it holds out for the evaluation."""
    return next(rows for rows in itertools.count(trained) if rows - held_out(rows) == trained)


def make_base(folder: Path, **sizes: int) -> None:
    """The built-in tiny model as a folder; `sizes` are fields of its configuration that make it larger."""
    import torch
    from transformers import LlamaForCausalLM

    from longrun.training.tiny import make_model, make_tokenizer

    config = make_model().config
    for name, value in {"head_dim": None, **sizes}.items():
        setattr(config, name, value)
    config.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def chats(megabytes: int) -> Iterator[str]:
    """Lines of a chat file of about this size: words as often as in English, 80 in a question or answer."""
    dice = random.Random(1)
    syllables = [a + b for a in "bdfgklmnprstvw" for b in "aeiou"]
    words = ["".join(dice.choices(syllables, k=dice.choice((1, 2, 2, 3, 4)))) for _ in range(20_000)]
    often = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))  # Zipf's law
    size = 0
    while size < megabytes * 1_000_000:
        question, answer = (" ".join(dice.choices(words, cum_weights=often, k=dice.randint(40, 120))) for _ in range(2))
        yield (line := json.dumps({"messages": [chat("user", question), chat("assistant", answer)]}) + "\n")
        size += len(line)


def make_tokenizer_of(folder: Path, lines: Iterator[str], vocabulary: int = 32_000) -> None:
    """A byte-level BPE of the usual size, learned from these lines, with the tiny model's chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from longrun.training.tiny import make_tokenizer

    tiny = make_tokenizer()
    special = tiny.special_tokens_map
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learned.train_from_iterator(
        lines,
        trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[*special.values()], initial_alphabet=alphabet),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learned, model_max_length=4096, **special)
    tokenizer.chat_template = tiny.chat_template
    tokenizer.save_pretrained(folder)
