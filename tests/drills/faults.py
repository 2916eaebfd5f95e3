"""Calls that change a disk, made to fail: counted in this process, the nth of them kills it or raises.

Every such call of longrun passes here, pathlib's, shutil's and those of open files included. `pread` is among them
so that a disk that cannot be read is had too.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import io
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

OF_OS = (
    *("rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir", "chmod", "utime"),
    *("fsync", "fdatasync", "write", "pwrite", "pread", "truncate", "ftruncate", "copy_file_range"),
)
NO_DISK = ("pipe:[", "socket:[")  # a write there is told to somebody, and cannot be refused as a disk refuses
KILL = "SIGKILL"
SLOW, SLOW_S = "slow", 0.3  # the call takes up to so much longer
EVER_AFTER = " ever after"  # from the nth call on: a disk that has died, or is full and stays so


class Calls:
    """Leads every call of this process that changes a disk through `around`."""

    names = OF_OS
    text = False  # whether files that are opened as text count

    def around(self, what: str, arguments: tuple[Any, ...], options: dict[str, Any], call: Callable[[], Any]) -> Any:
        """Make the call, or not; `arguments` and `options` are its own."""
        raise NotImplementedError

    def install(self) -> None:
        for name in self.names:
            setattr(os, name, self.wrapped(name, getattr(os, name)))
        fcntl.ioctl = self.wrapped("ioctl", fcntl.ioctl)  # type: ignore[assignment]
        io.open = self.opening(io.open)  # type: ignore[assignment]
        ctypes.CDLL = functools.partial(_library, self, ctypes.CDLL)  # type: ignore[assignment,misc]

    def wrapped(self, name: str, function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            return self.around(name, arguments, options, lambda: function(*arguments, **options))

        return wrapped

    def opening(self, function: Any) -> Any:
        """Files that pathlib opens for writing: their opening counts, and each write."""
        calls = self

        class File(io.FileIO):
            def write(self, content: Any) -> int:
                write = super().write
                count: int = calls.around("file.write", (self.name,), {"file": self}, lambda: write(content))
                return count

        @functools.wraps(function)
        def opened(path: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
            counts = "b" in mode or (self.text and not isinstance(path, int))
            if not counts or not set(mode) & set("wxa+"):
                return function(path, mode, buffering, *rest, **options)
            raw = mode.replace("b", "").replace("t", "")
            file = self.around("open", (path,), {"mode": raw}, lambda: File(path, raw))
            if buffering == 0:
                return file
            buffered = io.BufferedRandom(file) if "+" in mode else io.BufferedWriter(file)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest, **options)

        return opened


class Faults(Calls):
    """What happens at which call. `how` is "SIGKILL", "slow" or the name of an errno; the nth call counts from 1."""

    def __init__(self, nth: int, how: str, trace: list[str]) -> None:
        self.nth, self.how, self.trace = nth, how, trace
        self._guard = threading.Lock()
        self._process = os.getpid()

    def around(self, what: str, arguments: tuple[Any, ...], options: dict[str, Any], call: Callable[[], Any]) -> Any:
        self.reached(what, *arguments)
        return call()

    def reached(self, what: str, *about: Any) -> None:
        places = [*filter(None, map(_place, about))]
        if os.getpid() != self._process or (places and places[0].startswith(NO_DISK)):  # a fork has calls of its own
            return
        with self._guard:
            self.trace.append(" ".join([what, *places]))
            count = len(self.trace)
        name = self.how.removesuffix(EVER_AFTER)
        if count == self.nth or (name != self.how and self.nth and count > self.nth):
            if name == KILL:
                os.kill(os.getpid(), signal.SIGKILL)
            if name == SLOW:
                time.sleep(random.uniform(0.0, SLOW_S))
                return
            raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))


def _library(calls: Calls, load: Any, *arguments: Any, **options: Any) -> Any:
    """The C library with its renameat2 led through `around`: it tells of errors by numbers."""
    library = load(*arguments, **options)
    rename = library.renameat2

    def renameat2(*names: Any) -> Any:
        old, new, flag = names[1], names[3], names[4]
        try:
            return calls.around("renameat2", (os.fsdecode(old), os.fsdecode(new), flag), {}, lambda: rename(*names))
        except OSError as error:
            ctypes.set_errno(error.errno or 0)
            return -1

    library.renameat2 = renameat2
    return library


def _place(word: Any) -> str:
    """A path, or where an open file is, on one line; nothing for anything else."""
    if isinstance(word, int) and 2 < word < 1 << 20:
        try:
            word = Path(f"/proc/self/fd/{word}").readlink()
        except OSError:
            return ""
    return str(word).replace("\n", "?") if isinstance(word, str | Path) else ""
