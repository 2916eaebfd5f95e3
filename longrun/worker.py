"""A child process that does the heavy work, seen from the daemon: start, send, receive, kill.

Two roles run the same program: the worker trains, the preparer reads files and makes tokens of them while the
worker trains. Health is progress: a child that has work, says nothing for too long and moves no bytes meanwhile is as
good as dead. (A model of many GB is downloaded, loaded and saved for longer than any step takes, in silence.)
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

from longrun import process, wire
from longrun.errors import LongrunError

if TYPE_CHECKING:
    import socket

    from longrun.home import Home

PROGRAM = Path(__file__).resolve().parent.parent / "train.py"
# accelerate reads the variables that torch's own launcher sets; its own starts one process only where there is no GPU.
LAUNCHER = ("-m", "torch.distributed.run", "--standalone")
LOG_LIMIT_BYTES = 4 << 20
SIGN_OF_LIFE_BYTES = 1 << 20  # read or written
EXIT_S = 5.0  # to end after closing its socket: torch takes more than one
GONE_S = 60.0  # to be gone after SIGKILL: a device that does not answer can hold it for ever
LAST_WORDS_BYTES = 4096


class Child:
    def __init__(self, home: Home, role: str) -> None:
        self.role = role
        self._home = home
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: socket.socket | None = None
        self._channel: wire.Channel | None = None
        self.options: tuple[str, ...] = ()
        self.ready = False  # it said hello
        self.used = False  # it has been given work since it started
        self.device = ""  # of the worker, as it said
        self.heard_at = 0.0  # monotonic seconds; last sign of progress, or the start of what it is doing
        self._moved_bytes = 0  # by then

    @property
    def running(self) -> bool:
        return self._process is not None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self, options: tuple[str, ...], now: float, *, processes: int = 1) -> None:
        """Start the process, or several that share the work; `ready` turns true when it has said hello."""
        socket_path = self._home.state / f"{self.role}.sock"
        self._listener = wire.listen(socket_path)
        self._listener.setblocking(False)
        command = [
            sys.executable,
            *([*LAUNCHER, f"--nproc-per-node={processes}"] if processes > 1 else []),
            str(PROGRAM),
            f"--{self.role}",
            str(socket_path),
            "--home",
            str(self._home.root),
        ]
        with self._open_log() as log:
            # A session of its own: Ctrl-C in the terminal is for the daemon, which then asks for a checkpoint.
            self._process = subprocess.Popen(
                [*command, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.options, self.ready, self.used = options, False, False
        self._alive(now)

    @property
    def log(self) -> Path:
        """What the libraries print, so that the daemon's log stays one line an event."""
        return self._home.logs / f"{self.role}.log"

    def _open_log(self) -> IO[bytes]:
        path = self.log
        path.parent.mkdir(exist_ok=True)  # a person may have removed it to make room
        too_long = path.exists() and path.stat().st_size > LOG_LIMIT_BYTES
        return path.open("wb" if too_long else "ab")

    def filenos(self) -> list[int]:
        """What to wait on for news."""
        return [end.fileno() for end in (self._channel, None if self._channel else self._listener) if end is not None]

    def send(self, message: wire.Message, now: float) -> None:
        """Give it work; if it is gone, receive() will say so."""
        assert self._channel is not None
        self.used = True
        self._alive(now)
        with contextlib.suppress(wire.Closed):
            self._channel.send(message)

    def receive(self, now: float) -> list[wire.Message]:
        """What it said since; wire.Closed when it is gone and has nothing more to say."""
        if self._channel is None:
            self._accept()
        if self._channel is None:
            if self._process is not None and self._process.poll() is not None:
                raise wire.Closed
            return []
        messages = self._channel.receive(0)
        if messages:
            self._alive(now)
        for message in messages:
            if isinstance(message, wire.Hello):
                self.ready, self.device = True, message.device
        return messages

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(BlockingIOError):
            connection, _ = self._listener.accept()
            self._channel = wire.Channel(connection)

    def silent_s(self, now: float) -> float:
        return now - self.heard_at

    def _alive(self, now: float) -> None:
        self.heard_at = now
        self._moved_bytes = process.moved_bytes(self._process.pid) if self._process else 0

    def hangs(self, now: float, limit_s: float) -> bool:
        """Whether it has said nothing for so long, and moved no bytes since the last sign of life."""
        if self._process is None or self.silent_s(now) <= limit_s:
            return False
        if process.moved_bytes(self._process.pid) - self._moved_bytes < SIGN_OF_LIFE_BYTES:
            return True
        self._alive(now)
        return False

    def kill(self) -> str:
        """End it now, with everything it started; how it ended, in words. LongrunError when it cannot be ended."""
        if self._process is None:
            return "not running"
        ended_by_itself = self._wait(EXIT_S if self._channel_gone() else 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        killed, gone = self._process, self._wait(GONE_S)
        self._forget()
        if not gone:
            raise LongrunError(
                f"cannot end the {self.role} (pid {killed.pid}): it is still there {GONE_S:g} s after it was killed,"
                " held by the kernel as when a device does not answer",
                hint="look at `nvidia-smi` and `dmesg`; perhaps the machine has to be restarted",
            )
        return _in_words(killed.wait()) if ended_by_itself else "killed by the daemon"

    def last_words(self) -> str:
        """The last line that it, or one before it, has written into its log: the error that ended it, if one did."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - LAST_WORDS_BYTES))
                lines = log.read().decode("utf-8", "replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1].strip()[:300] if lines else ""

    def _channel_gone(self) -> bool:
        try:
            if self._channel is not None:
                self._channel.receive(0)
        except wire.Closed:
            return True
        return False

    def _wait(self, timeout_s: float) -> bool:
        assert self._process is not None
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _forget(self) -> None:
        for end in (self._channel, self._listener):
            if end is not None:
                end.close()
        self._process = self._listener = self._channel = None
        self.ready = False


def _in_words(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"{name}; perhaps the system ran out of memory" if name == "SIGKILL" else name
