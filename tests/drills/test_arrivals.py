"""Files that come in thousands, slowly, or half; an inbox that goes away; a watcher that dies: all is taken, whole."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time

from tests.drills.campaign import FULL
from tests.drills.daemons import Watched
from tests.lab import numbered

MANY = 10_000 if FULL else 300
QUEUED_WITHIN_S = 10.0
HOW_MANY_COME = ["mv", "cp", *(["rsync"] if shutil.which("rsync") else [])]


def test_thousands_at_once_are_all_taken(campaign, quick):
    def attempt(how, dice):
        lab = Watched(quick / how)
        try:
            source = lab.home / "source"
            source.mkdir()
            for number in range(MANY):
                (source / f"{number:05d}.jsonl").write_text(json.dumps({"text": f"{number}"}) + "\n")
            lab.command("pause")
            daemon = lab.start()
            lab.wait_until(lambda: "Longrun watches" in lab.log)
            script = {"mv": "mv", "cp": "cp", "rsync": "rsync"}[how] + f" -t {shlex.quote(str(lab.inbox))}"
            if how == "rsync":
                script = f"sh -c 'rsync \"$@\" {shlex.quote(str(lab.inbox))}/' sh"
            subprocess.run(f"find . -name '*.jsonl' -print0 | xargs -0 {script}", shell=True, cwd=source, check=True)
            lab.wait_until(lambda: queued(lab) == MANY, QUEUED_WITHIN_S)
            assert lab.names("inbox") == set()
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(60) == 0
            with contextlib.closing(sqlite3.connect(lab.home / "state" / "ledger.sqlite3")) as ledger:
                names = [os.fsdecode(name) for (name,) in ledger.execute("select name from job")]
            assert sorted(names) == [f"{number:05d}.jsonl" for number in range(MANY)]
            campaign.note("files", MANY)
        finally:
            lab.close()
            shutil.rmtree(lab.home, ignore_errors=True)

    campaign.run(f"7: {MANY} files at once are queued within 10 s", HOW_MANY_COME, attempt, small=1)


def queued(lab):
    path = lab.home / "state" / "ledger.sqlite3"
    if not path.exists():
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as ledger:
        return ledger.execute("select count(*) from job").fetchone()[0]


def removed(lab):
    shutil.rmtree(lab.inbox, ignore_errors=True)


def replaced(lab):
    lab.inbox.rename(lab.home / f"former-{time.monotonic_ns()}")
    lab.inbox.mkdir(exist_ok=True)  # unless the daemon was quicker


def linked(lab):
    elsewhere = lab.home / f"elsewhere-{time.monotonic_ns()}"
    elsewhere.mkdir()
    if lab.inbox.is_symlink():
        lab.inbox.unlink()
    else:
        lab.inbox.rename(lab.home / f"former-{time.monotonic_ns()}")
    lab.inbox.symlink_to(elsewhere)


def not_a_folder(lab):
    """The daemon tells so, and waits for a folder."""
    said = lab.log.count("cannot take files from")
    lab.inbox.rename(lab.home / f"former-{time.monotonic_ns()}")
    lab.inbox.write_text("")
    lab.wait_until(lambda: lab.log.count("cannot take files from") > said)
    lab.inbox.unlink()
    lab.wait_until(lambda: lab.log.count("solved: files can be taken") > said)


def replaced_by_a_full_one(lab):
    """What is in the folder that takes the inbox's place has arrived, too."""
    fresh = lab.home / "fresh"
    fresh.mkdir()
    content = "".join(json.dumps(row) + "\n" for row in numbered("brought", 9))
    (fresh / "brought.jsonl").write_text(content)
    lab.inbox.rename(lab.home / f"former-{time.monotonic_ns()}")
    fresh.rename(lab.inbox)
    lab.dropped.append(9)


DEATHS = [
    {"at": "watchdog.observers.api:BaseObserver.dispatch_events", "role": "daemon", "do": "EIO", "nth": nth}
    for nth in (2, 3, 5)
]
NO_INSTANCE = [{"at": "watchdog.observers.api:BaseObserver.start", "role": "daemon", "do": "EMFILE", "nth": 0}]
TROUBLES = {
    "the inbox is removed": (removed, []),
    "the inbox is renamed and made again": (replaced, []),
    "the inbox becomes a link": (linked, []),
    "the inbox is no folder": (not_a_folder, []),
    "the inbox is replaced by a full one": (replaced_by_a_full_one, []),
    "the watcher dies of an exception": (lambda lab: None, DEATHS),
    "there are no inotify instances": (lambda lab: None, NO_INSTANCE),
}


def test_whatever_befalls_inbox_and_watcher_all_is_trained(campaign, quick):
    def attempt(what, dice):
        befall, faults = TROUBLES[what]
        lab = Watched(quick / "troubled", **{"inbox.scan_s": dice.choice((0.1, 1.0))})
        try:
            daemon = lab.start(faults=faults)
            lab.wait_until(lambda: "Longrun watches" in lab.log)
            for number in range(4):
                lab.drop_rows(f"file-{number}", dice.choice((1, 9, 37)))
                lab.wait_until(lambda: not list(lab.inbox.glob("*.jsonl")))  # what is in it when it goes, goes with it
                befall(lab)
                lab.wait_until(lab.inbox.exists)
            lab.wait_until(lambda: len(lab.names("trained")) == len(lab.dropped))
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(60) == 0, lab.log
            lab.check()
            assert lab.log.count("cannot watch the inbox") == (faults is NO_INSTANCE)
        finally:
            lab.close()
            shutil.rmtree(lab.home, ignore_errors=True)

    campaign.run("7: whatever befalls inbox and watcher, all is trained", list(TROUBLES), attempt, small=2)


