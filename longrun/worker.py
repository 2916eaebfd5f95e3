"""A child process that does the heavy work, seen from the daemon: start, send, receive, kill.

Two roles run the same program: the worker trains, the preparer reads files and makes tokens of them while the
worker trains. Health is progress: a child that has work and says nothing for too long is as good as dead.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

from longrun import wire

if TYPE_CHECKING:
    import socket

    from longrun.home import Home

PROGRAM = Path(__file__).resolve().parent.parent / "train.py"
# accelerate reads the variables that torch's own launcher sets; its own starts one process only where there is no GPU.
LAUNCHER = ("-m", "torch.distributed.run", "--standalone")
LOG_LIMIT_BYTES = 4 << 20


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
        self.heard_at = 0.0  # monotonic seconds; last sign of progress, or the start of what it is doing

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
        self.options, self.ready, self.used, self.heard_at = options, False, False, now

    def _open_log(self) -> IO[bytes]:
        """What the libraries print goes to logs/worker.log; the daemon's log stays one line an event."""
        path = self._home.logs / f"{self.role}.log"
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
        self.heard_at = now
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
            self.heard_at = now
        if any(isinstance(message, wire.Hello) for message in messages):
            self.ready = True
        return messages

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(BlockingIOError):
            connection, _ = self._listener.accept()
            self._channel = wire.Channel(connection)

    def silent_s(self, now: float) -> float:
        return now - self.heard_at

    def kill(self) -> str:
        """End it now, with everything it started; how it ended, in words."""
        if self._process is None:
            return "not running"
        ended_by_itself = self._wait(0.5 if self._channel_gone() else 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self._forget()
        return _in_words(code) if ended_by_itself else "killed by the daemon"

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
