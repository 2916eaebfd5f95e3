"""Models and files to measure with, made in code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random
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


def make_base(folder: Path, **sizes: int) -> None:
    """The built-in tiny model as a folder; `sizes` are fields of its configuration that make it larger."""
    import torch
    from transformers import LlamaForCausalLM

    from longrun.training.tiny import make_model, make_tokenizer

    config = make_model().config
    for name, value in sizes.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
