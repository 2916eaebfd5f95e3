"""One home for an hour: files all the while, and at every other of them something befalls it, a folder or a process."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import signal
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.drills.campaign import FULL
from tests.drills.daemons import Watched
from tests.drills.test_arrivals import removed, replaced
from tests.drills.test_input import CONTENTS, file_of
from tests.lab import Lab, numbered

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

FILES, MINUTES = (500, 60) if FULL else (6, 0)
KILLED_UNTIL = {"daemon": FILES // 5, "worker": FILES * 2 // 5}  # files; from there on it lives to the end
WINDOW = 50  # files: the first of a process's life warm it up, the next are compared with the last
GROWTH = 0.02  # of memory and disk, at most
ROWS = (1, 7, 8, 9, 37, 60, 100)
BAD = [name for name, (content, rows) in CONTENTS.items() if not isinstance(rows, int) and len(content) < 20_000]
# What grows with each file by design, or is for a person to clear away.
RECORDS = ("ledger.sqlite3", "ledger.sqlite3-wal", "events.jsonl", "lineage.json")
LEFT_OUT = ("trained", "rejected", "logs", "probe", "stderr.log")
# Real children need their time to start, and memory is theirs to grow.
SETTINGS = {"worker.step_timeout_s": 60.0, "inbox.settle_s": 0.3} if FULL else {"log.progress_s": 0.1}
BOUNDED = ("daemon's memory", "worker's memory", "preparer's memory", "the rest on disk")
ROW = re.compile(r"Say (file-\d+[abc]?)-(\d+)\.")


def test_an_hour_of_files_and_faults_loses_no_row_and_grows_by_nothing(campaign, quick, tmp_path):
    def attempt(_, dice):
        lab = Soaked((tmp_path if FULL else quick) / "home", dice)
        try:
            lab.begin()
            began = time.monotonic()
            for number in range(FILES):
                time.sleep(max(0.0, began + number * 60 * MINUTES / FILES - time.monotonic()))
                lab.one_more(number)
            lab.end()
            lab.check()
            for what, count in lab.befell.items():
                campaign.note(what, count)
            campaign.note("rows", sum(lab.dropped))
            for what, size in lab.grown_a_file().items():
                campaign.note(f"bytes a file: {what}", round(size))
            if FULL:
                compared = lab.compared()
                assert [what for what, *_ in compared] == list(BOUNDED), "a process has not lived long enough"
                assert [ends for ends in compared if ends[2] > ends[1] * (1 + GROWTH)] == []
        finally:
            lab.close()

    campaign.run(
        f"{FILES} files and faults in {MINUTES} minutes lose no row, memory and disk stay", [0], attempt, small=1
    )


class Soaked(Watched):
    """In the full drill its children are the real ones."""

    def __init__(self, home: Path, dice: random.Random) -> None:
        super().__init__(home, **SETTINGS)
        self.dice = dice
        self.befell: collections.Counter[str] = collections.Counter()
        self.deck: list[Callable[[str], None]] = []
        self.samples: list[dict[str, tuple[int, int]]] = []  # after each file: {what: (whose, bytes)}

    def environment(self, faults=None, **extra):
        return Lab.environment(self, faults, **extra) if FULL else super().environment(faults, **extra)

    # -- an hour

    def begin(self) -> None:
        starts = self.whole_log.count("Longrun watches")
        self.daemon = self.start()
        self.wait_until(lambda: self.whole_log.count("Longrun watches") > starts)

    def one_more(self, number: int) -> None:
        """A file comes, something happens, and in the end it is trained."""
        if not FULL or number % 2:
            befall = self._drawn(number)
            self.befell[befall.__name__.replace("_", " ")] += 1
            befall(f"file-{number:04d}")
        else:
            self.drop_rows(f"file-{number:04d}", self.dice.choice(ROWS), packed=self.dice.random() < 0.2)
        self.wait_until(self._all_done)
        self.measure()

    def _drawn(self, number: int) -> Callable[[str], None]:
        """What befalls next: each thing as often as the others, while it may."""
        killed = {"daemon": self.a_kill_of_the_daemon, "worker": self.a_kill_of_the_worker}
        kills = [kill for who, kill in killed.items() if number < KILLED_UNTIL[who]]
        others = [
            *(self.inbox_removed, self.inbox_replaced, self.a_bad_file, self.a_slow_writer, self.a_pause),
            *(self.a_stop_of_the_worker, self.an_edit_of_the_settings, self.three_at_once),
        ]
        if not self.deck:
            self.deck = self.dice.sample([*kills, *others], k=len(kills) + len(others))
        return self.deck.pop()

    def _all_done(self) -> bool:
        done = len(self.names("trained")) == len(self.dropped) and len(self.names("rejected")) == 2 * self.refused
        return done and not any((self.home / "state" / "jobs").iterdir())

    def end(self) -> None:
        self.daemon.send_signal(signal.SIGTERM)
        assert self.daemon.wait(60) in (0, 1), self.log  # 1: it has refused a file

    def _signal_worker(self, number: int) -> None:
        worker = children_of(self.daemon.pid).get("worker")
        with contextlib.suppress(ProcessLookupError):
            if worker:
                os.kill(worker, number)

    # -- what befalls

    def a_kill_of_the_daemon(self, name: str) -> None:
        self.drop_rows(name, self.dice.choice(ROWS))
        time.sleep(self.dice.uniform(0.2, 3.0 if FULL else 0.9))
        self.kill(self.daemon)
        self.begin()

    def a_kill_of_the_worker(self, name: str) -> None:
        self.drop_rows(name, self.dice.choice(ROWS))
        time.sleep(self.dice.uniform(0.2, 3.0 if FULL else 0.9))
        self._signal_worker(signal.SIGKILL)

    def inbox_removed(self, name: str) -> None:
        removed(self)
        self._drop_into_the_new_inbox(name)

    def inbox_replaced(self, name: str) -> None:
        replaced(self)
        self._drop_into_the_new_inbox(name)

    def _drop_into_the_new_inbox(self, name: str) -> None:
        self.wait_until(self.inbox.exists)
        self.drop_rows(name, self.dice.choice(ROWS))

    def a_bad_file(self, name: str) -> None:
        content = self.dice.choice(BAD)
        aside = self.home / "aside"
        aside.write_bytes(CONTENTS[content][0])
        aside.rename(self.inbox / f"{name}-{file_of(content)}")
        self.refused += 1
        self.drop_rows(name, self.dice.choice(ROWS))

    def a_slow_writer(self, name: str) -> None:
        rows = self.dice.choice(ROWS)
        content = "".join(json.dumps(row) + "\n" for row in numbered(name, rows)).encode()
        at = self.dice.randrange(len(content))
        with (self.inbox / f"{name}.jsonl").open("wb", buffering=0) as file:
            file.write(content[:at])
            time.sleep(0.7)
            file.write(content[at:])
        self.dropped.append(rows)

    def a_stop_of_the_worker(self, name: str) -> None:
        self.drop_rows(name, max(ROWS))
        time.sleep(self.dice.uniform(0.2, 1.5 if FULL else 0.9))
        self._signal_worker(signal.SIGSTOP)
        time.sleep(0.5)
        self._signal_worker(signal.SIGCONT)

    def a_pause(self, name: str) -> None:
        self.drop_rows(name, max(ROWS))
        time.sleep(self.dice.uniform(0.0, 1.0))
        assert self.command("pause").returncode == 0
        assert self.command("resume").returncode == 0

    def an_edit_of_the_settings(self, name: str) -> None:
        path = self.home / "longrun.toml"
        rate = self.dice.choice((1e-5, 2e-5, 3e-5))
        text = re.sub(r"\nlearning_rate = .*", "", path.read_text())
        text = text.replace("[train]", f"[train]\nlearning_rate = {rate}")
        aside = self.home / "longrun.toml.new"
        aside.write_text(text)
        aside.rename(path)
        self.drop_rows(name, self.dice.choice(ROWS))

    def three_at_once(self, name: str) -> None:
        for part in "abc":
            self.drop_rows(f"{name}{part}", self.dice.choice(ROWS))

    # -- memory and disk

    def measure(self) -> None:
        """What each process and the disk hold now that nothing is to be done."""
        here = {"daemon": self.daemon.pid, **children_of(self.daemon.pid)}
        found = {f"{role}'s {part}": (pid, size) for role, pid in here.items() for part, size in memory_of(pid).items()}
        for what, size in self._on_disk().items():
            found[f"{what} on disk"] = (0, size)
        self.samples.append(found)
        with (self.probe / "samples.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.time(), "rows": sum(self.dropped), **found}) + "\n")

    def _on_disk(self) -> collections.Counter[str]:
        found: collections.Counter[str] = collections.Counter()
        for path in self.home.rglob("*"):
            parts = path.relative_to(self.home).parts
            if path.is_file() and parts[0] not in LEFT_OUT and not parts[0].startswith("former-"):
                found[path.name if path.name in RECORDS else "the rest"] += path.stat().st_size
            elif path.is_file() and parts[0] == "logs":
                found["logs"] += path.stat().st_size
        return found

    def compared(self) -> list[tuple[str, float, float]]:
        """(what, at first, at last): medians after the first files of the last life, and over its last ones."""
        return [(what, *ends) for what in BOUNDED for ends in self._ends(what)]

    def grown_a_file(self) -> dict[str, float]:
        """Bytes that each thing on disk, or process, grew by with each file of its last life, once it was warm."""
        names = {name for sample in self.samples for name in sample}
        ends = {name: self._ends(name) for name in names}
        lives = {name: len(self._last_life(name)) - 2 * WINDOW for name in names}
        return {name: (found[0][1] - found[0][0]) / lives[name] for name, found in sorted(ends.items()) if found}

    def _ends(self, what: str) -> list[tuple[float, float]]:
        life = self._last_life(what)
        if len(life) < 3 * WINDOW:
            return []
        return [(statistics.median(life[WINDOW : 2 * WINDOW]), statistics.median(life[-WINDOW:]))]

    def _last_life(self, what: str) -> list[int]:
        found = [sample[what] for sample in self.samples if what in sample]
        return [size for whose, size in found if whose == found[-1][0]]

    # -- rows

    def check_model(self, *, in_order: bool = True) -> None:
        """Of the real children it is the probe that tells which rows the model was given."""
        if not FULL:
            super().check_model(in_order=in_order)
            return
        lineage = self.lineage
        assert sorted(record["rows"] for record in lineage["files"]) == sorted(self.dropped)
        assert {record["outcome"] for record in lineage["files"]} == {"trained"}
        self.check_numbers([record["job"] for record in lineage["files"]], in_order=in_order)
        assert sum(record["planned_steps"] for record in lineage["files"]) == self.global_step == lineage["global_step"]
        received = collections.Counter(
            row for texts in self.steps_received().values() for text in texts for row in ROW.findall(text)
        )
        expected = {
            (record["name"].partition(".")[0], f"{row:04d}"): 1
            for record in lineage["files"]
            for row in range(1, record["rows"] + 1)
        }
        assert received == expected


def children_of(daemon: int) -> dict[str, int]:
    """{role: pid} of the daemon's children, as the kernel knows them."""
    found = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for child in map(int, Path(f"/proc/{daemon}/task/{daemon}/children").read_text().split()):
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            found |= {role: child for role in ("worker", "preparer") if f"--{role}".encode() in words}
    return found


def memory_of(pid: int) -> dict[str, int]:
    """Bytes, from the kernel: what is resident, and what of it is nobody else's and no file's (proc(5))."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except (FileNotFoundError, ProcessLookupError):
        return {}
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return {"memory": found["Rss"], "own memory": found["Anonymous"]}
