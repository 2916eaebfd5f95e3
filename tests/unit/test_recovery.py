from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from longrun import archive, checkpoint, requests
from longrun.context import Context
from longrun.job import JobState
from longrun.ledger import Ledger
from longrun.lineage import InProgress
from longrun.notify import Notifier
from longrun.recovery import SETTLE_S, Recovery
from tests.unit.builders import content_of, job, lineage_at, plan_of
from tests.unit.test_missing import HOME, model_with

if TYPE_CHECKING:
    from collections.abc import Iterator

    from longrun.home import Home

SHA256 = {name: archive.disk.hashlib.sha256(name.encode()).hexdigest() for name in "abc"}


class Told:
    """A journal that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []

    def say(self, event: str, text: str, *, level: str = "info", **facts: Any) -> None:
        self.events.append((event, facts.get("files", facts.get("file"))))


@pytest.fixture
def context(home: Home) -> Iterator[Context]:
    """Jobs 1, 2 and 3 trained a, b and c, and the model has them all."""
    ledger = Ledger.open(home.ledger)
    ledger.claim(
        [
            job(number, JobState.TRAINED, name=f"{name}.jsonl", sha256=SHA256[name], rows=8)
            for number, name in enumerate("abc", start=1)
        ]
    )
    for name in "abc":
        (home.trained / f"{name}.jsonl").write_bytes(name.encode())
    put_model(home, "abc")
    yield Context(
        home=home,
        home_id=HOME,
        settings=None,  # type: ignore[arg-type]
        flags={},
        ledger=ledger,
        journal=Told(),  # type: ignore[arg-type]
        verifier=checkpoint.Verifier(),
        notifier=Notifier(),
        lock=None,  # type: ignore[arg-type]
    )
    ledger.close()


def put_model(home: Home, names: str) -> None:
    home.model.mkdir(exist_ok=True)
    lineage = model_with(*(("abc".index(name) + 1, SHA256[name]) for name in names))
    aside = home.root / "another"
    aside.write_text(lineage.to_json())
    aside.rename(home.model / "lineage.json")


def told(context: Context) -> list[tuple[str, Any]]:
    return context.journal.events  # type: ignore[attr-defined,no-any-return]


def missing(context: Context) -> list[str]:
    return [found.name for found in context.missing]


# -- looking


def test_another_model_is_judged_when_it_is_still(context: Context) -> None:
    recovery = Recovery(context)
    recovery.look(0.0, idle=True)
    assert told(context) == []
    put_model(context.home, "a")
    recovery.look(10.0, idle=True)
    put_model(context.home, "ab")
    recovery.look(10.0 + SETTLE_S, idle=True)
    assert told(context) == []
    for now in (20.0, 30.0):
        recovery.look(now, idle=True)
    assert missing(context) == ["c.jsonl"]
    assert told(context) == [("another model", None), ("missing", ["c.jsonl"])]


def test_a_model_deleted_right_after_the_start_is_missed(context: Context) -> None:
    recovery = Recovery(context)
    recovery.look(0.0, idle=True)
    (context.home.model / "lineage.json").unlink()
    for now in (1.0, 9.0):
        recovery.look(now, idle=True)
    assert missing(context) == ["a.jsonl", "b.jsonl", "c.jsonl"]


def test_only_what_is_newly_missing_is_told(context: Context) -> None:
    recovery = Recovery(context)
    for names in ("ab", "ab", "a", "abc", "ab"):
        put_model(context.home, names)
        context.missing_unsure = True
        recovery.look(0.0, idle=False)
    assert told(context) == [("missing", ["c.jsonl"]), ("missing", ["b.jsonl"]), ("missing", ["c.jsonl"])]


def test_nothing_is_looked_at_while_a_run_commits(context: Context) -> None:
    recovery = Recovery(context)
    recovery.look(0.0, idle=False)
    put_model(context.home, "a")
    for now in (5.0, 50.0):
        recovery.look(now, idle=False)
    assert missing(context) == []


def test_a_lineage_that_is_half_there_says_nothing(context: Context) -> None:
    (context.home.model / "lineage.json").write_text("{")
    recovery = Recovery(context)
    recovery.look(0.0, idle=True)
    requests.make(context.home, requests.RETRY)
    assert not recovery.take_back()
    assert told(context) == []
    assert requests.pending(context.home, requests.RETRY) is not None


# -- taking back


def states(context: Context) -> list[str]:
    return [found.state.value for found in context.ledger.in_state(*JobState)]


def test_what_was_asked_for_is_in_the_queue_again_under_its_number(context: Context) -> None:
    put_model(context.home, "")
    requests.make(context.home, requests.RETRY, jobs=[1, 3])
    recovery = Recovery(context)
    recovery.look(0.0, idle=True)
    assert not recovery.take_back()
    assert states(context) == ["claimed", "trained", "claimed"]
    assert content_of(context.home.jobs) == {"000001/claimed/a.jsonl": b"a", "000003/claimed/c.jsonl": b"c"}
    assert requests.pending(context.home, requests.RETRY) is None
    recovery.look(0.0, idle=True)
    assert missing(context) == ["b.jsonl"]
    assert not recovery.take_back()


def test_what_the_model_has_by_now_is_not_taken_back(context: Context) -> None:
    requests.make(context.home, requests.RETRY, jobs=[1, 2, 3])
    put_model(context.home, "ab")
    Recovery(context).take_back()
    assert states(context) == ["trained", "trained", "claimed"]


def test_a_request_that_cannot_be_read_takes_back_all(context: Context) -> None:
    (context.home.requests / requests.RETRY).write_bytes(b"")
    put_model(context.home, "a")
    Recovery(context).take_back()
    assert states(context) == ["trained", "claimed", "claimed"]


def test_a_file_that_is_gone_is_told_and_the_others_are_taken_back(context: Context) -> None:
    put_model(context.home, "a")
    requests.make(context.home, requests.RETRY, jobs=[2, 3])
    os.truncate(context.home.trained / "b.jsonl", 0)
    assert not Recovery(context).take_back()
    assert told(context) == [("not taken back", "b.jsonl"), ("taken back", "c.jsonl")]
    assert states(context) == ["trained", "trained", "claimed"]


def test_many_files_are_taken_back_a_part_at_a_time(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    put_model(context.home, "")
    requests.make(context.home, requests.RETRY)
    clock = iter(range(99))
    monkeypatch.setattr("longrun.recovery.time.monotonic", lambda: float(next(clock)))
    recovery = Recovery(context)
    assert [recovery.take_back() for _ in range(3)] == [True, True, False]
    assert states(context) == ["claimed"] * 3


def test_a_crash_in_between_is_tidied_and_gone_on_with(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    put_model(context.home, "a")
    requests.make(context.home, requests.RETRY, jobs=[2, 3])
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(context.ledger, "move", interrupt)
        Recovery(context).take_back()
    lost = context.ledger.get(2)
    assert lost is not None
    archive.put_away(context.home, lost)  # as the next start does with a finished job that has a folder
    Recovery(context).take_back()
    assert states(context) == ["trained", "claimed", "claimed"]
    assert content_of(context.home.trained) == {"a.jsonl": b"a"}


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


# -- the queue


@pytest.mark.parametrize(("home_id", "first"), [(HOME, [2, 1, 3]), ("another home", [1, 2, 3])])
def test_the_job_that_the_model_is_in_the_middle_of_comes_first(
    context: Context, home_id: str, first: list[int]
) -> None:
    for trained in context.ledger.in_state(JobState.TRAINED):
        context.ledger.move(trained, JobState.CLAIMED)
    progress = InProgress(plan=plan_of(80, job=2, home=home_id), done_steps=4, loss_sum=1.0, last_loss=1.0)
    context.seen = checkpoint.Checkpoint(context.home.model, lineage_at(0).at(progress), "digest")
    assert [found.number for found in context.waiting(limit=9)] == first
    assert [found.number for found in context.waiting(limit=1)] == first[:1]
    context.only = {3}
    assert [found.number for found in context.waiting(limit=9)] == ([2, 3] if home_id == HOME else [3])
