"""The inbox: which files have settled, and the move that makes them ours.

The folder's listing is the truth. watchdog only rings a bell: every event, fault or silence of it costs at
most `scan_s` seconds. A file has settled when nobody holds it open for writing and nothing about it changed
for a while.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longrun import archive, disk
from longrun.archive import ACCEPTED, TEMPORARY
from longrun.job import Job, JobState

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from pathlib import Path

    from watchdog.observers.api import BaseObserver

    from longrun.config import InboxSettings
    from longrun.home import Home

CLAIM_AT_ONCE = 2000  # files a tick: bounds the tick, not the inbox
COPY_AT_ONCE = 100  # of files that have to be copied, most of which wait for the next tick
COPY_S = 0.25  # of a tick, and a piece more: so long everything else waits
TRY_AGAIN_S = 60.0  # what was refused once, while nothing about it changes
ORIGIN = "origin.json"  # in a job's folder: which file of the inbox its bytes were copied from

VANISHED = (errno.ENOENT, errno.ELOOP)  # how a file looks that is gone, or that a symbolic link took the place of

Signature = tuple[int, int, int, int, int]


@dataclass
class _Seen:
    signature: Signature
    since: float  # monotonic seconds


@dataclass(frozen=True)
class _Taking:
    """A file on its way into the folder of its job."""

    name: str
    number: int
    steps: Generator[bool | None]  # None: there is more to do; else whether the file is ours


class Inbox:
    def __init__(self, home: Home, settings: InboxSettings, say: Callable[..., None]) -> None:
        self._home = home
        self.settings = settings
        self._say = say
        self._seen: dict[str, _Seen] = {}
        self._written: set[str] = set()
        self._told: set[str] = set()
        self._taking: _Taking | None = None  # over more rounds than one
        self._scanned_at = 0.0  # monotonic seconds, as those below
        self._not_before: dict[str, float] = {}  # files that were refused

    @property
    def left_alone(self) -> list[str]:
        """Entries that are no files to train, for status."""
        return sorted(self._told)

    @property
    def settling(self) -> list[str]:
        """Files in the inbox that are not claimed yet, for status."""
        return sorted(self._seen.keys() - self._told)

    @property
    def being_written(self) -> list[str]:
        """Those among them that another process holds open for writing."""
        return sorted(self._written)

    def scan(self, now: float) -> list[str]:
        """Look at every entry; the names that have settled, oldest first.

        OSError when there are some, and the inbox does not let go of them.
        """
        self._home.inbox.mkdir(exist_ok=True)
        self._scanned_at = now
        present: dict[str, Signature] = {}
        listed = set()
        with os.scandir(self._home.inbox) as entries:
            for entry in entries:
                listed.add(entry.name)
                if self._is_candidate(entry):
                    present.update(self._look(entry))
        self._seen = {name: self._still(name, signature, now) for name, signature in present.items()}
        self._written &= present.keys()
        self._told &= listed
        self._not_before = {name: when for name, when in self._not_before.items() if name in present}
        settled = [name for name in present if self._has_settled(name, now)]
        if settled:
            self._check_lets_go()
        return sorted(settled, key=lambda name: (present[name][3], os.fsencode(name)))

    def next_look(self, now: float) -> float:
        """Seconds until a scan could find something new without any event."""
        waits = [seen.since + self.settings.settle_s - now for seen in self._seen.values()]
        return max(0.02, min([self.settings.scan_s, *(wait for wait in waits if wait > 0)]))

    def _is_candidate(self, entry: os.DirEntry[str]) -> bool:
        if TEMPORARY.search(entry.name):
            return False
        if entry.is_symlink():
            return self._leave(entry.name, "it is a symbolic link", "copy the file itself")
        if entry.is_dir(follow_symlinks=False):
            return self._leave(entry.name, "it is a folder", f"cp inbox/{entry.name}/*.jsonl* inbox/")
        if not ACCEPTED.search(entry.name):
            return self._leave(entry.name, "its name does not end in .jsonl, .jsonl.gz or .jsonl.zst", "rename it")
        if not entry.is_file(follow_symlinks=False):
            return self._leave(entry.name, "it is not a regular file", "copy the content into one")
        return True

    def _look(self, entry: os.DirEntry[str]) -> dict[str, Signature]:
        try:
            found = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._leave(entry.name, f"it cannot be looked at ({error.strerror})", "look at the disk that it is on")
            return {}
        return {entry.name: _signature(found)} if stat.S_ISREG(found.st_mode) else {}

    def _check_lets_go(self) -> None:
        """Files cannot be moved out of a folder that may not be written: each would find that out, copied or not.

        OSError that names the inbox, or the home where all of that is read-only: then it is no matter of the inbox.
        """
        inbox = self._home.inbox
        if os.access(inbox, os.W_OK | os.X_OK):
            return
        read_only = [place for place in (self._home.root, inbox) if os.statvfs(place).f_flag & os.ST_RDONLY]
        number, place = (errno.EROFS, read_only[0]) if read_only else (errno.EACCES, inbox)
        raise OSError(number, os.strerror(number), os.fspath(place))

    def _leave(self, name: str, why: str, fix: str) -> bool:
        if name not in self._told:
            self._told.add(name)
            self._say("left", f"inbox/{name} is left alone: {why}. {fix}", level="warning", file=name)
        return False

    def _still(self, name: str, signature: Signature, now: float) -> _Seen:
        before = self._seen.get(name)
        if before is not None and before.signature == signature:
            return before
        self._told.discard(name)  # it may have been mended
        self._not_before.pop(name, None)
        return _Seen(signature, now)

    def _has_settled(self, name: str, now: float) -> bool:
        quiet_s = now - self._seen[name].since
        if quiet_s < self.settings.settle_s or now < self._not_before.get(name, now):
            return False
        path = self._home.inbox / name
        writer = has_writer(path)
        if writer is None and not os.access(path, os.R_OK):
            return self._leave(name, "it cannot be read", "change its owner or mode")
        if writer is None:  # leases do not work here: only time can tell
            return quiet_s >= self.settings.settle_without_lease_s
        (self._written.add if writer else self._written.discard)(name)
        return not writer

    # -- claiming

    def claim(self, names: list[str], first_number: int) -> list[Job]:
        """Move settled files into job folders of their own, durably; what vanished meanwhile is passed over.

        The folder is the record: a crash right after the rename leaves a job folder that `unrecorded` finds. It is
        durable before anything is moved into it: a move that outlived it would take the file with it.

        A file that has to be copied may take many rounds: while `copying` tells of one, `go_on_copying` comes first.
        """
        jobs: list[Job] = []
        names = names[: self.at_once]
        numbers = range(first_number, first_number + len(names))
        self._make_folders(numbers)
        end = time.monotonic() + COPY_S
        for name in names:
            number = first_number + len(jobs)
            self._taking = _Taking(name, number, self._take(name, number))
            jobs += self._take_further(end)
            if self._taking is not None:
                break  # the others wait: files are claimed in the order of their arrival
        return self._recorded(jobs, numbers)

    @property
    def at_once(self) -> int:
        """How many files a call of `claim` takes at most."""
        near = self._home.inbox.stat().st_dev == self._home.jobs.stat().st_dev
        return CLAIM_AT_ONCE if near else COPY_AT_ONCE

    @property
    def copying(self) -> int | None:
        """The number of the job whose file is being copied."""
        return self._taking.number if self._taking else None

    def go_on_copying(self) -> list[Job]:
        """A round more of the copy under way; its job, once the file is ours."""
        assert self._taking is not None
        numbers = (self._taking.number,)
        return self._recorded(self._take_further(time.monotonic() + COPY_S), numbers)

    def abandon(self) -> None:
        """Leave nothing of a copy under way: its original is still there."""
        if self._taking is not None:
            self._taking.steps.close()
            self._remove_folders(self._taking.number)
            self._taking = None

    def _take_further(self, end: float) -> list[Job]:
        """The job of the file being taken, if it is ours by now; it goes on being taken when `end` comes before that.

        Whatever fails, it is being taken no more.
        """
        taking, self._taking = self._taking, None
        assert taking is not None
        for taken in taking.steps:
            if taken:
                self._seen.pop(taking.name, None)
                return [claimed_job(taking.number, taking.name)]
            if taken is None and time.monotonic() >= end:
                self._taking = taking
                break
        return []

    def _recorded(self, jobs: list[Job], numbers: Iterable[int]) -> list[Job]:
        """The jobs, their files durable; of the numbers that none of them got, nothing is left."""
        _make_durable(self._home, jobs)
        for number in {*numbers} - {job.number for job in jobs} - {self.copying}:
            self._remove_folders(number)
        return jobs

    def _make_folders(self, numbers: range) -> None:
        for number in numbers:
            self._home.claimed(number).mkdir(parents=True, exist_ok=True)
        disk.sync_trees([self._home.job(number) for number in numbers])
        disk.sync_folder(self._home.jobs)

    def _remove_folders(self, number: int) -> None:
        disk.remove_folder(self._home.claimed(number))
        disk.remove_folder(self._home.job(number))

    def _take(self, name: str, number: int) -> Generator[bool | None]:
        """At last whether the file is ours: moved, or copied where a move would not give us bytes of our own.

        None before a copy, and after each piece of it that is not the last.
        """
        source, target = self._home.inbox / name, self._home.claimed(number) / name
        try:
            links = _links(source)  # a file that can be moved but not read would be in the way of all others then
            if links > 1 or not _moved(source, target):
                yield from self._copy(source, target, number)
            else:
                yield not _given_back(self._home, target)
        except (_Unreadable, PermissionError) as error:
            yield self._refuse(name, f"it cannot be taken ({error.strerror})", "change its owner or mode")
        except OSError as error:
            if error.errno not in VANISHED:
                raise
            yield False

    def _refuse(self, name: str, why: str, fix: str) -> bool:
        """Leave it alone, and for a while do not even try: others are waiting."""
        self._not_before[name] = self._scanned_at + TRY_AGAIN_S
        return self._leave(name, why, fix)

    def _copy(self, source: Path, target: Path, number: int) -> Generator[bool | None]:
        """The copy becomes ours, beside a note of what it was made from, before the original goes.

        A crash in between leaves an original that the note recognises.
        """
        signature, note = _signature(source.lstat()), self._home.job(number) / ORIGIN
        size, free = source.lstat().st_size, disk.free_bytes(target.parent)
        if size > free:
            why = f"it has to be copied and does not fit: {size / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free"
            yield self._refuse(source.name, why, "Make room: it is tried again")
            return
        yield None  # others may have been copied before it in this round
        taken, copied = False, 0
        try:
            disk.write_file(note, _origin(source.name, signature))
            with contextlib.closing(disk.copy_in_pieces(source, target)) as pieces:
                for count in pieces:
                    copied += count
                    if copied < size:
                        yield None
            if _signature(source.lstat()) == signature and not has_writer(source):
                taken = disk.remove_file(source)
        finally:
            if not taken:
                disk.remove_file(target)
                disk.remove_file(note)
        yield taken


def _given_back(home: Home, claimed: Path) -> bool:
    """Whether the file went back to the inbox, because somebody opened it between look and move: it is not complete."""
    if not has_writer(claimed):
        return False
    home.inbox.mkdir(exist_ok=True)  # it may have been removed since
    disk.rename_free(claimed, lambda: archive.free_name(home.inbox, claimed.name))
    return True


def _moved(source: Path, target: Path) -> bool:
    """False when the inbox is on another file system."""
    try:
        disk.move(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    return True


def _origin(name: str, signature: Signature) -> bytes:
    # Without the device: some file systems get another number at each mount.
    return json.dumps([name, *signature[1:]]).encode()


def claimed_job(number: int, name: str) -> Job:
    return Job(number=number, name=name, state=JobState.CLAIMED, arrived_at=time.time())


def unrecorded(home: Home, known: Callable[[int], object]) -> list[Job]:
    """Claimed files whose job folder the ledger does not know: the crash came between move and record.

    Their moves are durable then: what has begun to train must not be in the inbox again after a loss of power.
    """
    found = []
    for folder in sorted(folder for folder in home.jobs.iterdir() if folder.name.isdecimal()):
        _finish_copy(home, folder / ORIGIN)
        number = int(folder.name)
        if known(number):
            continue
        claimed = archive.claimed_files(home, number)
        if claimed and not _given_back(home, claimed[0]):
            found.append(claimed_job(number, claimed[0].name))
        else:
            disk.remove_tree(folder, home.staging)
    _make_durable(home, found)
    return found


def _make_durable(home: Home, claimed: list[Job]) -> None:
    if claimed:
        disk.sync_trees([home.claimed(job.number) for job in claimed])
        disk.make_folder(home.inbox)  # a person may have removed it
        disk.sync_folder(home.inbox)


def _finish_copy(home: Home, note: Path) -> None:
    """Remove from the inbox what was copied whole before a crash, or it would be trained twice."""
    if not note.exists() or not archive.claimed_files(home, int(note.parent.name)):
        return
    source = home.inbox / json.loads(note.read_bytes())[0]
    with contextlib.suppress(FileNotFoundError):
        if _origin(source.name, _signature(source.lstat())) == note.read_bytes():
            disk.remove_file(source)


def has_writer(path: Path) -> bool | None:
    """Whether any process holds the file open for writing; None where that cannot be known.

    A read lease is refused while there is a writer, whatever name it came by (fcntl(2), F_SETLEASE). The lease
    is given back at once, so no writer is kept waiting. SIGIO must be ignored by the process.
    """
    if not hasattr(fcntl, "F_SETLEASE"):
        return None
    try:
        descriptor = _open(path)
    except OSError:
        return None
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    finally:
        os.close(descriptor)
    return False


class _Unreadable(OSError):
    """One file that cannot be opened or looked at, whatever the reason: it is in nobody else's way."""


