"""Kernel locks: who is alone with a home, a model or a store, and who that is."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from typing import TYPE_CHECKING, Any, Self

from longrun import disk
from longrun.errors import Locked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Lock:
    """A kernel lock held for life: it is gone with its process, however that ends.

    The file's content only says who holds it; the truth is the flock. The descriptor is not inherited by
    children, so a worker that outlives the daemon does not keep the daemon's lock.
    """

    def __init__(self, path: Path, descriptor: int, what: str) -> None:
        self.path = path
        self._descriptor, self._what = descriptor, what

    @classmethod
    def take(
        cls,
        path: Path,
        *,
        what: str,
        wait_s: float = 0.6,
        shared: bool = False,
        held: Path | None = None,
        hint: str = "end that process, or wait for it",
    ) -> Self:
        """The lock, or Locked naming the holder. The short wait outlasts `holder`, which tries the lock.

        `shared` excludes only those who want it for themselves; `held` is what the lock stands for (the home).
        """
        descriptor = _open_lock(path, shared=shared)
        deadline = time.monotonic() + wait_s
        while not _try_flock(descriptor, shared=shared) or not _leads_to(path, descriptor):
            if not _leads_to(path, descriptor):  # somebody removed it as stale: who comes now takes another
                os.close(descriptor)
                descriptor = _open_lock(path, shared=shared)
            elif time.monotonic() >= deadline:
                note = _read_note(descriptor)
                os.close(descriptor)
                raise Locked(
                    f"cannot start {what}: {held or path.parent.parent} is held by"
                    f" {note.get('what', 'another process')} (pid {note.get('pid', '?')},"
                    f" since {note.get('since', '?')})",
                    hint=hint,
                )
            else:
                time.sleep(0.02)
        lock = cls(path, descriptor, what)
        lock._write_note()
        return lock

    def _write_note(self) -> None:
        note = {"pid": os.getpid(), "what": self._what, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        with contextlib.suppress(OSError):  # on a full disk the lock holds without it
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(note).encode(), 0)

    def tell(self, what: str) -> None:
        """Say that it is held for this now."""
        if what != self._what:
            self._what = what
            self._write_note()

    def keep(self) -> None:
        """Have the lock also when somebody has removed its file as stale; Locked when another was quicker."""
        if not _leads_to(self.path, self._descriptor):
            fresh = type(self).take(self.path, what=self._what, wait_s=0.0)
            os.close(self._descriptor)
            self._descriptor = fresh._descriptor

    def release(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def holder(path: Path) -> dict[str, Any] | None:
    """Who holds the lock at `path` alone right now; None when nobody does."""
    with _opened(path) as descriptor:
        # Shared, so that two who look do not find each other.
        if descriptor is None or _try_flock(descriptor, shared=True):
            return None
        return _read_note(descriptor)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int | None]:
    try:
        descriptor = _open_to_try(path)
    except FileNotFoundError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open_lock(path: Path, *, shared: bool) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        if not shared or error.errno not in (errno.EROFS, errno.EACCES):
            raise
        # What is only read may lie where nothing can be written, or was copied there without its lock.
        return os.open(path if path.exists() else path.parent, os.O_RDONLY)


def _leads_to(path: Path, descriptor: int) -> bool:
    """Whether the path is that of the open file; a folder stands for a file that cannot be made."""
    held = os.fstat(descriptor)
    return stat.S_ISDIR(held.st_mode) or disk.signature(path)[:1] == (held.st_ino,)


def _open_to_try(path: Path) -> int:
    """NFS gives locks only to who may write; where nothing can be written, others need no more than this."""
    try:
        return os.open(path, os.O_RDWR)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
        return os.open(path, os.O_RDONLY)


def _try_flock(descriptor: int, *, shared: bool = False) -> bool:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_note(descriptor: int) -> dict[str, Any]:
    try:
        note = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return note if isinstance(note, dict) else {}
