"""Scheduled backups with a program in the manager's place that says, complains and ends as it is told."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from longrun import scheduled
from longrun.config import BackupSettings, Settings, WorkerSettings
from longrun.errors import Locked
from longrun.ledger import Ledger
from longrun.scheduled import Scheduled
from tests.unit.builders import lineage_at

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from longrun.home import Home

PROGRAM = """
import json, pathlib, sys, time
here = pathlib.Path(__file__).parent
command = sys.argv[1]
with (here / "asked").open("a") as asked:
    asked.write(" ".join(sys.argv[1:3]) + "\\n")
orders = json.loads((here / "orders.json").read_text())
out, err, code, wait_s = orders.get(command, ["", "", 0, 0])
time.sleep(wait_s)
sys.stdout.buffer.write(out.encode("latin-1"))
sys.stderr.buffer.write(err.encode("latin-1"))
answers = {"backup": {"id": "made", "global_step": 5, "new_bytes": 1, "seconds": 0.1}, "export": {"target": "URL"}}
if not code:
    print(json.dumps(answers.get(command, {})))
sys.exit(code)
"""


class Told:
    """A context that remembers what it was told."""

    def __init__(self, home: Home, **settings: Any) -> None:
        self.home, self.ledger = home, Ledger.open(home.ledger)
        self.settings = Settings(backup=BackupSettings(**settings), worker=WorkerSettings(retry_s=1000.0))
        self.said: list[str] = []
        self.problems: dict[str, str] = {}
        self.held = 0

    def say(self, event: str, text: str, **facts: Any) -> None:
        self.said.append(text)

    def hold_model(self, what: str) -> None:
        assert what == scheduled.BACKUP
        self.held += 1

    def let_go_model(self, what: str) -> None:
        assert what == scheduled.BACKUP
        self.held -= 1

    def problem(self, kind: str, text: str) -> None:
        self.problems[kind] = text

    def solved(self, kind: str) -> None:
        self.problems.pop(kind, None)


@pytest.fixture
def told(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Told]:
    (tmp_path / "manager.py").write_text(PROGRAM)
    (tmp_path / "orders.json").write_text("{}")
    monkeypatch.setattr(scheduled, "PROGRAM", tmp_path / "manager.py")
    monkeypatch.setattr(scheduled, "NICE", ())
    (home.root / "backups" / "backups" / "made").mkdir(parents=True)
    context = Told(home, after_files=1, target="memory://there")
    yield context
    assert context.held == 0
    context.ledger.close()


def newest(files: int = 1) -> Any:
    return SimpleNamespace(digest=f"digest-{files}", lineage=SimpleNamespace(lineage="one", files=[None] * files))


def run(told: Told, backups: Scheduled, model: Any) -> list[str]:
    """Tick until nothing is under way; the commands that were given, each with its first word."""
    backups._not_before.clear()  # as if the time to try again had come
    for _ in range(1000):
        backups.tick(time.monotonic(), model, between_files=True)
        if not backups.busy:
            break
        time.sleep(0.01)
    asked = scheduled.PROGRAM.with_name("asked")
    lines = asked.read_text().splitlines() if asked.exists() else []
    asked.unlink(missing_ok=True)
    return lines


def order(**orders: list[Any]) -> None:
    scheduled.PROGRAM.with_name("orders.json").write_text(json.dumps(orders))


def test_a_backup_is_made_copied_and_the_old_ones_pruned(told: Told) -> None:
    backups = Scheduled(told)  # type: ignore[arg-type]
    assert run(told, backups, newest()) == [f"backup {told.home.model}", "export made", "prune --execute"]
    assert told.said == [
        "backup made is complete and verified: global step 5, 0.0 MB newly stored in 0.1 s",
        "backup made is in URL, verified",
    ]
    assert run(told, backups, newest()) == []  # the same model is backed up once


@pytest.mark.parametrize(("after_files", "trained", "due"), [(1, 1, True), (2, 1, False), (2, 2, True), (0, 9, False)])
def test_a_backup_is_due_after_so_many_files(told: Told, after_files: int, trained: int, due: bool) -> None:
    told.settings = Settings(backup=BackupSettings(after_files=after_files))
    assert Scheduled(told).is_due(newest(trained)) is due  # type: ignore[arg-type]


def test_a_backup_is_due_when_the_last_is_old(told: Told) -> None:
    told.settings = Settings(backup=BackupSettings(after_hours=2.0))
    backups = Scheduled(told)  # type: ignore[arg-type]
    a_clock_that_was_ahead_s = -3e8
    for age_s, due in ((7100, False), (7300, True), (a_clock_that_was_ahead_s, True)):
        fact = {"at": time.time() - age_s, "digest": "another", "lineage": "one", "files": 1}
        told.ledger.set_fact(scheduled.FACT, json.dumps(fact))
        assert backups.is_due(newest()) is due


def test_an_unchanged_model_is_not_backed_up_again_however_old_the_last_one_is(told: Told) -> None:
    told.settings = Settings(backup=BackupSettings(after_hours=2.0))
    fact = {"at": time.time() - 1e6, "digest": newest().digest, "lineage": "one", "files": 1}
    told.ledger.set_fact(scheduled.FACT, json.dumps(fact))
    assert not Scheduled(told).is_due(newest())  # type: ignore[arg-type]


def test_nothing_begins_while_a_file_is_trained(told: Told) -> None:
    backups = Scheduled(told)  # type: ignore[arg-type]
    backups.tick(time.monotonic(), newest(), between_files=False)
    assert not backups.busy


def test_a_backup_waits_for_whoever_replaces_the_model(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    backups = Scheduled(told)  # type: ignore[arg-type]

    def held(what: str) -> None:
        raise Locked("current_model is held by restore")

    with monkeypatch.context() as patched:
        patched.setattr(told, "hold_model", held)
        backups.tick(time.monotonic(), newest(), between_files=True)
        assert (backups.busy, told.problems) == (False, {})
    assert run(told, backups, newest()) == [f"backup {told.home.model}", "export made", "prune --execute"]
    assert told.held == 0


def test_a_failed_backup_is_a_problem_until_one_succeeds(told: Told) -> None:
    backups = Scheduled(told)  # type: ignore[arg-type]
    order(backup=["", "warning\nmanager.py: no room", 1, 0])
    assert run(told, backups, newest())[0] == f"backup {told.home.model}"
    assert told.problems == {"scheduled backup": "the scheduled backup failed: no room"}
    order()
    assert run(told, backups, newest())[-1] == "prune --execute"
    assert told.problems == {}


def test_a_copy_that_failed_is_made_later_and_pruning_does_not_wait_for_it(told: Told) -> None:
    backups = Scheduled(told)  # type: ignore[arg-type]
    order(export=["", "no network", 1, 0])
    assert run(told, backups, newest())[:3] == [f"backup {told.home.model}", "export made", "prune --execute"]
    assert told.problems == {"scheduled export": "copying the scheduled backup to [backup] target failed: no network"}
    order()
    again = Scheduled(told)  # type: ignore[arg-type]  # after a restart
    assert run(told, again, newest()) == ["export made"]
    assert told.problems == {}


def test_a_failed_prune_does_not_keep_backups_from_being_copied(told: Told) -> None:
    backups = Scheduled(told)  # type: ignore[arg-type]
    order(prune=["", "a manifest is damaged", 1, 0])
    assert "export made" in run(told, backups, newest())
    assert told.problems == {"scheduled prune": "pruning old backups failed: a manifest is damaged"}


@pytest.mark.parametrize(
    ("said", "complained", "code", "why"),
    [
        ("a library greets\n", "", 0, None),
        ("", "\xff\xfe" * 100_000, 1, "\N{REPLACEMENT CHARACTER}"),
        ("x" * 300_000, "y" * 300_000, 0, None),
        ("", "", 9, "exit code 9"),
        ("{no json", "", 0, "what it said cannot be read"),
    ],
)
def test_whatever_the_program_says_the_daemon_lives(
    told: Told, said: str, complained: str, code: int, why: str | None
) -> None:
    backups = Scheduled(told)  # type: ignore[arg-type]
    order(backup=[said, complained, code, 0])
    run(told, backups, newest())
    assert why is None or why in told.problems["scheduled backup"]
    assert (why is None) == (told.problems == {})


def test_a_program_that_cannot_be_started_is_a_problem(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduled, "NICE", ("/no/such/program",))
    backups = Scheduled(told)  # type: ignore[arg-type]
    backups.tick(time.monotonic(), newest(), between_files=True)
    assert not backups.busy
    assert "No such file" in told.problems["scheduled backup"]


def test_a_program_that_hangs_is_ended(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduled, "LIMIT_S", 0.0)
    backups = Scheduled(told)  # type: ignore[arg-type]
    order(backup=["", "", 0, 60])
    run(told, backups, newest())
    assert "the scheduled backup failed: exit code -9" in told.problems["scheduled backup"]


def test_leaving_ends_what_is_under_way(told: Told) -> None:
    backups = Scheduled(told)  # type: ignore[arg-type]
    order(backup=["", "", 0, 60])
    backups.tick(time.monotonic(), newest(), between_files=True)
    assert backups.busy
    assert told.held == 1  # nobody restores another model before this one is held still
    backups.abandon()
    assert not backups.busy
    backups.abandon()
    assert backups.is_due(newest())


def test_a_backup_that_was_pruned_is_not_copied_any_more(told: Told) -> None:
    backups = Scheduled(told)  # type: ignore[arg-type]
    order(export=["", "no network", 1, 0])
    run(told, backups, newest())
    (told.home.root / "backups" / "backups" / "made").rmdir()
    assert run(told, backups, newest()) == []


def test_the_lineage_decides_what_files_are_new(told: Told) -> None:
    backups = Scheduled(told)  # type: ignore[arg-type]
    told.settings = Settings(backup=BackupSettings(after_files=3))
    other = {"at": time.time(), "digest": "another", "lineage": lineage_at(1, "two").lineage, "files": 3}
    told.ledger.set_fact(scheduled.FACT, json.dumps(other))
    assert backups.is_due(newest(3))  # of another model: all are new