def _links(path: Path) -> int:
    """How many names the file has; _Unreadable when it cannot be read."""
    try:
        descriptor = _open(path)
    except OSError as error:
        if error.errno in VANISHED or error.errno in disk.NO_FILES_FAULT:
            raise
        raise _Unreadable(error.errno, error.strerror) from error
    try:
        return os.fstat(descriptor).st_nlink
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)


def _signature(found: os.stat_result) -> Signature:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class Bell:
    """Rings when something happens in the inbox. It may fail in any way: the scan every few seconds does not."""

    def __init__(self, home: Home, ring: Callable[[], None], say: Callable[..., None]) -> None:
        self._home = home
        self._ring = ring
        self._say = say
        self._observer: BaseObserver | None = None
        self._watched: tuple[int, int] | None = None
        self._silent = False

    def check(self) -> None:
        """See that the folder that is watched is the one at the inbox's path, and that the watcher lives."""
        if self._silent:
            return
        try:
            there = self._home.inbox.stat()
        except FileNotFoundError:
            return  # removed just now: the next look makes it again
        alive = (
            self._observer is not None
            and self._observer.is_alive()
            and all(emitter.is_alive() for emitter in self._observer.emitters)
        )
        if not alive or (there.st_dev, there.st_ino) != self._watched:
            self.stop()
            self._start((there.st_dev, there.st_ino))

    def _start(self, folder: tuple[int, int]) -> None:
        from watchdog import events
        from watchdog.observers import Observer

        ring = self._ring

        class Ring(events.FileSystemEventHandler):
            # Not on_any_event: for it the name of a method is made at each event, and Python keeps 4,096 such words.
            def dispatch(self, event: events.FileSystemEvent) -> None:  # noqa: ARG002
                ring()

        # What only looks, as our own scan does, is not asked for: it would wake two threads at each.
        changes: list[type[events.FileSystemEvent]] = [
            events.FileCreatedEvent,
            events.FileModifiedEvent,
            events.FileMovedEvent,
            events.FileClosedEvent,
            events.FileDeletedEvent,
            events.DirDeletedEvent,
        ]
        observer = Observer()
        try:
            observer.schedule(Ring(), str(self._home.inbox), event_filter=changes, follow_symlink=True)
            observer.start()
        except FileNotFoundError:
            return  # removed just now
        except OSError as error:
            self._silent = True
            self._say(
                "watch failed",
                f"cannot watch the inbox ({error}): it is listed every few seconds instead."
                " Raise fs.inotify.max_user_instances or max_user_watches with sysctl for quicker pick-up",
                level="warning",
            )
            return
        self._observer, self._watched = observer, folder

    def stop(self) -> None:
        if self._observer is not None:
            self._observer.stop()
            self._observer = None
