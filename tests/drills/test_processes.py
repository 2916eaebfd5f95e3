"""Many daemons at once, signals at any moment, a worker that outlives its daemon, clocks that jump."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.drills.daemons import Watched, worker_of
from tests.lab import REPOSITORY

DAEMONS = 20
RACES, STOPS, STOPS_A_LIFE, ORPHANS, CLOCKS = 100, 100, 5, 60, 40
LIMIT_S = 60.0
DAY_S = 86400
HANGUP = signal.SIGTERM if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else signal.SIGHUP  # under nohup
MEMORY_BYTES = 200 << 20
CGROUPS = Path("/sys/fs/cgroup")
MEMORY_GROUP = CGROUPS / "memory" if (CGROUPS / "memory").is_dir() else CGROUPS  # version 1 or 2


def test_of_many_daemons_at_once_exactly_one_runs(campaign, quick):
    lab = Watched(quick / "home")

    def attempt(number, dice):
        lab.drop_rows(f"file-{number}", dice.choice((1, 9, 60)))
        started = [started_aside(lab, quick) for _ in range(DAEMONS)]
        try:
            lab.wait_until(lambda: sum(daemon.poll() is None for daemon in started) == 1)
            (left,) = [daemon for daemon in started if daemon.poll() is None]
            for daemon in started:
                if daemon is not left:
                    told = daemon.stderr.read()
                    assert daemon.returncode == 75, told
                    assert told.count("\n") == 1
                    assert f"is held by the Longrun daemon (pid {left.pid}, since " in told
            lab.wait_until(lambda: f"file-{number}.jsonl" in lab.names("trained"))
            left.send_signal(signal.SIGTERM)
            assert left.wait(LIMIT_S) == 0
            lab.check()
        finally:
            for daemon in started:
                with contextlib.suppress(ProcessLookupError):
                    daemon.kill()
                daemon.wait()
                daemon.stderr.close()

    campaign.run(f"13: of {DAEMONS} daemons at once one runs", range(RACES), attempt, small=1)


def started_aside(lab, folder):
    """A daemon that is waited for with the others; what it says is kept apart."""
    command = [sys.executable, str(REPOSITORY / "daemon.py"), "--home", str(lab.home), "run"]
    return subprocess.Popen(
        command, env=lab.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder
    )


def test_a_signal_at_any_moment_is_obeyed_and_no_saved_step_is_done_again(campaign, quick, hand):
    def attempt(life, dice):
        lab = Watched(quick / f"life-{life}", hand=hand)
        try:
            for _ in range(STOPS_A_LIFE):
                lab.drop_some(dice)
                starts = lab.whole_log.count("Longrun watches")
                daemon = lab.start(LONGRUN_STEP_S=str(dice.choice((0.002, 0.03))))
                lab.wait_until(lambda starts=starts: lab.whole_log.count("Longrun watches") > starts)
                lab.let_live(dice)
                campaign.note(f"when {lab.phase(daemon.pid)}")
                for number in dice.choice(([signal.SIGTERM], [signal.SIGINT], [HANGUP], [signal.SIGTERM] * 2)):
                    with contextlib.suppress(ProcessLookupError):
                        daemon.send_signal(number)
                    time.sleep(dice.uniform(0.0, 0.05))
                    campaign.note("signals")
                insists = dice.random() < 0.3  # until the process is gone
                while insists and daemon.poll() is None:
                    daemon.send_signal(signal.SIGTERM)
                    time.sleep(0.001)
                assert daemon.wait(LIMIT_S) == 0
            assert lab.drain() == 0
            lab.check()
            lab.check_no_step_is_lost()
            assert "Traceback" not in (lab.home / "stderr.log").read_text()
        finally:
            lab.close()

    campaign.run("a signal at any moment: exit 0, nothing saved is done again", range(STOPS), attempt, small=1)


def test_a_worker_that_outlives_its_daemon_is_waited_for(campaign, quick, hand):
    def attempt(number, dice):
        lab = Watched(quick / f"orphaned-{number}", hand=hand)
        try:
            for name in ("a", "b", "c"):
                lab.drop_rows(name, dice.choice((9, 37, 60)))
            daemon = lab.start(LONGRUN_OUTLIVES="1", LONGRUN_STEP_S="0.1")
            lab.wait_until(lambda: (lab.probe / "steps.txt").exists())
            time.sleep(dice.uniform(0.0, 0.8))
            worker = worker_of(daemon.pid)
            lab.kill(daemon)
            campaign.note("workers outlived their daemon", is_alive(worker))
            assert lab.drain() == 0, lab.log
            assert not is_alive(worker)
            lab.check()
            lab.check_no_step_is_lost()
        finally:
            lab.close()

    campaign.run("13: a model has one writer, also when its daemon died alone", range(ORPHANS), attempt, small=1)


def is_alive(process):
    """Whether it still runs; what nobody has waited for has no command line any more."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes() != b""
    except FileNotFoundError:
        return False


def test_a_clock_that_jumps_by_days_changes_nothing(campaign, quick):
    def attempt(number, dice):
        lab = Watched(quick / f"jumping-{number}")
        try:
            for name in ("a", "b", "c", "d"):
                lab.drop_rows(name, dice.choice((1, 9, 37)))
                changed_at = time.time() + dice.choice((-DAY_S, 0, DAY_S))
                os.utime(lab.inbox / f"{name}.jsonl", (changed_at, changed_at))
            assert lab.drain(LONGRUN_CLOCK_JUMPS=str(DAY_S)) == 0, lab.log
            lab.check()
        finally:
            lab.close()

    campaign.run("a clock that jumps by a day changes nothing", range(CLOCKS), attempt, small=1)


ENDS = {"segfault": "SIGSEGV", "eat": "SIGKILL; perhaps the system ran out of memory"}


def test_a_file_that_ends_its_worker_is_given_up_and_the_next_one_trains(campaign, quick):
    def attempt(how, dice):
        with contextlib.closing(Watched(quick / how)) as lab, limited_memory() as take:
            for name in ("before", "poison", "after"):
                lab.drop_rows(name, dice.choice((8, 37)))
            del lab.dropped[1]
            lab.refused = 1
            poison = {"at": "longrun.checkpoint:seal", "role": "worker", "about": "poison", "do": how, "nth": 0}
            daemon = lab.start("--drain", faults=[poison])
            take(daemon.pid)
            assert daemon.wait(LIMIT_S) == 1, lab.log
            reason = json.loads((lab.home / "rejected" / "poison.jsonl.reason.json").read_text())
            assert reason["why"] == f"the worker died ({ENDS[how]}); given up after 3 attempts"
            lab.check()

    possible = os.access(MEMORY_GROUP, os.W_OK)
    campaign.note("left out, as memory cannot be limited here", not possible)
    cases = [how for how in ENDS if possible or how != "eat"]
    campaign.run("11: a file that ends its worker ends no other", cases, attempt, small=2)


@contextlib.contextmanager
def limited_memory():
    """Gives what puts a process, and whom it starts from then on, into a control group with little memory."""
    if not os.access(MEMORY_GROUP, os.W_OK):
        yield lambda process: None
        return
    group = MEMORY_GROUP / f"longrun-drill-{os.getpid()}"
    group.mkdir()
    try:
        limit = next(name for name in ("memory.max", "memory.limit_in_bytes") if (group / name).exists())
        (group / limit).write_text(str(MEMORY_BYTES))
        yield lambda process: (group / "cgroup.procs").write_text(str(process))
    finally:
        group.rmdir()
