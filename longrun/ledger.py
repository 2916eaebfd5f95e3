"""The ledger: which jobs there are and how far each has come. One method is one transaction.

It is an index. What was trained is written in the model's lineage, what was claimed lies in state/jobs/;
a ledger that was deleted is rebuilt from those.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Self

from longrun.errors import BadConfig, LongrunError
from longrun.job import Job, JobState, check_move

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

CACHE_KIB = 64  # of its pages, which hundreds of files fill; what it reads again is in the system's cache
ANSWERS_KEPT = 32  # an idle daemon asks for a dozen things each round

_COLUMNS = "number, name, state, arrived_at, sha256, rows, format, on_bad_row, attempts, reason, record"
_MARKS = "?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?"


class Ledger:
    def __init__(self, connection: sqlite3.Connection, columns: str = _COLUMNS) -> None:
        self._db = connection
        self._columns = columns
        self._answers: dict[tuple[object, ...], list[Any]] = {}  # by query and values, as long as nothing is written

    @classmethod
    def open(cls, path: Path) -> Self:
        """The ledger at `path`, made if missing; a file that is no database is refused, never overwritten."""
        try:
            return cls(_connect(path))
        except sqlite3.OperationalError as error:  # no room, no right, locked: it may be mended without a word to us
            raise LongrunError(
                f"cannot open the ledger {path}: {error}",
                hint=f"see to it that {path.parent} can be written and has room",
            ) from None
        except sqlite3.DatabaseError as error:
            raise BadConfig(
                f"cannot open the ledger {path}: {error}",
                hint=f"move it away (mv {path} {path}.damaged); it is rebuilt from the model and state/jobs/",
            ) from None

    @classmethod
    def trained(cls, path: Path) -> list[Job]:
        """The trained jobs in the ledger at `path`; as `reading` has it."""
        with cls.reading(path) as ledger:
            return ledger.in_state(JobState.TRAINED) if ledger else []

    @classmethod
    @contextmanager
    def reading(cls, path: Path) -> Iterator[Self | None]:
        """The ledger at `path`, None where there is none, to be read beside a daemon or without; nothing is changed."""
        if not path.exists():
            yield None
            return
        try:
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
                yield cls(connection, _COLUMNS if _has_record(connection) else _COLUMNS.replace("record", "''"))
        except sqlite3.Error as error:
            raise LongrunError(f"cannot read the ledger {path}: {error}") from None

    def close(self) -> None:
        self._db.close()

    # -- reading

    def get(self, number: int) -> Job | None:
        return next(iter(self._jobs("where number = ?", number)), None)

    def in_state(self, *states: JobState, limit: int = -1) -> list[Job]:
        """Jobs in any of these states, in order of arrival."""
        marks = ", ".join("?" * len(states))
        return self._jobs(f"where state in ({marks}) order by number limit ?", *states, limit)

    def each_trained(self) -> Iterator[Job]:
        """The trained jobs one by one: they become more for as long as the model lives."""
        with closing(self._db.execute(f"select {self._columns} from job where state = 'trained'")) as cursor:  # noqa: S608
            yield from map(_from_row, cursor)

    def count(self, *states: JobState) -> int:
        marks = ", ".join("?" * len(states))
        return self._number(f"select count(*) from job where state in ({marks})", *states)  # noqa: S608

    def same_content(self, job: Job) -> Job | None:
        """The latest earlier job with the same bytes."""
        return next(
            iter(self._jobs("where sha256 = ? and number < ? order by number desc limit 1", job.sha256, job.number)),
            None,
        )

    def highest_number(self) -> int:
        return self._number("select coalesce(max(number), 0) from job")

    def fact(self, name: str) -> str | None:
        row = next(iter(self._answer("select value from fact where name = ?", name)), None)
        return row[0] if row else None

    # -- writing

    def claim(self, jobs: Iterable[Job]) -> None:
        with self._transaction():
            self._db.executemany(
                f"insert or ignore into job ({_COLUMNS}) values ({_MARKS})",  # noqa: S608
                [_to_row(job) for job in jobs],
            )

    def move(self, job: Job, target: JobState, **facts: object) -> Job:
        """Take the job to `target`, storing what was learnt about it; returns it as it is now."""
        check_move(job, target)
        return self.note(job, state=target, **facts)

    def note(self, job: Job, **facts: object) -> Job:
        """Store facts about the job; returns it as it is now."""
        noted = replace(job, **facts)  # type: ignore[arg-type]
        with self._transaction():
            self._db.execute(f"insert or replace into job ({_COLUMNS}) values ({_MARKS})", _to_row(noted))  # noqa: S608
        return noted

    def learn(self, jobs: Iterable[Job]) -> None:
        """Store these jobs as they are, whatever was known of them."""
        with self._transaction():
            self._db.executemany(
                f"insert or replace into job ({_COLUMNS}) values ({_MARKS})",  # noqa: S608
                [_to_row(job) for job in jobs],
            )

    def set_fact(self, name: str, value: str) -> None:
        with self._transaction():
            self._db.execute("insert or replace into fact values (?, ?)", (name, value))

    # -- plumbing

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("begin immediate")
        try:
            yield
            self._db.commit()
        except BaseException:
            self._db.rollback()  # does nothing where SQLite has rolled back itself, as it may on a full disk
            raise
        finally:
            self._answers.clear()

    def _jobs(self, where: str, *values: object) -> list[Job]:
        return [_from_row(row) for row in self._answer(f"select {self._columns} from job {where}", *values)]  # noqa: S608

    def _number(self, query: str, *values: object) -> int:
        return int(self._answer(query, *values)[0][0])

    def _answer(self, query: str, *values: object) -> list[Any]:
        """The rows of a query. The daemon alone writes, so what it was told last holds until it does."""
        asked = (query, *values)
        if asked not in self._answers:
            with closing(self._db.execute(query, values)) as cursor:
                rows = cursor.fetchall()
            if len(self._answers) == ANSWERS_KEPT:
                self._answers.clear()
            self._answers[asked] = rows
        return self._answers[asked]


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("pragma journal_mode = wal")
        connection.execute("pragma synchronous = full")
        connection.execute(f"pragma cache_size = -{CACHE_KIB}")
        connection.executescript(files("longrun").joinpath("ledger.sql").read_text(encoding="utf-8"))
        if not _has_record(connection):  # it was made before there were records
            connection.execute("alter table job add column record text not null default ''")
    except sqlite3.DatabaseError:
        connection.close()
        raise
    return connection


def _has_record(connection: sqlite3.Connection) -> bool:
    return "record" in {name for _, name, *_ in connection.execute("pragma table_info(job)")}


def _to_row(job: Job) -> tuple[object, ...]:
    return (
        job.number,
        os.fsencode(job.name),
        job.state.value,
        job.arrived_at,
        job.sha256,
        job.rows,
        job.format,
        job.on_bad_row,
        job.attempts,
        job.reason,
        job.record,
    )


def _from_row(row: tuple[object, ...]) -> Job:
    number, name, state, *rest = row
    values = dict(zip(_COLUMNS.split(", ")[3:], rest, strict=True))
    return Job(number=number, name=os.fsdecode(name), state=JobState(state), **values)  # type: ignore[arg-type]
