"""SQLite struck inside: the daemon killed, or refused, at each system call that touches its ledger."""

from __future__ import annotations

import collections
import shutil
import time

import pytest

from longrun import status
from longrun.home import Home
from tests.drills.daemons import Watched

CALLS = ("openat", "pwrite64", "fdatasync", "fsync", "ftruncate", "unlink")
HOW = ("signal=KILL:when={}", "error=ENOSPC:when={}", "error=EIO:when={}", "error=ENOSPC:when={}+")
EVER_AFTER = "+"
SIDES = ("", "-wal", "-shm", "-journal")
LIMIT_S = 60.0


@pytest.fixture(autouse=True)
def strace():
    if shutil.which("strace") is None:
        pytest.skip("there is no strace(1) here")


def test_a_ledger_that_is_struck_at_a_call_of_its_own_loses_nothing(campaign, quick):
    cases = cases_of_calls(quick / "counted")

    def attempt(case, dice):
        call, number, how = case
        home = quick / "struck"
        shutil.rmtree(home, ignore_errors=True)
        lab = Watched(home)
        try:
            drop(lab)
            daemon = started(lab, call, how.format(number))
            while daemon.poll() is None:
                if how.endswith(EVER_AFTER) and status.read(Home(home))["state"] == "paused: disk":
                    lab.kill(daemon)
                time.sleep(0.02)
            campaign.note(ended(daemon.returncode))
            told = lab.stderr.read_text()
            assert "Traceback" not in told, told
            lab.under = ()
            assert lab.drain() == 0, lab.log
            lab.check()
        finally:
            lab.close()

    campaign.run("3, 4: killed or refused at a call of SQLite's", cases, attempt, small=1)


def cases_of_calls(home):
    """Each call that touches the ledger while three files are trained: killed, refused once, or ever after."""
    lab = Watched(home)
    try:
        drop(lab)
        assert started(lab, ",".join(CALLS)).wait(LIMIT_S) == 0
    finally:
        lab.close()
    lines = [line.split("(")[0].split() for line in lab.trace.read_text().splitlines()]
    counts = collections.Counter(words[-1] for words in lines if words[-1] in CALLS)
    return [(call, number, how) for call, count in counts.items() for number in range(1, count + 1) for how in HOW]


def drop(lab):
    for name, rows in (("a", 20), ("b", 1), ("c", 9)):
        lab.drop_rows(name, rows)


def started(lab, calls, inject=""):
    """A daemon under strace, which counts those calls only that touch the ledger; the process is the daemon's own."""
    files = [f"--trace-path={lab.home / 'state' / f'ledger.sqlite3{side}'}" for side in SIDES]
    wanted = [f"--inject={calls}:{inject}"] if inject else []
    lab.under = ("strace", "-D", "-f", "-qq", "-o", lab.trace, f"--trace={calls}", *files, *wanted)
    return lab.start("--drain")


def ended(code):
    return "killed" if code == -9 else "went on" if code == 0 else "ended"
