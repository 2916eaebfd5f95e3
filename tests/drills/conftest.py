"""One line a drill at the end of the run: the promise, how many cases, failures, the seed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.drills.campaign import Campaign

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.register_assert_rewrite("tests.drills.daemons", "tests.drills.world")
LINES: list[str] = []


@pytest.fixture
def campaign(request: pytest.FixtureRequest) -> Iterator[Campaign]:
    found = Campaign(request.node.nodeid)
    yield found
    request.node.user_properties += [("drill", line) for line in found.lines]


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "teardown":  # also in the process that watches others work (xdist)
        LINES.extend(line for name, line in report.user_properties if name == "drill")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if LINES:
        terminalreporter.section("drills")
        for line in sorted(LINES):
            terminalreporter.write_line(line)


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: for cases that are many and do not care how long a sync takes."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="longrun-drill-") as folder:
        yield Path(folder)