# -- writers

LIVES, WRITERS_A_LIFE = 50, 20 if FULL else 6
SETTLE_S = 0.3
# Each copies {source} to {target}; what needs pauses makes them longer than a file needs to settle.
HALVES = "import time; data = open({source!r}, 'rb').read(); at = {at}; out = open({target!r}, 'wb', buffering=0); "
COPIES = {
    "cp": "cp {source} {target}",
    "dd": "(dd bs={at} count=1; sleep 0.7; dd bs=1M) < {source} > {target} 2> /dev/null",
    "a stall": "{python} -c {stall}",
    "write, then rename": "cp {source} {target}.part && sleep 0.4 && mv {target}.part {target}",
    "a rename from elsewhere": "mv {source} {target}",
    "append by append": "(head -n {line} {source}; sleep 0.6; tail -n +{next} {source}) > {target}",
    "a stall, then killed": "{python} -c {stall}",
    "killed amid rows": "{python} -c {stall}",
    "killed between rows": "{python} -c {stall}",
}


class Writer(threading.Thread):
    """One who writes a file into the inbox; what must become of it is in `rows` (None: it must be refused)."""

    def __init__(self, lab, name, how, dice):
        super().__init__(daemon=True)
        self.lab, self.how, self.name_of_file = lab, how, name
        count = dice.choice((2, 9, 40))
        lines = [json.dumps(row).encode() + b"\n" for row in numbered(name, count)]
        self.packed = how in ("cp", "a stall", "a stall, then killed") and dice.random() < 0.3
        content = gzip.compress(b"".join(lines)) if self.packed else b"".join(lines)
        self.target = lab.inbox / (f"{name}.jsonl.gz" if self.packed else f"{name}.jsonl")
        self.source = lab.home / "sources" / self.target.name
        self.source.write_bytes(content)
        line = dice.randrange(1, count)
        at_row = len(b"".join(lines[:line]))
        amid = self.packed or how in ("a stall, then killed", "killed amid rows")
        self.at = dice.randrange(1, len(content) - 1) if self.packed else at_row + (7 if amid else 0)
        self.killed = "killed" in how
        self.rows = count if not self.killed else None if amid else line
        stall = (HALVES + "out.write(data[:at]); time.sleep({pause_s}); out.write(data[at:])").format(
            source=str(self.source), target=str(self.target), at=self.at, pause_s=60 if self.killed else 0.9
        )
        self.script = COPIES[how].format(
            source=shlex.quote(str(self.source)), target=shlex.quote(str(self.target)), at=self.at, line=line,
            next=line + 1, python=sys.executable, stall=shlex.quote(stall),
        )  # fmt: skip
        self.early = ""

    def run(self):
        writer = subprocess.Popen(self.script, shell=True, start_new_session=True)
        while self.killed and not (self.target.exists() and self.target.stat().st_size == self.at):
            time.sleep(0.01)
        if self.killed:
            time.sleep(0.6)  # it holds the file open all the while
        while writer.poll() is None:
            begun = self.target.exists()
            time.sleep(0.02)
            if begun and not self.target.exists() and writer.poll() is None and self.how != "a rename from elsewhere":
                time.sleep(0.1)  # the shell may live on for a moment after it has closed the file
                self.early = f"{self.how}: taken before it was closed" if writer.poll() is None else ""
            if self.killed:
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                    os.killpg(writer.pid, signal.SIGKILL)
        writer.wait()


def test_writers_that_are_slow_stalled_or_killed_cost_no_row(campaign, quick, hand):
    def attempt(life, dice):
        lab = Watched(quick / f"life-{life}", hand=hand, **{"inbox.settle_s": SETTLE_S})
        (lab.home / "sources").mkdir()
        try:
            daemon = lab.start()
            lab.wait_until(lambda: "Longrun watches" in lab.log)
            hows = [dice.choice(list(COPIES)) for _ in range(WRITERS_A_LIFE)]
            writers = [Writer(lab, f"w{number}", how, dice) for number, how in enumerate(hows)]
            for writer in writers:
                writer.start()
                campaign.note("writers")
            for writer in writers:
                writer.join(60)
            assert [writer.early for writer in writers if writer.early] == []
            lab.dropped = [writer.rows for writer in writers if writer.rows is not None]
            lab.refused = len(writers) - len(lab.dropped)
            lab.wait_until(lambda: len(lab.names("trained")) + len(lab.names("rejected")) / 2 == len(writers))
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(60) == 0
            lab.check()
            rows = {record["name"]: record["rows"] for record in lab.lineage["files"]} if lab.dropped else {}
            assert rows == {writer.target.name: writer.rows for writer in writers if writer.rows is not None}
            for path in (lab.home / "rejected").glob("*.reason.json"):
                assert json.loads(path.read_text())["kind"] == "incomplete", path.read_text()
        finally:
            lab.close()

    campaign.run("6: slow, stalled and killed writers cost no row", range(LIVES), attempt, small=1)
