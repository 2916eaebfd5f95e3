"""What happens to a simulated home, and what must be true in the end.

python -m tests.drills.histories SEED.NUMBER      one history again, told step by step
"""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import os
import random
import shutil
import sqlite3
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun import checkpoint, compose, disk, missing, requests
from longrun.errors import BadModel, Locked
from longrun.home import Home
from tests.drills.daemons import NAMES, SETTINGS, Watched
from tests.drills.simulation import World
from tests.lab import Lab, numbered, toml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

STEPS = 400
PATIENCE = 30_000  # steps in which all must be done once nothing befalls the home any more
PIECE_BYTES = 500
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, errno.EMFILE)
SOME = {"worker.max_attempts": 1000}  # a worker that is struck often is no reason to give a file up


class History:
    def __init__(self, root: Path, seed: str, tell: Callable[[str], None]) -> None:
        self.dice = random.Random(seed)
        Watched(root, **SOME, **self._settings())  # makes the home
        self.world = World(root, self.dice)
        self.world.hear = self._hear
        self.world.finely = self.dice.choice((0.0, 0.02, 0.1, 0.5))
        self.home = self.world.home
        self._tell = tell
        self._good: collections.Counter[bytes] = collections.Counter()  # all that was dropped whole,
        self._sure: collections.Counter[bytes] = collections.Counter()  # and what no loss of power can take any more
        self._open: collections.Counter[bytes] = collections.Counter()  # what is being written
        self._torn: list[bytes] = []  # what was, when the power failed
        # Of some kinds much: few histories see all, and each sees its kinds meet often.
        some = self.dice.choice((0.15, 0.4, 0.8))
        self._befalls = [self.drop_whole, *(what for what in self._what_befalls() if self.dice.random() < some)]
        self._dropped = 0
        self._reported = 0  # saved up to this step, people were told
        self._trained: set[int] = set()  # jobs that people were told are trained
        self._buried: set[str] = set()  # lineages of models that were removed
        self._removed = self._forgotten = False
        self.happened: collections.Counter[str] = collections.Counter()

    # -- living

    def live(self) -> None:
        """Some steps in which anything may befall the home, and then as many as it needs to get over it."""
        likely = self.dice.choice((0.02, 0.05, 0.2))
        self.world.install()
        for _ in range(STEPS):
            if not self.world.living("daemon") and self.dice.random() < 0.3:
                self._start()
            if self.dice.random() < likely:
                self._befall(self.dice.choice(self._befalls))
            self._step()
        self._recover()
        for task in self.world.living():
            task.kill()
        self.world.disk.trouble = None
        self._judge()

    def _step(self) -> None:
        for task in self.world.step():
            if task.error is not None and not task.dead:
                self._excuse(task)

    def _start(self, *, drain: bool = False) -> Any:
        self._tell("a daemon starts")
        return self.world.start("daemon", lambda: compose.run(self.home, {}, drain=drain))

    def _excuse(self, task: Any) -> None:
        """Who may end so: whom the disk refused something, and who came second."""
        self._tell(f"{task.name} ended: {task.error!r}")
        if isinstance(task.error, Locked) and task.name == "daemon":
            return
        if task.name == "user":
            return  # his command failed, and he saw it
        if isinstance(task.error, OSError) and task.error.errno in ERRORS and self.happened["trouble"]:
            return
        raise AssertionError(f"{task.name} ended by {task.error!r}") from task.error

    def _hear(self, facts: dict[str, Any]) -> None:
        self._tell(f"    {facts['event']}: {facts['message']}")
        if facts["event"] == "trained":
            # Once more it is told of a file that was being taken back when the daemon died: of a model before this one.
            news = facts["job"] not in self._trained
            self._trained.add(facts["job"])
        if facts["event"] == "saved" or (facts["event"] == "trained" and news):
            self._reported = max(self._reported, facts["global_step"])
        elif facts["event"] == "model removed":
            self._reported = 0
        elif facts["event"] == "resume":
            step = facts["global_step"]
            assert step >= self._reported, f"{self._reported} was reported, and {step} is left"

    # -- what befalls it

    def _what_befalls(self) -> list[Callable[[], None]]:
        drops = [self.drop_whole, self.drop_slowly, self.drop_bad]
        deaths = [self.kill_daemon, self.kill_daemon_alone, self.kill_worker, self.kill_preparer, self.kill_user]
        operators = [self.pause, self.stop, self.signal, self.start_second, self.edit, self.ring, self.remove_inbox]
        disks = [self.trouble, self.lose_power]
        return [*drops, *drops, *deaths, self.hang_worker, *operators, *disks, self.remove_model, self.take_back]

    def _befall(self, what: Callable[[], None]) -> None:
        self.happened[what.__name__] += 1
        self._tell(f"{self.world.now:.3f} {what.__name__}")
        what()

    def _ask(self, body: Callable[[], Any]) -> None:
        self.world.start("user", body)

    def _file(self) -> tuple[Path, bytes]:
        """A name in the inbox that nobody has used yet, and rows that perhaps somebody has dropped before.

        Not where a model may be removed: what is dropped again after its loss makes up for it.
        """
        self._dropped += 1
        name, rows = self.dice.choice(NAMES), self.dice.choice((1, 7, 8, 9, 37))
        stem = f"{name}-{self._dropped}" if self.remove_model in self._befalls else name
        content = "".join(json.dumps(row) + "\n" for row in numbered(stem, rows)).encode()
        return self.home.inbox / f"{name}-{self._dropped}.jsonl", content

    def drop_whole(self) -> None:
        """Under its name when it is whole, as cp to a hidden name and a link do it."""
        place, content = self._file()

        def drop() -> None:
            aside = place.with_name(f".{place.name}.tmp")
            with aside.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            self._good[content] += 1
            os.link(aside, place)
            disk.sync_folder(self.home.inbox)
            self._sure[content] += 1
            aside.unlink()

        self._ask(drop)

    def drop_slowly(self) -> None:
        """In pieces under its name; who is killed meanwhile leaves a last line that is none."""
        (place, content), pause_s = self._file(), self.dice.choice((0.01, 0.3, 2.0))

        def drop() -> None:
            self._open[content] += 1
            with place.open("wb", buffering=0) as file:
                for piece in pieces(content):
                    self._good[content] += content.endswith(piece)  # it is whole when that was written
                    file.write(piece)
                    self.world.sleep(pause_s)
                os.fsync(file.fileno())
                disk.sync_folder(self.home.inbox)
                self._sure[content] += 1
            self._open[content] -= 1

        self._ask(drop)

    def drop_bad(self) -> None:
        place, _ = self._file()
        self._ask(lambda: place.write_bytes(b'{"messages": [}\n'))

    def kill_daemon(self) -> None:
        self.world.kill_daemon()

    def kill_daemon_alone(self) -> None:
        """Its worker notices later."""
        self.world.kill_daemon(children=False)

    def kill_worker(self) -> None:
        for task in self.world.living("worker"):
            task.kill()

    def kill_preparer(self) -> None:
        for task in self.world.living("preparer"):
            task.kill()

    def hang_worker(self) -> None:
        for task in self.world.living("worker"):
            task.hung = True

    def kill_user(self) -> None:
        for task in self.world.living("user"):
            task.kill()

    def pause(self) -> None:
        paused = requests.pending(self.home, requests.PAUSE) is not None
        change = requests.clear if paused else requests.make
        self._ask(lambda: change(self.home, requests.PAUSE))

    def stop(self) -> None:
        self._ask(lambda: requests.make(self.home, requests.STOP, now=self.dice.random() < 0.5))

    def signal(self) -> None:
        for daemon in self.world.daemons():
            daemon.count_signal()

    def start_second(self) -> None:
        if self.world.living("daemon"):
            self._start()

    def ring(self) -> None:
        for daemon in self.world.daemons():
            daemon._ring()

    def remove_inbox(self) -> None:
        """When it is empty; the daemon makes it anew."""
        self._ask(lambda: self.home.inbox.rmdir())

    def edit(self) -> None:
        """Another batch size and other moments of saving, from the next file on."""
        text = toml(SETTINGS | SOME | self._settings())
        self._ask(lambda: disk.write_file(self.home.settings, text.encode()))

    def _settings(self) -> dict[str, Any]:
        return {
            "train.batch_size": self.dice.choice((2, 4, 8)),
            "train.save_steps": self.dice.choice((1, 3, 10)),
            "train.save_total_limit": self.dice.choice((2, 3)),
        }

    def trouble(self) -> None:
        """The disk refuses some calls, or all, for a while."""
        if self.world.disk.trouble is None:
            self.world.disk.trouble = (self.dice.choice(ERRORS), self.dice.choice((0.01, 0.1, 1.0)))
        else:
            self.world.disk.trouble = None

    def lose_power(self) -> None:
        self.world.lose_power()
        self._buried.clear()  # a removal is not synced
        self._torn += self._open
        self._open.clear()
        ledgers = self.world.ledgers
        found = self.dice.choice((None, ledgers[-1], ledgers[-1], self.dice.choice(ledgers))) if ledgers else None
        self._forgotten |= bool(ledgers) and found is not ledgers[-1]
        if found is not None and self.home.state.is_dir():
            self.home.ledger.write_bytes(found)
        self.world.ledgers = [found] if found else []

    def remove_model(self) -> None:
        self._removed = True

        def remove() -> None:
            self._reported = 0
            there = self._lineage
            shutil.rmtree(self.home.model, ignore_errors=True)
            if there and not self.home.model.exists():
                self._buried.add(there)
            self._reported = 0

        self._ask(remove)

    def take_back(self) -> None:
        def take() -> None:
            with contextlib.suppress(BadModel):
                lost = [found.job.number for found in missing.look(self.home) if found.file]
                if lost:
                    requests.make(self.home, requests.RETRY, jobs=lost)

        if self.home.ledger.exists():
            self._ask(take)

    # -- the end

    def _recover(self) -> None:
        """Nothing befalls the home any more, and people take back what they asked for."""
        self._tell("recovery")
        self.world.disk.trouble = None
        for task in self.world.living("worker"):
            if task.hung and task.parent and task.parent.over:
                task.kill()  # as the daemon that waits for it says
        self._until(lambda: not self.world.living("user"))
        requests.clear(self.home, requests.PAUSE)
        asked: set[Any] = set()
        while self.world.living("daemon"):
            for daemon in self.world.daemons():
                if daemon not in asked:
                    daemon.count_signal()
                asked.add(daemon)
            self._until(lambda: not asked.issuperset(self.world.daemons()) or not self.world.living("daemon"))
        if self._drain() and self._removed:
            self.remove_model()  # as the daemon says: of a removal that was cut off nobody knows what it was to be
            self._until(lambda: not self.world.living("user"))
            self._drain()
        if missing.jobs(self.home):
            self.take_back()
            self._until(lambda: not self.world.living("user"))
            self._drain()

    def _drain(self) -> bool:
        """Whether the daemon could not go on from the model."""
        daemon, told = self._start(drain=True), len(self.world.said)
        self._until(lambda: daemon.over)
        return any("cannot go on from" in facts["message"] for facts in self.world.said[told:])

    def _until(self, what: Callable[[], bool]) -> None:
        for _ in range(PATIENCE):
            if what():
                return
            self._step()
        raise AssertionError(f"not over after {PATIENCE} steps: {[task.name for task in self.world.living()]}")

    @property
    def _lineage(self) -> str:
        with contextlib.suppress(BadModel):
            there = missing.published_lineage(self.home)
            return there.lineage if there else ""
        return ""

    def _judge(self) -> None:
        """Each file is in one place, each row was trained once, and what was said came true."""
        names = {path.name: path.read_bytes() for path in self.home.trained.glob("*.jsonl")}
        trained = collections.Counter(names.values())
        for content in trained - self._good:
            assert any(whole.startswith(content) for whole in self._torn), "half a file is trained, or one twice"
        lost = self._sure - trained
        assert not lost, f"{lost.total()} files are lost"
        refused = [path for path in self.home.rejected.iterdir() if path.name.endswith(".jsonl")]
        assert not [path.name for path in refused if path.read_bytes() in self._good], "a good file is rejected"
        left = {path.name for path in self.home.inbox.glob("*") if not path.name.endswith(".tmp")}
        assert not left, f"in the inbox: {left}"
        assert not list(self.home.jobs.iterdir()), "a job's folder is left"
        assert self._lineage not in self._buried, "a removed model has come back"
        rows = {name: content.count(b"\n") for name, content in names.items()}
        Judged(self.home.root, self.world.said, rows, complete=not (self._removed and self._forgotten)).judge()


