"""sd_notify(3): tell systemd that the daemon is ready, alive, or leaving. Without systemd it says nothing."""

from __future__ import annotations

import contextlib
import os
import socket
import time

PING_S = 10.0
PATIENCE_US = 120_000_000


class Notifier:
    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._next_ping = 0.0

    def say(self, what: str) -> None:
        if self._address:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram, contextlib.suppress(OSError):
                datagram.sendto(what.encode(), self._address)

    def patience(self, _: int = 0) -> None:
        """Ask for more time while something long blocks the loop, such as reading a large checkpoint."""
        now = time.monotonic()
        if now >= self._next_ping:
            self._next_ping = now + PING_S
            self.say(f"EXTEND_TIMEOUT_USEC={PATIENCE_US}\nWATCHDOG=1")

    def ping(self, now: float) -> None:
        """Reassure the watchdog, at most every few seconds; called only from the loop, so a stuck loop is silent."""
        if now >= self._next_ping:
            self._next_ping = now + PING_S
            self.say("WATCHDOG=1")
