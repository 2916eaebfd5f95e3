"""Two or more ways to do the same work, side by side: one runs for a slice of time while the others are stopped.

A machine's speed drifts by more, within minutes, than what is to be told apart. Ways that take turns every few seconds
see the same machine; each counts the time of its own slices only.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import psutil

from bench.running import start

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

SLICE_S = 5.0  # the caches that another way has filled are filled again in milliseconds


class Way:
    """Commands to run one after another, each in its home, and when they ran."""

    def __init__(self, commands: Sequence[tuple[list[str], Path]]) -> None:
        self._waiting = list(commands)
        self._process: subprocess.Popen[bytes] | None = None
        self._slices: list[tuple[float, float]] = []

    @property
    def wall_s(self) -> float:
        """Seconds that it was not stopped."""
        return sum(ended - began for began, ended in self._slices)

    def wall_s_until(self, when: float) -> float:
        """Seconds that it was not stopped up to a moment, given in seconds since the epoch."""
        return sum(max(0.0, min(ended, when) - began) for began, ended in self._slices)

    @property
    def is_done(self) -> bool:
        return self._process is None and not self._waiting

    def run_slice(self) -> None:
        began = time.time()
        self._send(signal.SIGCONT)
        while not self.is_done and (left_s := began + SLICE_S - time.time()) > 0:
            if self._process is None:
                self._process = start(*self._waiting.pop(0))
            with contextlib.suppress(subprocess.TimeoutExpired):
                code, command = self._process.wait(left_s), self._process.args
                self._process = None
                if code:
                    raise subprocess.CalledProcessError(code, command)
        self._send(signal.SIGSTOP)
        self._slices.append((began, time.time()))

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        """To the process and all that it has started, itself first: a stopped one starts no more."""
        if self._process is None:
            return
        process = psutil.Process(self._process.pid)
        process.send_signal(number)
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)


def take_turns(ways: Iterable[Way]) -> None:
    """Run all of them to their end; the first given begins.

    Raises subprocess.CalledProcessError if a command fails; the others are killed then.
    """
    ways = list(ways)
    try:
        for way in itertools.cycle(ways):
            if all(way.is_done for way in ways):
                break
            if not way.is_done:
                way.run_slice()
    finally:
        for way in ways:
            way.kill()
