"""Writes down what processes do to a disk, in one order, so that a loss of power can be played back on it.

Each line of the log is a list: what happened, by the numbers of inodes.

    name  [[folder, name, inode or 0], ...], kind, extra   these names came or went, in one step
    data  inode, offset, bytes         size  inode, bytes         mode  inode, bits
    sync  inode, by whom               ledger  n                  said  facts of an event, as people were told it

Daemon, worker and preparer append to one log, each call and its line under one lock: the order is total. What SQLite
writes is not seen; the daemon's recorder keeps a copy of the ledger whenever it has changed.
"""

from __future__ import annotations

import builtins
import fcntl
import io
import json
import os
import stat
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.drills.faults import OF_OS, Calls

if TYPE_CHECKING:
    from collections.abc import Callable

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
FICLONE = 0x40049409
RENAME_EXCHANGE = 2
DISK = os.sep + os.path.join("longrun", "disk.py")  # noqa: PTH118 - a part of a path


class Recorder(Calls):
    names = (*(name for name in OF_OS if name not in ("pread", "utime")), "open", "sendfile")
    text = True

    def __init__(self, log: Path, *, ledger: Path | None, clones: bool) -> None:
        self.log, self.ledger, self.clones = log, ledger, clones
        self._open, self._write = os.open, os.write  # as they are before all are led here
        self._ledger_seen: tuple[int, ...] = ()
        self._guard = threading.RLock()
        self._file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self._device = os.fstat(self._file).st_dev

    def install(self) -> None:
        super().install()
        builtins.open = io.open

    def around(self, what: str, arguments: tuple[Any, ...], options: dict[str, Any], call: Callable[[], Any]) -> Any:
        kind = what.removeprefix("file.")
        if what == "open" and arguments[1:] and not arguments[1] & WRITES:  # os.open, to read
            return call()
        with self._guard:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                self._keep_ledger()
                return getattr(self, f"on_{kind}")(call, *arguments, **options)
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def say(self, *line: Any) -> None:
        self._write(self._file, json.dumps(line).encode() + b"\n")

    def _keep_ledger(self) -> None:
        """A copy of the ledger as it is after the last transaction; this process makes them, so none is under way."""
        if self.ledger is None or not self.ledger.exists():
            return
        parts = [self.ledger, self.ledger.with_name(self.ledger.name + "-wal")]
        seen = tuple(fact for part in parts if part.exists() for fact in (part.stat().st_size, part.stat().st_mtime_ns))
        if seen == self._ledger_seen:
            return
        self._ledger_seen = seen
        number = len(list(self.log.parent.glob("ledger-*.sqlite3")))
        for part in parts:
            if part.exists():
                kept = self.log.with_name(part.name.replace("ledger", f"ledger-{number}", 1))
                file = self._open(kept, os.O_WRONLY | os.O_CREAT, 0o600)
                self._write(file, part.read_bytes())
                os.close(file)
        self.say("ledger", number)

    # -- names

    def _named(self, path: Any, folder: int | None, kind: str = "", extra: Any = None) -> None:
        self.say("name", [[*place(path, folder), inode_of_name(path, folder)]], kind, extra)

    def on_rename(self, call: Any, source: Any, target: Any, *, src_dir_fd: Any = None, dst_dir_fd: Any = None) -> None:
        old = place(source, src_dir_fd)
        call()
        new = place(target, dst_dir_fd)
        self.say("name", [[*old, 0], [*new, inode_of_name(target, dst_dir_fd)]], "", None)

    on_replace = on_rename

    def on_renameat2(self, call: Any, source: Any, target: Any, flag: int) -> int:
        """One name that replaces none, or two that change places."""
        old, new = place(source, None), place(target, None)
        failed: int = call()
        if not failed:
            left = inode_of_name(source) if flag == RENAME_EXCHANGE else 0
            self.say("name", [[*old, left], [*new, inode_of_name(target)]], "", None)
        return failed

    def on_link(self, call: Any, source: Any, target: Any, **options: Any) -> None:
        call()
        self._named(target, options.get("dst_dir_fd"))

    def on_symlink(self, call: Any, source: Any, target: Any, *rest: Any, dir_fd: Any = None, **options: Any) -> None:
        call()
        self._named(target, dir_fd, "link", os.fspath(source))

    def on_mkdir(self, call: Any, path: Any, *mode: Any, dir_fd: Any = None, **options: Any) -> None:
        call()
        self._named(path, dir_fd, "folder")

    def on_unlink(self, call: Any, path: Any, *, dir_fd: Any = None) -> None:
        gone = place(path, dir_fd)
        call()
        self.say("name", [[*gone, 0]], "", None)

    on_remove = on_rmdir = on_unlink

    # -- contents

    def on_open(self, call: Any, path: Any, *flags: Any, mode: Any = "", dir_fd: Any = None, **options: Any) -> Any:
        """os.open and io.open both: what the opening does is seen from what was there before."""
        existed = isinstance(path, int) or os.path.lexists(path)  # dir_fd is used to read only
        found = call()
        number = found if isinstance(found, int) else found.fileno()
        cut = bool(flags[0] & os.O_TRUNC) if flags else "w" in mode
        if not existed:
            self._named(path, dir_fd, "file")
        elif cut and self._is_ours(number):
            self.say("size", os.fstat(number).st_ino, 0)
        return found

    def _is_ours(self, number: int) -> bool:
        found = os.fstat(number)
        return stat.S_ISREG(found.st_mode) and found.st_dev == self._device

    def _written(self, number: int, count: int, at: int | None = None) -> None:
        """`count` bytes came to `at`, or to where the file's position now ends."""
        if not count or not self._is_ours(number):
            return
        start = os.lseek(number, 0, os.SEEK_CUR) - count if at is None else at
        reader = self._open(f"/proc/self/fd/{number}", os.O_RDONLY)
        data = os.pread(reader, count, start)
        os.close(reader)
        self.say("data", os.fstat(number).st_ino, start, data.decode("latin-1"))
        if Path(f"/proc/self/fd/{number}").readlink().name == "events.jsonl" and data.strip():
            self.say("said", json.loads(data))

    def on_write(self, call: Any, number: Any, data: Any = None, *, file: io.FileIO | None = None) -> int:
        count: int = call()
        self._written(file.fileno() if file else number, count)
        return count

    def on_pwrite(self, call: Any, number: int, data: Any, at: int) -> int:
        count: int = call()
        self._written(number, count, at)
        return count

    def on_sendfile(self, call: Any, number: int, *rest: Any, **options: Any) -> int:
        count: int = call()
        self._written(number, count)
        return count

    def on_copy_file_range(self, call: Any, source: int, number: int, *rest: Any, **options: Any) -> int:
        count: int = call()
        self._written(number, count, options.get("offset_dst"))
        return count

    def on_ftruncate(self, call: Any, number: int, size: int) -> None:
        call()
        if self._is_ours(number):
            self.say("size", os.fstat(number).st_ino, size)

    def on_truncate(self, call: Any, path: Any, size: int) -> None:
        call()
        self.say("size", inode_of(path), size)

    def on_ioctl(self, call: Any, number: int, request: int, source: Any = 0, *rest: Any) -> Any:
        """A disk in memory cannot clone: where it shall seem so, the bytes are copied."""
        if request != FICLONE or not self.clones:
            return call()
        data = os.pread(source, os.fstat(source).st_size, 0)
        self._write(number, data)
        self._written(number, len(data))
        return 0

    def on_chmod(self, call: Any, path: Any, mode: int, **options: Any) -> None:
        call()
        self.say("mode", inode_of(path), mode)

    def on_fsync(self, call: Any, file: Any) -> None:
        call()
        self.say("sync", os.fstat(file if isinstance(file, int) else file.fileno()).st_ino, by_whom())

    on_fdatasync = on_fsync


def inode_of(file: Any) -> int:
    return (os.fstat(file) if isinstance(file, int) else Path(file).stat()).st_ino


def inode_of_name(path: Any, folder: int | None = None) -> int:
    """Of a link itself, not of what it leads to."""
    return os.stat(path, dir_fd=folder, follow_symlinks=False).st_ino


def place(path: Any, folder: int | None) -> tuple[int, str]:
    """The folder that a name is in, and the name."""
    above, name = os.path.split(os.fspath(path))
    if not above and folder is not None:
        return os.fstat(folder).st_ino, name
    return os.stat(above or ".", dir_fd=folder).st_ino, name


def by_whom() -> str:
    """The functions of disk.py that led here, and who called them: "sync_folder < rename < put_away"."""
    names: list[str] = []
    frame = sys._getframe(1)
    while frame is not None:
        inside = frame.f_code.co_filename.endswith(DISK)
        if inside or names:
            names.append(frame.f_code.co_name)
        if names and not inside:
            break
        frame = frame.f_back  # type: ignore[assignment]
    once = [name for name, inner in zip(names, [None, *names], strict=False) if name != inner]
    return " < ".join(once) or "elsewhere"
