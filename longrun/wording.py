"""How names and numbers are written where a person reads them."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` on one line, with everything that is not plainly printable shown as an escape."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def counted(count: int, noun: str) -> str:
    """`1 row`, `2 rows`; the plural is the noun with an s."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def unpinned(base_model: str) -> str:
    """A hub name without the commit that the lineage pinned it to; a folder as it is."""
    return base_model if base_model.startswith("/") else base_model.partition("@")[0]
