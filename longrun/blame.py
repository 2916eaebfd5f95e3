"""Whose fault it is that a file cannot be trained: its own, or that of what it is trained with.

A file that crashes, hangs or fits no memory is given up, so that the next one trains. But a model that cannot be
saved, or a GPU that is too small, fails with every file, and a whole queue would be given up, one after another. What
has trained once is trusted; until then, the second file that would be given up waits for a person.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from longrun import fitting

if TYPE_CHECKING:
    from longrun.context import Context

TRIED = "what was trained with"  # the ledger's fact: {situation: the file that was given up in it, or TRAINED}
TRAINED = ""
LIBRARIES = ("torch", "transformers", "accelerate")


def note_trained(context: Context, batch_size: int) -> None:
    """A checkpoint was committed: whatever fails from now on is a file's."""
    tried, here = _tried(context), _situation(context, batch_size)
    if tried.get(here) != TRAINED:
        context.ledger.set_fact(TRIED, json.dumps(tried | {here: TRAINED}))


def alike(context: Context, batch_size: int, name: str) -> str | None:
    """Another file that was given up before, if nothing has ever been trained so; None: this one is at fault."""
    tried, here = _tried(context), _situation(context, batch_size)
    if here not in tried:
        context.ledger.set_fact(TRIED, json.dumps(tried | {here: name}))
    other = tried.get(here, TRAINED)
    return None if other in (TRAINED, name) else other


def _tried(context: Context) -> dict[str, str]:
    tried: dict[str, str] = json.loads(context.ledger.fact(TRIED) or "{}")
    return tried


def _situation(context: Context, batch_size: int) -> str:
    return f"{fitting.situation(context, batch_size)}, {_libraries()}"


@cache
def _libraries() -> str:
    """Which versions are installed; looked up once, because it is asked for after each checkpoint."""
    return ", ".join(f"{library} {_version(library)}" for library in LIBRARIES)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "?"
