"""How many cases a drill has, which they are, and how a failing one is had again.

A drill has a list of cases. LONGRUN_DRILLS=full attempts all of them, otherwise a few are drawn, the same ones each
time: what makes `make test` fail is the last change, never luck. Every case has dice of its own, so LONGRUN_SEED=SEED
attempts the cases of that seed, and LONGRUN_SEED=SEED.NUMBER one of them alone.

A full campaign that is given no seed is recorded, and goes on where it was cut off, with the seed that it began with.
LONGRUN_DRILLS_MINUTES=10 cuts each campaign off after so many minutes.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FULL = os.environ.get("LONGRUN_DRILLS") == "full"
RECORDS = Path(__file__).resolve().parents[2] / ".drills"
SHOWN = 5
SMALL_SEED = "7"


@dataclass(frozen=True)
class Attempt:
    seed: str
    number: int
    case: str
    failure: str = ""
    notes: dict[str, int] = field(default_factory=dict)


class Campaign:
    def __init__(self, test: str) -> None:
        self.test = test
        seed, _, only = os.environ.get("LONGRUN_SEED", "").partition(".")
        self.only = int(only) if only else None
        self.record = Record(RECORDS / (re.sub(r"[^\w.]+", "-", test) + ".jsonl")) if FULL and not seed else None
        self.seed = seed or (self.record.begun_with() if self.record else SMALL_SEED)
        self.lines: list[str] = []
        self.notes: dict[str, int] = {}  # of the case that is being attempted

    def note(self, what: str, count: int = 1) -> None:
        """Count something that is worth telling beside the cases."""
        self.notes[what] = self.notes.get(what, 0) + count

    def run(
        self, promise: str, cases: Sequence[Any], attempt: Callable[[Any, random.Random], None], *, small: int
    ) -> None:
        """Attempt all cases, or `small` of them; all are attempted before the failed ones are told."""
        chosen = self._choose(len(cases), small)
        known = self.record.attempts if self.record else []
        attempts = [one for one in known if one.number < len(cases) and one.case == repr(cases[one.number])]
        passed = {one.number for one in attempts if not one.failure}
        failed_before = {one.number for one in attempts} - passed
        end = time.monotonic() + 60 * float(os.environ.get("LONGRUN_DRILLS_MINUTES", "inf"))
        try:
            for number in sorted(set(chosen) - passed, key=lambda number: (number not in failed_before, number)):
                if time.monotonic() >= end:
                    break
                attempts.append(self._attempt(number, cases[number], attempt))
        finally:
            self.lines.append(f"{promise}: {_told(attempts, len(chosen), len(passed), self.seed)}")
        failed = [one for one in {one.number: one for one in attempts}.values() if one.failure]
        shown = "\n".join(map(self._again, failed[:SHOWN]))
        assert not failed, f"{len(failed)} of {len(chosen)} cases failed\n{shown}"

    def _attempt(self, number: int, case: Any, attempt: Callable[[Any, random.Random], None]) -> Attempt:
        failure, self.notes = "", {}
        try:
            attempt(case, random.Random(f"{self.seed}.{number}"))
        except Exception as error:  # noqa: BLE001 - the other cases are attempted all the same
            failure = _cut(repr(error))
        done = Attempt(self.seed, number, repr(case), failure, self.notes)
        if self.record:
            self.record.add(done)
        return done

    def _choose(self, count: int, small: int) -> list[int]:
        if self.only is not None:
            return [self.only]
        if FULL:
            return list(range(count))
        return sorted(random.Random(self.seed).sample(range(count), min(small, count)))

    def _again(self, failed: Attempt) -> str:
        how = f"LONGRUN_DRILLS={'full' if FULL else 'small'} python -m pytest '{self.test}'"
        return f"LONGRUN_SEED={self.seed}.{failed.number} {how}  # {failed.case}\n{failed.failure}"


class Record:
    """What a campaign has attempted, a line of JSON for each: one that is cut off loses the case that it was at."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.attempts: list[Attempt] = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError):  # cut off
                self.attempts.append(Attempt(**json.loads(line)))

    def begun_with(self) -> str:
        """The campaign's seed; a new one for a new campaign."""
        return self.attempts[0].seed if self.attempts else str(random.SystemRandom().randrange(10**6))

    def add(self, attempt: Attempt) -> None:
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("a") as file:
            file.write("\n" + json.dumps(vars(attempt)))


def _cut(text: str) -> str:
    """Where it began and how it ended."""
    return text if len(text) <= 4000 else f"{text[:1000]} ... {text[-3000:]}"


def _told(attempts: list[Attempt], cases: int, before: int, seed: str) -> str:
    """All that was ever attempted, with the failures of before, mended or not."""
    attempted = {one.number for one in attempts}
    failed = {one.number for one in attempts if one.failure}
    mended = len(failed & {one.number for one in attempts if not one.failure})
    notes: dict[str, int] = {}
    for one in attempts:
        for what, count in one.notes.items():
            notes[what] = notes.get(what, 0) + count
    so_far = f"{len(attempted):,} of {cases:,} cases so far" if len(attempted) < cases else f"{cases:,} cases"
    words = [so_far, f"{len(failed):,} failures", f"seed {seed}"]
    words += [f"{before:,} of them before"] if before else []
    words += [f"{mended:,} passed when attempted again"] if mended else []
    return ", ".join(words + [f"{count:,} {what}" for what, count in sorted(notes.items())])