class Judged(Watched):
    """The model and the ledger, held against the files that are trained and what was said."""

    def __init__(self, home: Path, said: list[dict[str, Any]], rows: dict[str, int], *, complete: bool) -> None:
        Lab.__init__(self, home, fresh=False)
        self._said = "\n".join(facts["message"] for facts in said)
        self._rows, self._complete = rows, complete

    @property
    def whole_log(self) -> str:
        return self._said

    def judge(self) -> None:
        self.dropped = list(self._rows.values())
        if not self._complete:  # what an older ledger does not know, and the removed model had, nobody knows
            newest = checkpoint.newest(Home(self.home), checkpoint.Verifier(), lambda text: None)
            self.dropped = [record.rows for record in newest.lineage.files] if newest else []
        self.check_model(in_order=False)
        with contextlib.closing(sqlite3.connect(self.home / "state" / "ledger.sqlite3")) as ledger:
            known = {os.fsdecode(name) for (name,) in ledger.execute("select name from job where state = 'trained'")}
        assert known <= self._rows.keys(), known - self._rows.keys()
        assert known == self._rows.keys() or not self._complete, self._rows.keys() - known

    def check_numbers(self, jobs: list[int], *, in_order: bool) -> None:
        assert len(set(jobs)) == len(jobs)


def pieces(content: bytes) -> Iterator[bytes]:
    """Cut where the file would not end well: in no case before or after the end of a line."""
    start = 0
    while start < len(content):
        end = start + PIECE_BYTES
        while end < len(content) and b"\n" in content[end - 1 : end + 1]:
            end -= 1
        yield content[start:end]
        start = end


def live(seed: str, tell: Callable[[str], None] = lambda text: None) -> dict[str, int]:
    """A history; AssertionError when a promise was broken in it. What happened, and how many steps it had."""
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix="longrun-history-") as folder,
        Path(os.devnull).open("w") as nothing,
        contextlib.redirect_stderr(nothing),
    ):
        history = History(Path(folder) / "home", seed, tell)
        history.live()
    return {"steps": history.world.steps, **history.happened}


if __name__ == "__main__":
    live(sys.argv[1], lambda text: sys.stdout.writelines((text, "\n")))
