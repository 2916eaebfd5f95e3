"""What a process asks of kernel and interpreter."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
import weakref
from pathlib import Path

from longrun import process

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    child = (
        "import os, time; from longrun import process; process.die_with_parent();"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [
            sys.executable,
            "-S",
            "-c",
            "import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', sys.argv[1]])",
            child,
        ],
        cwd=REPOSITORY,
    )
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.005)
    parent.kill()
    parent.wait()
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while _lives(pid):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_that_meets_new_names_for_hours_does_not_grow_by_them() -> None:
    program = """
import re, sys
from longrun import compose, loop, process

def rss_kb():
    with open("/proc/self/smaps_rollup") as rolled:
        return int(re.search(r"Rss: +(\\d+)", rolled.read())[1])

process.return_large_blocks(32 << 10)
process.meet_many_names()
before = rss_kb()
for number in range(100_000):
    sys.intern(f"part of a path {number}")
print(rss_kb() - before)
"""
    grown = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert int(grown.stdout) < 200  # kB; one table more is 500


def test_giving_memory_back_begins_with_collecting_what_nobody_holds() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself = self

    gc.disable()
    try:
        gone = weakref.ref(Cycle())
        assert gone() is not None
        process.return_free_memory()
        assert gone() is None
    finally:
        gc.enable()
