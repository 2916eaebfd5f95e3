from __future__ import annotations

import sqlite3
import tracemalloc
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from longrun.errors import BadConfig, ExitCode, LongrunError
from longrun.job import JobState
from longrun.ledger import ANSWERS_KEPT, Ledger
from tests.unit.builders import job

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

QUEUED, RUNNING, CLAIMED = JobState.QUEUED, JobState.RUNNING, JobState.CLAIMED


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite3"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    ledger = Ledger.open(path)
    yield ledger
    ledger.close()


@pytest.mark.parametrize("name", ["x.jsonl", "\udcff\udc80.jsonl", "a\nb\x00.jsonl", "\N{EURO SIGN}.jsonl"])
def test_a_job_is_remembered_as_it_was(ledger: Ledger, path: Path, name: str) -> None:
    ledger.claim([job(3, name=name, arrived_at=1.5)])
    assert ledger.get(3) == job(3, name=name, arrived_at=1.5)
    again = Ledger.open(path)
    assert again.get(3) == ledger.get(3)
    again.close()


def test_jobs_are_in_order_of_arrival(ledger: Ledger) -> None:
    ledger.claim([job(10), job(9), job(100, QUEUED)])
    assert [found.number for found in ledger.in_state(CLAIMED, QUEUED)] == [9, 10, 100]
    assert [found.number for found in ledger.in_state(CLAIMED, QUEUED, limit=2)] == [9, 10]
    assert [found.number for found in ledger.in_state(QUEUED)] == [100]
    assert (ledger.count(CLAIMED), ledger.count(CLAIMED, QUEUED), ledger.count(RUNNING)) == (2, 3, 0)
    assert ledger.highest_number() == 100


def test_an_empty_ledger_knows_nothing(ledger: Ledger) -> None:
    assert (ledger.get(1), ledger.in_state(CLAIMED), ledger.count(CLAIMED), ledger.highest_number()) == (None, [], 0, 0)


def test_the_database_is_asked_once_until_something_is_written(ledger: Ledger) -> None:
    ledger.claim([job(1), job(2)])
    asked: list[str] = []
    ledger._db.set_trace_callback(asked.append)

    def questions() -> list[object]:
        return [ledger.get(1), ledger.in_state(CLAIMED, limit=5), ledger.count(CLAIMED), ledger.fact("x")]

    assert questions() == questions() == [job(1), [job(1), job(2)], 2, None]
    assert len(asked) == 4
    ledger.move(job(1), QUEUED)
    ledger.set_fact("x", "y")
    assert questions() == [job(1, QUEUED), [job(2)], 1, "y"]


def test_what_was_undone_is_not_remembered(ledger: Ledger) -> None:
    with pytest.raises(OSError, match="no room"), ledger._transaction():
        ledger._db.execute("insert into fact values ('x', 'y')")
        assert ledger.fact("x") == "y"
        raise OSError("no room")
    assert ledger.fact("x") is None


def test_answers_do_not_pile_up(ledger: Ledger) -> None:
    ledger.claim([job(number) for number in range(1, 1001)])
    assert [ledger.get(number) for number in range(1, 1001)] == [job(number) for number in range(1, 1001)]
    assert len(ledger._answers) <= ANSWERS_KEPT


def test_a_job_is_claimed_once(ledger: Ledger) -> None:
    ledger.claim([job(1)])
    ledger.move(job(1), QUEUED, rows=7)
    ledger.claim([job(1), job(2)])
    assert ledger.get(1) == job(1, QUEUED, rows=7)
    assert ledger.get(2) == job(2)


def test_a_move_stores_what_was_learnt(ledger: Ledger) -> None:
    ledger.claim([job(1)])
    moved = ledger.move(job(1), QUEUED, sha256="a", rows=3, format="text")
    assert moved == ledger.get(1) == job(1, QUEUED, sha256="a", rows=3, format="text")


def test_a_move_that_is_not_in_the_table_changes_nothing(ledger: Ledger) -> None:
    ledger.claim([job(1)])
    with pytest.raises(AssertionError, match="cannot go from claimed to running"):
        ledger.move(job(1), RUNNING)
    assert ledger.get(1) == job(1)


def test_a_note_leaves_the_state(ledger: Ledger) -> None:
    ledger.claim([job(1)])
    assert ledger.note(job(1), attempts=2) == ledger.get(1) == job(1, attempts=2)


def test_the_latest_earlier_job_with_the_same_content_is_found(ledger: Ledger) -> None:
    ledger.claim([job(number, sha256="a") for number in (1, 2, 4)] + [job(3, sha256="b")])
    found = ledger.same_content(job(4, sha256="a"))
    assert found is not None
    assert found.number == 2
    assert ledger.same_content(job(1, sha256="a")) is None


