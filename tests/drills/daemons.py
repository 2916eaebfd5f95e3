"""A home whose daemon is real and whose children are scripted: dropped into, killed, and held to account."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import signal
import sqlite3
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun import checkpoint
from longrun.home import Home
from longrun.lineage import Lineage
from tests.drills import scripted
from tests.lab import Lab, numbered

if TYPE_CHECKING:
    import random

    from tests.drills.hand import Hand

SETTINGS = {
    "inbox.settle_s": 0.1,
    "inbox.scan_s": 0.1,
    "worker.retry_s": 0.1,
    "worker.step_timeout_s": 10.0,
    "train.save_steps": 3,
    "log.rows": False,
}
SENTENCE = re.compile(r"This file will train for (\d+) steps \(reaching global step (\d+)\)")
EVENTS_A_LIFE = 16  # two small files tell about as many
NAMES = ("a", "b", "c", "deep-é", "--drain")  # used again and again: a name is no identity


class Mortal(Lab):
    """A Lab whose daemon and worker are killed at any moment."""

    def let_live(self, dice: random.Random, *, a_while_s: float = 1.0, a_little_s: float = 0.03) -> None:
        """For a moment: until some events were told, however slow the machine is, and a little longer."""
        path = self.home / "state" / "events.jsonl"
        wanted = len(self.events) + dice.randint(0, EVENTS_A_LIFE)
        end = time.monotonic() + dice.uniform(0.0, a_while_s)
        while time.monotonic() < end and not (path.exists() and path.read_bytes().count(b"\n") >= wanted):
            time.sleep(0.001)
        time.sleep(dice.uniform(0.0, a_little_s))

    def strike(self, who: str, daemon: Any) -> str:
        """Kill the daemon, its worker, or both, at once, and say at what; a worker's end is the daemon's to notice."""
        worker = worker_of(daemon.pid)
        if who in ("worker", "both") and worker:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        if who in ("daemon", "both"):
            self.kill(daemon)
        return self.phase(daemon.pid)

    def phase(self, daemon: int) -> str:
        """How far this daemon has come with the file that it is at, as home and events tell."""
        told = self.events
        begun = max((at for at, event in enumerate(told) if event["event"] == "start"), default=-1)
        if begun < 0 or told[begun]["pid"] != daemon:
            return "starting"
        of_run = [event for event in told[begun:] if event["event"] in ("planned", "started", "saved", "trained")]
        if of_run and of_run[-1]["event"] != "trained":
            return self._phase_of_run(of_run)
        jobs = self.home / "state" / "jobs"
        if first := min(self.names("state/jobs"), default=None):
            return "prepared" if (jobs / first / "prepared").exists() else "claimed"
        return "in the inbox" if any(self.inbox.glob("*.jsonl*")) else "idle"

    def _phase_of_run(self, events: list[dict[str, Any]]) -> str:
        if self.names("state/staging"):
            return "committing"
        target = [event["target_step"] for event in events if event["event"] == "planned"][-1]
        if events[-1]["event"] == "planned":
            return "planned"
        return "putting away" if events[-1].get("global_step") == target else "mid-file"


class Watched(Mortal):
    """A Lab with scripted children; `dropped` is what its model must have seen in the end."""

    def __init__(self, home: Path, *, hand: Hand | None = None, **settings: Any) -> None:
        super().__init__(home, hand=hand, **SETTINGS | settings)
        self.dropped: list[int] = []  # rows of each file that was dropped and is to be trained
        self.refused = 0  # how many others were dropped, which are to be rejected

    def environment(self, faults: list[dict[str, Any]] | None = None, **extra: str) -> dict[str, str]:
        return super().environment(faults, LONGRUN_CHILDREN=scripted.__file__, **extra)

    def drop_some(self, dice: random.Random, *, most: int = 2) -> None:
        for _ in range(dice.randint(0, most)):
            self.drop_rows(dice.choice(NAMES), dice.choice((1, 7, 8, 9, 37, 60)), packed=dice.random() < 0.2)

    def drop_rows(self, name: str, rows: int, *, packed: bool = False) -> None:
        """One more arrival, under a name that may have been used before; never over a file that still waits."""
        content = "".join(json.dumps(row) + "\n" for row in numbered(name, rows)).encode()
        ending = ".jsonl.gz" if packed else ".jsonl"
        aside = self.inbox / f".{name}.tmp"
        aside.write_bytes(gzip.compress(content, mtime=0) if packed else content)
        with contextlib.suppress(FileExistsError):
            os.link(aside, self.inbox / f"{name}{ending}")
            self.dropped.append(rows)
        aside.unlink()

    # -- breaking

    @property
    def trace(self) -> Path:
        """The calls of the process that was to be struck."""
        return self.probe / "calls.txt"

    @property
    def was_struck(self) -> bool:
        return self.trace.exists()

    # -- holding to account

    def check(self, *, in_order: bool = True) -> None:
        """Every file that was dropped is trained, in one place, and the model has seen each row exactly once.

        In order of arrival, unless some were taken back after later ones had trained.
        """
        self.check_files()
        self.check_model(in_order=in_order)
        self.check_ledger()

    def check_files(self) -> None:
        assert self.names("inbox") == set(), self.names("inbox")
        assert len(self.names("rejected")) == 2 * self.refused, self.log  # each with its reason
        assert len(self.names("trained")) == len(self.dropped), (self.names("trained"), self.dropped, self.log)
        assert not list((self.home / "state" / "jobs").iterdir())

    def check_model(self, *, in_order: bool = True) -> None:
        home = Home(self.home)
        if not self.dropped:
            assert not self.model.exists()
            return
        newest = checkpoint.newest(home, checkpoint.Verifier(), lambda text: None)
        assert newest is not None
        published = {entry.name for entry in self.model.iterdir() if entry.is_file()}
        assert published == {entry.name for entry in newest.path.iterdir()} - {"optimizer.pt", "manifest.json"}
        for name in published:
            assert (self.model / name).read_bytes() == (newest.path / name).read_bytes(), f"{name} is not published"
        assert newest.lineage.in_progress is None
        rows = sorted(record.rows for record in newest.lineage.files)
        assert rows == sorted(self.dropped), f"{rows}, dropped were {sorted(self.dropped)}"
        self.check_numbers([record.job for record in newest.lineage.files], in_order=in_order)
        self.check_rows(newest.lineage, scripted.weights_in(newest.path))

    def check_published_rows(self) -> None:
        """The model has seen each row of its files once, whichever files of this home those are."""
        newest = checkpoint.newest(Home(self.home), checkpoint.Verifier(), lambda text: None)
        assert newest is not None
        self.check_rows(newest.lineage, scripted.weights_in(newest.path))

    def check_numbers(self, jobs: list[int], *, in_order: bool) -> None:
        assert len(set(jobs)) == len(jobs)
        assert max(jobs) <= len(self.dropped) + self.refused
        assert jobs == sorted(jobs) or not in_order

    def check_rows(self, lineage: Lineage, seen: list[list[Any]]) -> None:
        """What the weights say they were given, step by step, is what the lineage says and the log foretold."""
        assert len(seen) == lineage.global_step
        foretold = {int(reaching): int(steps) for steps, reaching in SENTENCE.findall(self.whole_log)}
        at = 0
        for record in lineage.files:
            assert (record.base_step, record.outcome) == (at, "trained")
            steps = seen[record.base_step : record.target_step]
            assert {name for name, _ in steps} == {record.name}
            assert sorted(row for _, rows in steps for row in rows) == list(range(record.rows)), record
            assert foretold[record.target_step] == record.planned_steps == len(steps)
            at = record.target_step
        assert at == lineage.global_step

    def check_no_step_is_lost(self) -> None:
        """What was saved is never trained again; the model may have been rolled back by nobody."""
        saved = 0
        path = self.probe / "steps.txt"
        for line in path.read_text().splitlines() if path.exists() else []:
            what, number = line.split()
            assert int(number) > saved or what == "saved", f"step {number} is done again, {saved} was saved"
            saved = int(number) if what == "saved" else saved

    @property
    def whole_log(self) -> str:
        return "".join(path.read_text() for path in sorted((self.home / "logs").glob("daemon.log*")))

    def check_ledger(self) -> None:
        with contextlib.closing(sqlite3.connect(self.home / "state" / "ledger.sqlite3")) as ledger:
            assert ledger.execute("pragma integrity_check").fetchone() == ("ok",)
            states = dict(ledger.execute("select state, count(*) from job group by state").fetchall())
        expected = {"trained": len(self.dropped), "rejected": self.refused}
        assert states == {state: count for state, count in expected.items() if count}


def worker_of(daemon: int) -> int | None:
    """The worker among the daemon's children, as the kernel knows them."""
    try:
        children = Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()
    except FileNotFoundError:
        return None
    for child in map(int, children):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            seen = Path(f"/proc/{child}")
            if b"--worker" in (seen / "cmdline").read_bytes() or (seen / "comm").read_text() == "worker\n":
                return child
    return None
