"""Two or more ways to do the same work, side by side: one runs for a slice of time while the others are stopped.

A machine's speed drifts by more, within minutes, than what is to be told apart. Ways that take turns every few seconds
see the same machine; each counts the time of its own slices only.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil

from bench.running import must_be_good, start

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

SLICE_S = 5.0  # the caches that another way has filled are filled again in milliseconds


class Way:
    """Commands to run one after another, each in its home, and when they ran."""

    def __init__(self, commands: Sequence[tuple[list[str], Path]]) -> None:
        self._commands = list(commands)  # the first one runs, or is the next
        self._process: subprocess.Popen[bytes] | None = None
        self.slices: list[tuple[float, float]] = []  # when it began to run, and was stopped

    @property
    def wall_s(self) -> float:
        """Seconds that it was not stopped."""
        return sum(ended - began for began, ended in self.slices)

    def wall_s_until(self, when: float) -> float:
        """Seconds that it was not stopped up to a moment, given in seconds since the epoch."""
        return sum(max(0.0, min(ended, when) - began) for began, ended in self.slices)

    @property
    def is_done(self) -> bool:
        return not self._commands

    def run_slice(self) -> None:
        began = time.time()
        send(signal.SIGCONT, self._processes())
        while not self.is_done and (left_s := began + SLICE_S - time.time()) > 0:
            command, home = self._commands[0]
            self._process = self._process or start(command, home)
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(left_s)
                self._process = None
                must_be_good(code, command, home)
                del self._commands[0]
        send(signal.SIGSTOP, self._processes())
        self.slices.append((began, time.time()))

    def kill(self) -> None:
        send(signal.SIGKILL, list(self._processes()))  # a dead one has no children any more
        if self._process:
            self._process.wait()
            self._process = None

    def _processes(self) -> Iterator[psutil.Process]:
        """The one that runs, then all that it has started: once it is stopped, it starts no more."""
        if self._process:
            process = psutil.Process(self._process.pid)
            yield process
            yield from process.children(recursive=True)


def send(number: signal.Signals, processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def take_turns(ways: Iterable[Way]) -> None:
    """Run all of them to their end; the first given begins.

    RuntimeError if a command fails, with what it said last; the others are killed then.
    """
    ways = list(ways)
    # Like Ctrl-C: who is stopped would stay so for good.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        for way in itertools.cycle(ways):
            if all(way.is_done for way in ways):
                break
            if not way.is_done:
                way.run_slice()
    finally:
        for way in ways:
            way.kill()
