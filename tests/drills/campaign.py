"""How many cases a drill has, which they are, and how a failing one is had again.

A drill has a list of cases. LONGRUN_DRILLS=full attempts all of them, otherwise a few are drawn. Every case has dice
of its own, so LONGRUN_SEED=SEED attempts the same cases again and LONGRUN_SEED=SEED.NUMBER one of them alone.
"""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FULL = os.environ.get("LONGRUN_DRILLS") == "full"
SHOWN = 5


class Campaign:
    def __init__(self, test: str) -> None:
        self.test = test
        seed, _, only = os.environ.get("LONGRUN_SEED", "").partition(".")
        self.seed = seed or str(random.SystemRandom().randrange(10**6))
        self.only = int(only) if only else None
        self.lines: list[str] = []
        self.notes: dict[str, int] = {}

    def note(self, what: str, count: int = 1) -> None:
        """Count something that is worth telling beside the cases."""
        self.notes[what] = self.notes.get(what, 0) + count

    def run(
        self, promise: str, cases: Sequence[Any], attempt: Callable[[Any, random.Random], None], *, small: int
    ) -> None:
        """Attempt all cases, or `small` of them; all are attempted before the failed ones are told."""
        chosen = self._choose(len(cases), small)
        failed: list[str] = []
        for number in chosen:
            try:
                attempt(cases[number], random.Random(f"{self.seed}.{number}"))
            except Exception as error:  # noqa: BLE001 - the other cases are attempted all the same
                failed.append(f"LONGRUN_SEED={self.seed}.{number} {self.command}  # {cases[number]}\n{error!r:.2000}")
        told = "".join(f", {count} {what}" for what, count in sorted(self.notes.items()))
        self.lines.append(f"{promise}: {len(chosen)} cases, {len(failed)} failures, seed {self.seed}{told}")
        assert not failed, f"{len(failed)} of {len(chosen)} cases failed\n" + "\n".join(failed[:SHOWN])

    def _choose(self, count: int, small: int) -> list[int]:
        if self.only is not None:
            return [self.only]
        if FULL:
            return list(range(count))
        return sorted(random.Random(self.seed).sample(range(count), min(small, count)))

    @property
    def command(self) -> str:
        return f"LONGRUN_DRILLS={'full' if FULL else 'small'} python -m pytest '{self.test}'"
