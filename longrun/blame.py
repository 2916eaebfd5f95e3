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

if TYPE_CHECKING:
    from longrun.context import Context
    from longrun.job import Job

TRIED = "what files were given up with"  # the ledger's fact: {situation: [which file, its name], or WORKED}
WORKED = ("", "")
LIBRARIES = ("torch", "transformers", "accelerate", "tokenizers")


def note_works(context: Context, situation: str) -> None:
    """A file got through: whatever fails in this situation from now on is a file's."""
    if _given_up(context, situation) != WORKED:
        _note(context, situation, WORKED)


def alike(context: Context, situation: str, job: Job) -> str | None:
    """Another file that was given up before, if nothing ever worked so; None: this one is at fault.

    Other bytes are another file, whatever their name; bytes that could not be examined are known by that.
    """
    this = (job.sha256 or job.name, job.name)
    before = _given_up(context, situation)
    if before is None:
        _note(context, situation, this)
    return None if before in (None, WORKED) or before[0] == this[0] else before[1]


def training(situation: str, device: str) -> str:
    """What a file is trained with, in words: what takes memory, where, and by which libraries."""
    return f"{situation}, {device}, {_libraries()}"


def preparing(context: Context) -> str:
    """What a file is examined and made tokens of with, in words: its situation."""
    return f"preparing for {context.settings.model.base_model}, {_libraries()}"


def _given_up(context: Context, situation: str) -> tuple[str, str] | None:
    """The first file that was given up so, or WORKED; None: nothing is known yet."""
    found = _tried(context).get(situation)
    return (found[0], found[1]) if found is not None else None


def _note(context: Context, situation: str, what: tuple[str, str]) -> None:
    context.ledger.set_fact(TRIED, json.dumps(_tried(context) | {situation: list(what)}))


def _tried(context: Context) -> dict[str, list[str]]:
    tried: dict[str, list[str]] = json.loads(context.ledger.fact(TRIED) or "{}")
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
