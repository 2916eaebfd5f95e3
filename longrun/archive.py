"""Where a file goes when its job is over: trained/ or rejected/, never lost.

The ledger decides, the move follows. A crash in between leaves a finished job with a folder; `put_away` is
called again for it at the next start and finds what is left to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from longrun import disk
from longrun.errors import LongrunError
from longrun.job import Job, JobState

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from longrun.home import Home

    OnBytes = Callable[[int], None]

ACCEPTED = re.compile(r"\.jsonl(\.gz|\.zst)?\Z", re.IGNORECASE)
TEMPORARY = re.compile(r"\A[.~#]|\.(part|crdownload|tmp|swp|filepart)\Z|~\Z|\A@eaDir\Z", re.IGNORECASE)
NAME_MAX_BYTES = 255
REASON = ".reason.json"
SECONDS_A_DAY = 86400


def check_accepted(file: Path, what: str) -> None:
    """LongrunError, with what was wanted of it, unless it is a file that the inbox would take."""
    if not file.is_file():
        why = "it is not a file" if file.exists() else "there is no such file"
        raise LongrunError(f"cannot {what} {file}: {why}", hint="check the path")
    if not ACCEPTED.search(file.name):
        why = "its name does not end in .jsonl, .jsonl.gz or .jsonl.zst"
        raise LongrunError(f"cannot {what} {file}: {why}", hint="copy it to another name first")
    if TEMPORARY.search(file.name):
        why = "the inbox ignores names like this, as of files that are still being written"
        raise LongrunError(f"cannot {what} {file}: {why}", hint="copy it to another name first")


def put_away(home: Home, job: Job) -> Path | None:
    """Move the file of a finished job to its last place and drop what was prepared; where the file is now."""
    target = None
    for claimed in claimed_files(home, job.number):
        folder = home.trained if job.state is JobState.TRAINED else home.rejected
        disk.make_folder(folder)  # a person may have removed it to make room
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
    path, number = folder / name, 1
    while path.exists() or path.is_symlink():
        number += 1
        path = folder / _numbered(name, number)
    return path


def _numbered(name: str, number: int) -> str:
    stem, ending = _split(name)
    mark = f".{number}{ending}"
    return os.fsdecode(os.fsencode(stem)[: NAME_MAX_BYTES - len(REASON) - len(os.fsencode(mark))]) + mark


def _split(name: str) -> tuple[str, str]:
    match = re.search(r"\.jsonl(\.\w+)?$", name, re.IGNORECASE)
    return (name[: match.start()], match[0]) if match else (name, "")


def _reason_path(target: Path) -> Path:
    name, room = os.fsencode(target.name), NAME_MAX_BYTES - len(REASON)
    if len(name) > room:  # cut, it could be that of another long name
        mark = b"." + hashlib.sha256(name).hexdigest()[:8].encode()
        name = name[: room - len(mark)] + mark
    return target.with_name(os.fsdecode(name) + REASON)


def _reason_text(job: Job) -> str:
    facts = {"file": job.name, "job": job.number, "sha256": job.sha256, **json.loads(job.reason or "{}")}
    # A fact a line: the rows that a skipped file has trained may be many thousands.
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(fact)}" for name, fact in facts.items())
    return f"{{\n{lines}\n}}\n"


def drop_again(home: Home, name: str) -> Path:
    """Put a rejected file (or a copy of a trained one) into the inbox again; FileNotFoundError if there is none."""
    name = Path(name).name.removesuffix(REASON)  # `retry rejected/NAME` is what a shell completes, or one word more
    refused = home.rejected / name
    disk.make_folder(home.inbox)
    # Copied, never renamed: the inbox may be on another file system.
    target = _arrive(refused if refused.is_file() else home.trained / name, home.inbox)
    for done in (refused, _reason_path(refused)):
        disk.remove_file(done)
    return target


class Trained:
    """The files in trained/, known by their bytes; each is read once, for as long as it does not change."""

    def __init__(self, home: Home, on_bytes: OnBytes = lambda _: None) -> None:
        self._home = home
        self._on_bytes = on_bytes
        self._digests: dict[Path, tuple[tuple[int, ...], str]] = {}

    def find(self, job: Job, taken: Collection[Path] = ()) -> Path | None:
        """The job's file, under the job's name or one that `free_name` made of it.

        None when a person or the retention removed it, or when other bytes have its name. Paths in `taken` are of
        other jobs with the same bytes.
        """
        folder = self._home.trained
        exact = folder / job.name
        if self._is_of(job, exact, taken):
            return exact
        others = folder.iterdir() if folder.is_dir() else ()
        numbered = sorted(path for path in others if _is_numbered(path.name, job.name))
        return next((path for path in numbered if self._is_of(job, path, taken)), None)

    def _is_of(self, job: Job, path: Path, taken: Collection[Path]) -> bool:
        with contextlib.suppress(FileNotFoundError, PermissionError):
            regular = path not in taken and path.is_file() and not path.is_symlink()
            return regular and self._digest(path) == job.sha256
        return False

    def _digest(self, path: Path) -> str:
        signature = disk.signature(path)
        known, digest = self._digests.get(path, ((), ""))
        if known != signature:
            digest = disk.hash_file(path, self._on_bytes)
            self._digests[path] = (signature, digest)
        return digest


def _is_numbered(found: str, name: str) -> bool:
    """Whether `free_name` may have called another file of this name so."""
    number = _split(found)[0].rpartition(".")[2]
    return number.isdecimal() and found == _numbered(name, int(number))


def claim_again(home: Home, job: Job, found: Path) -> bool:
    """Move a trained file back into the folder of its job, durably, and the ledger follows; False if it went meanwhile.

    After a crash in between, the job is still trained and its file is put away once more.
    """
    folder = home.claimed(job.number)
    folder.mkdir(parents=True, exist_ok=True)
    disk.sync_tree(home.job(job.number))
    disk.sync_folder(home.jobs)
    try:
        disk.rename(found, folder / job.name)
    except FileNotFoundError:
        disk.remove_tree(home.job(job.number), home.staging)
        return False
    return True


def put(home: Home, source: Path) -> Path:
    """Copy a file into the inbox so that it appears there whole."""
    return _arrive(source, home.inbox)


def _arrive(source: Path, folder: Path) -> Path:
    """Copy the file into the folder, never over what arrives there meanwhile; where it is."""
    return disk.copy_new(source, lambda: free_name(folder, source.name))


def expired(home: Home, keep_days: float) -> Iterator[Path]:
    """Files that were put away longer ago than the setting keeps them; none when it is 0."""
    if keep_days:
        for folder in (home.trained, home.rejected):
            for path in folder.glob("*"):
                with contextlib.suppress(FileNotFoundError):  # a person was quicker
                    if path.is_file() and time.time() - path.stat().st_ctime > keep_days * SECONDS_A_DAY:
                        yield path
