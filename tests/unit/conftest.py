from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from longrun.home import Home

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.make()
    return home


@pytest.fixture(scope="session", autouse=True)
def _lease_signal_ignored() -> Iterator[None]:
    """As in the daemon: a writer that meets the lease probe raises SIGIO, which kills by default."""
    former = signal.signal(signal.SIGIO, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGIO, former)
