from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest

from longrun.notify import PING_S, Notifier

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def test_systemd_is_told(systemd: socket.socket) -> None:
    Notifier().say("READY=1")
    assert systemd.recv(99) == b"READY=1"


def test_an_abstract_address_is_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = f"longrun-test-{tmp_path}"[-100:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        Notifier().say("READY=1")
        assert listener.recv(99) == b"READY=1"


def test_the_watchdog_is_reassured_now_and_then(systemd: socket.socket) -> None:
    notifier = Notifier()
    for now in (100.0, 101.0, 100.0 + PING_S - 0.1, 100.0 + PING_S):
        notifier.ping(now)
    assert [systemd.recv(99), systemd.recv(99)] == [b"WATCHDOG=1"] * 2
    with pytest.raises(BlockingIOError):
        systemd.recv(99)


def test_without_systemd_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Notifier().ping(0.0)


def test_a_systemd_that_is_gone_is_no_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "absent"))
    Notifier().say("READY=1")
