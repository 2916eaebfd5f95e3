from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from longrun import locks
from longrun.home import Home
from longrun.store import Store
from tests.unit.builders import plain_model

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.make()
    return home


@pytest.fixture
def daemon(home: Home) -> Iterator[locks.Lock]:
    """The lock of a daemon that runs on the home, as far as others can tell."""
    with locks.Lock.take(home.daemon_lock, what="the Longrun daemon") as lock:
        yield lock


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return plain_model(tmp_path / "model")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "backups")


@pytest.fixture
def disk_log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What becomes durable and what gets another name, in order: "sync NAME" and "rename NAME"."""
    log: list[str] = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(descriptor: int) -> None:
        log.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def logged_rename(source: Path, target: Path | str, **options: int) -> None:
        log.append(f"rename {Path(target).name}")
        rename(source, target, **options)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    return log


@pytest.fixture(scope="session", autouse=True)
def _lease_signal_ignored() -> Iterator[None]:
    """As in the daemon: a writer that meets the lease probe raises SIGIO, which kills by default."""
    former = signal.signal(signal.SIGIO, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGIO, former)
