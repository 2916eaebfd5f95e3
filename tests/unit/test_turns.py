from __future__ import annotations

import sys

import psutil
import pytest

from bench import turns

# A process that is started by another one, as a worker is by a daemon, says when it was running.
WORK = """
import time
for _ in range(100):
    print(time.time(), flush=True)
    time.sleep(0.01)
"""
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {WORK!r}])"


@pytest.fixture(autouse=True)
def short_slices(monkeypatch):
    monkeypatch.setattr(turns, "SLICE_S", 0.2)
    monkeypatch.setattr(turns.signal, "signal", lambda *_: None)  # pytest's own


def way(home, program):
    home.mkdir()
    return turns.Way([([sys.executable, "-c", program], home)] * 2)


def moments(home):
    return [float(line) for line in (home / "said.log").read_text().splitlines()]


def test_ways_run_to_their_end_and_never_at_once(tmp_path):
    ways = {name: way(tmp_path / name, PARENT) for name in ("one", "other")}
    turns.take_turns(ways.values())
    for name, other in (("one", "other"), ("other", "one")):
        told = moments(tmp_path / name)
        assert len(told) == 200
        meanwhile = [began for began, _ in ways[other].slices if told[0] < began < told[-1]]
        assert meanwhile  # the other one had turns,
        assert not [moment for moment in told for began, ended in ways[other].slices if began < moment < ended]


def test_a_command_that_fails_is_told_and_the_others_are_killed(tmp_path):
    failing = way(tmp_path / "failing", "raise SystemExit('no such luck')")
    waiting = way(tmp_path / "waiting", "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    with pytest.raises(RuntimeError, match="no such luck"):
        turns.take_turns([waiting, failing])
    (pid,) = moments(tmp_path / "waiting")
    assert not psutil.pid_exists(int(pid))