def test_a_fact_outlives_a_restart(ledger: Ledger, path: Path) -> None:
    assert ledger.fact("rows") is None
    ledger.set_fact("rows", "8")
    ledger.set_fact("rows", "4")
    ledger.close()
    again = Ledger.open(path)
    assert again.fact("rows") == "4"
    again.close()


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"\0" * 5000, b"SQLite format 3\0" + b"x" * 5000])
def test_a_file_that_is_no_database_is_refused_and_left_as_it_was(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(BadConfig, match=r"cannot open the ledger .*mv .* it is rebuilt from the model"):
        Ledger.open(path)
    assert path.read_bytes() == content


def test_a_ledger_that_cannot_be_opened_is_not_called_damaged_and_may_be_tried_again(tmp_path: Path) -> None:
    with pytest.raises(LongrunError, match=r"unable to open database file.* can be written and has room") as told:
        Ledger.open(tmp_path / "absent" / "ledger.sqlite3")
    assert told.value.exit_code == ExitCode.FAILURE  # after 78 no system starts it again, though there may be room


def test_others_may_read_during_a_write(ledger: Ledger, path: Path) -> None:
    ledger.claim([job(1)])
    reader = sqlite3.connect(path)
    with ledger._transaction():
        ledger._db.execute("delete from job")
        assert reader.execute("select count(*) from job").fetchone() == (1,)
    assert reader.execute("select count(*) from job").fetchone() == (0,)
    reader.close()


def test_a_transaction_that_failed_leaves_nothing_and_blocks_nothing(ledger: Ledger) -> None:
    with pytest.raises(sqlite3.Error):
        ledger.claim([job(1), job(2, format=object())])
    ledger.claim([job(3)])
    assert [found.number for found in ledger.in_state(CLAIMED)] == [3]


def test_a_ledger_without_room_is_unchanged_and_goes_on_when_there_is_some(ledger: Ledger) -> None:
    ledger.claim([job(1)])
    pages = ledger._db.execute("pragma page_count").fetchone()[0]
    ledger._db.execute(f"pragma max_page_count = {pages}")
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError, match="full"):
            ledger.claim([job(number, reason="x" * 1000) for number in range(2, 99)])
    assert ledger.highest_number() == 1
    ledger._db.execute("pragma max_page_count = 1000000")
    ledger.claim([job(number, reason="x" * 1000) for number in range(2, 99)])
    assert ledger.highest_number() == 98


# -- ledgers made before there were records

FORMER = """
create table job (number integer primary key, name blob not null, state text not null, arrived_at real not null,
    sha256 text not null default '', rows integer not null default 0, format text not null default '',
    on_bad_row text not null default 'reject', attempts integer not null default 0,
    reason text not null default ''     -- JSON, when rejected
);
insert into job (number, name, state, arrived_at, sha256) values (1, 'x.jsonl', 'trained', 1.0, 'a');
"""


def test_a_former_ledger_is_read_as_it_is_and_extended_by_the_daemon(path: Path) -> None:
    old = sqlite3.connect(path)
    old.executescript(FORMER)
    former = job(1, JobState.TRAINED, sha256="a")
    assert Ledger.trained(path) == [former]
    assert "record" not in old.execute("select sql from sqlite_master").fetchone()[0]
    for _ in range(2):
        ledger = Ledger.open(path)
        assert ledger.get(1) == former
        ledger.close()
    ledger = Ledger.open(path)
    ledger.note(former, record="{}")
    ledger.close()
    assert Ledger.trained(path) == [replace(former, record="{}")]
    old.close()


def test_trained_jobs_are_read_beside_a_writer(ledger: Ledger, path: Path) -> None:
    ledger.claim([job(1, JobState.TRAINED), job(2)])
    with ledger._transaction():
        assert Ledger.trained(path) == [job(1, JobState.TRAINED)]


def test_trained_jobs_of_no_ledger_are_none_and_of_a_damaged_one_an_error(path: Path) -> None:
    assert Ledger.trained(path) == []
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(LongrunError, match="cannot read the ledger"):
        Ledger.trained(path)


def test_what_is_learnt_replaces_what_was_known(ledger: Ledger) -> None:
    ledger.claim([job(1)])
    ledger.learn([job(1, state=JobState.TRAINED, rows=5), job(2, state=JobState.TRAINED)])
    assert [found.rows for found in ledger.in_state(JobState.TRAINED)] == [5, 0]


def test_trained_jobs_are_had_one_by_one(ledger: Ledger) -> None:
    ledger.learn([job(number, state=JobState.TRAINED, record="x" * 1000) for number in range(1, 1001)])
    ledger.claim([job(1001)])
    tracemalloc.start()
    numbers = [found.number for found in ledger.each_trained()]
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sorted(numbers) == list(range(1, 1001))
    assert most_bytes < 100_000
