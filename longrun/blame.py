"""Whose fault it is that a file cannot be trained: its own, or that of what it is trained with.

A file that crashes, hangs or fits no memory is given up, so that the next one trains. But a model that cannot be
saved, a GPU that is too small or a tokenizer that crashes fails with every file, and a whole queue would be given up,
one after another. What has worked once is trusted; until then, the second file that would be given up waits for a
person.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from longrun import fitting

if TYPE_CHECKING:
    from longrun.context import Context

TRIED = "what was trained with"  # the ledger's fact: {situation: the file that was given up in it, or WORKED}
WORKED = ""
LIBRARIES = ("torch", "transformers", "accelerate", "tokenizers")


def note_works(context: Context, situation: str) -> None:
    """A file got through: whatever fails in this situation from now on is a file's."""
    tried = _tried(context)
    if tried.get(situation) != WORKED:
        context.ledger.set_fact(TRIED, json.dumps(tried | {situation: WORKED}))


def alike(context: Context, situation: str, name: str) -> str | None:
    """Another file that was given up before, if nothing ever worked so; None: this one is at fault."""
    tried = _tried(context)
    if situation not in tried:
        context.ledger.set_fact(TRIED, json.dumps(tried | {situation: name}))
    other = tried.get(situation, WORKED)
    return None if other in (WORKED, name) else other


def training(context: Context, batch_size: int) -> str:
    """What a file is trained with, in words: its situation."""
    return f"{fitting.situation(context, batch_size)}, {_libraries()}"


def preparing(context: Context) -> str:
    """What a file is examined and made tokens of with, in words: its situation."""
    return f"preparing for {context.settings.model.base_model}, {_libraries()}"


def _tried(context: Context) -> dict[str, str]:
    tried: dict[str, str] = json.loads(context.ledger.fact(TRIED) or "{}")
    return tried


@cache
def _libraries() -> str:
    """Which versions are installed; looked up once, because it is asked for after each checkpoint."""
    return ", ".join(f"{library} {_version(library)}" for library in LIBRARIES)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "?"
