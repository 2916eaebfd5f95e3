"""Where a file goes when its job is over: trained/ or rejected/, never lost.

The ledger decides, the move follows. A crash in between leaves a finished job with a folder; `put_away` is
called again for it at the next start and finds what is left to do.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from longrun import disk
from longrun.job import Job, JobState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from longrun.home import Home

ACCEPTED = re.compile(r"\.jsonl(\.gz|\.zst)?\Z", re.IGNORECASE)
NAME_MAX_BYTES = 255
REASON = ".reason.json"
SECONDS_A_DAY = 86400


def put_away(home: Home, job: Job) -> Path | None:
    """Move the file of a finished job to its last place and drop what was prepared; where the file is now."""
    target = None
    for claimed in claimed_files(home, job.number):
        folder = home.trained if job.state is JobState.TRAINED else home.rejected
        folder.mkdir(exist_ok=True)  # a person may have removed it to make room
        target = free_name(folder, claimed.name)
        if job.state is JobState.REJECTED:
            disk.write_file(_reason_path(target), _reason_text(job).encode())
        disk.rename(claimed, target)
    disk.remove_tree(home.job(job.number), home.staging)
    return target


def claimed_files(home: Home, number: int) -> list[Path]:
    """The claimed file of a job; none when it was put away already."""
    folder = home.claimed(number)
    return [path for path in folder.iterdir() if not path.name.endswith(".tmp")] if folder.is_dir() else []


def free_name(folder: Path, name: str) -> Path:
    """`name` in the folder, or the first of name.2.jsonl, name.3.jsonl, ... that is not taken."""
    stem, ending = _split(name)
    number = 1
    while (folder / name).exists() or (folder / name).is_symlink():
        number += 1
        mark = f".{number}{ending}"
        name = os.fsdecode(os.fsencode(stem)[: NAME_MAX_BYTES - len(REASON) - len(os.fsencode(mark))]) + mark
    return folder / name


def _split(name: str) -> tuple[str, str]:
    match = re.search(r"\.jsonl(\.\w+)?$", name, re.IGNORECASE)
    return (name[: match.start()], match[0]) if match else (name, "")


def _reason_path(target: Path) -> Path:
    name = os.fsencode(target.name)[: NAME_MAX_BYTES - len(REASON)]
    return target.with_name(os.fsdecode(name) + REASON)


def _reason_text(job: Job) -> str:
    facts = {"file": job.name, "job": job.number, "sha256": job.sha256, **json.loads(job.reason or "{}")}
    return json.dumps(facts, indent=1, ensure_ascii=True) + "\n"


def take_back(home: Home, name: str) -> Path:
    """Put a rejected file (or a copy of a trained one) into the inbox again; FileNotFoundError if there is none."""
    name = Path(name).name  # `retry rejected/NAME` is what a shell completes
    refused = home.rejected / name
    home.inbox.mkdir(exist_ok=True)
    target = free_name(home.inbox, name)
    # Copied, never renamed: the inbox may be on another file system.
    disk.copy_file(refused if refused.is_file() else home.trained / name, target)
    for done in (refused, _reason_path(refused)):
        disk.remove_file(done)
    return target


def put(home: Home, source: Path) -> Path:
    """Copy a file into the inbox so that it appears there whole."""
    target = free_name(home.inbox, source.name)
    disk.copy_file(source, target)
    return target


def expired(home: Home, keep_days: float) -> Iterator[Path]:
    """Files that were put away longer ago than the setting keeps them; none when it is 0."""
    if keep_days:
        for folder in (home.trained, home.rejected):
            for path in folder.glob("*"):
                if path.is_file() and time.time() - path.stat().st_ctime > keep_days * SECONDS_A_DAY:
                    yield path
