"""What train.py was asked to train and has not: typed again after it was cut off, it goes on with the same jobs."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from longrun.job import FINAL, JobState
from longrun.ledger import Ledger

if TYPE_CHECKING:
    from longrun.home import Home
    from longrun.lineage import Lineage

UNFINISHED = "files trained by hand"  # the ledger's fact: {what tells the files of a command: their jobs, in its order}
KEPT = 100  # commands: one that is never typed again must not become a burden


def jobs_of(ledger: Ledger, contents: list[str]) -> list[int]:
    """The jobs of the unfinished command that named files of these contents (SHA-256), in its order; else none."""
    return _unfinished(ledger).get(_key(contents), [])


def note(ledger: Ledger, contents: list[str], jobs: list[int]) -> None:
    latest = list({**_unfinished(ledger), _key(contents): jobs}.items())[-KEPT:]
    ledger.set_fact(UNFINISHED, json.dumps(dict(latest)))


def forget_ended(ledger: Ledger, but: list[str] | None = None) -> None:
    """A command whose files are all over, whoever trained them, has ended: typed again, it is another.

    `but` are the contents of the one that is begun or gone on with now.
    """
    before = _unfinished(ledger)
    left = {key: jobs for key, jobs in before.items() if (but and key == _key(but)) or not _are_over(ledger, jobs)}
    if left != before:
        ledger.set_fact(UNFINISHED, json.dumps(left))


def _are_over(ledger: Ledger, jobs: list[int]) -> bool:
    found = [ledger.get(number) for number in jobs]
    return all(job is None or job.state in FINAL for job in found)


def trained_already(home: Home, contents: list[str], lineage: Lineage | None) -> list[bool]:
    """Of each file whether the unfinished command that named them has trained it, read beside a daemon or without."""
    with Ledger.reading(home.ledger) as ledger:
        jobs = [ledger.get(number) for number in jobs_of(ledger, contents)] if ledger else []
    trained = lineage.trained(home.id) if lineage else {}
    found = [job is not None and job.state is JobState.TRAINED and (job.number, job.sha256) in trained for job in jobs]
    return found or [False] * len(contents)


def _unfinished(ledger: Ledger) -> dict[str, list[int]]:
    found: dict[str, list[int]] = json.loads(ledger.fact(UNFINISHED) or "{}")
    return found


def _key(contents: list[str]) -> str:
    return hashlib.sha256(" ".join(contents).encode()).hexdigest()
