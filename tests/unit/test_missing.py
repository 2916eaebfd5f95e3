from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrun import missing
from longrun.errors import BadModel, LongrunError
from longrun.job import Job, JobState
from longrun.ledger import Ledger
from longrun.lineage import InProgress, Lineage
from longrun.missing import missing_of
from tests.unit.builders import job, lineage_at, plan_of

if TYPE_CHECKING:
    from longrun.home import Home

HOME = "1" * 32
NOW = "2026-01-02T03:04:05.678+00:00"


def trained(number: int, sha256: str = "a", **facts: object) -> Job:
    return job(number, JobState.TRAINED, sha256=sha256, **facts)


def model_with(*jobs: tuple[int, str], home: str = HOME, outcome: str = "trained") -> Lineage:
    """A lineage that trained these jobs, each for two steps, in this order."""
    lineage = lineage_at(0)
    for number, sha256 in jobs:
        plan = replace(plan_of(16, base_step=lineage.global_step, job=number, home=home), sha256=sha256)
        progress = InProgress(plan=plan, done_steps=2, loss_sum=1.0, last_loss=1.0)
        lineage = lineage.ended(progress, outcome=outcome, finished_at=NOW, eval_loss=None)
    return lineage


def numbers(jobs: list[Job]) -> list[int]:
    return [found.number for found in jobs]


# -- which are missing


def test_without_a_model_all_is_missing_in_order_of_arrival() -> None:
    assert numbers(missing_of([trained(10), trained(9, "b"), trained(1)], None, HOME)) == [1, 9, 10]


@pytest.mark.parametrize(
    ("dropped", "model", "lost"),
    [
        ("1a 2b 3c", "1a 2b 3c", []),
        ("1a 2b 3c", "1a", [2, 3]),
        ("1a 2b 3a", "2b 3a", []),  # dropped again after a fresh start
        ("1a 5a", "1a", [5]),  # meant to be trained twice
        ("1a 2a 3a", "3a", [1]),  # one for one
        ("1a 2a 3a 4a", "2a 4a", []),
        ("1a 2a 3b", "3b 2a", []),
        ("1a 2b", "2a", [2]),  # the number alone says nothing; its bytes make up for job 1
        ("", "1a", []),
    ],
)
def test_a_later_drop_of_the_same_bytes_makes_up_for_one_earlier_loss(
    dropped: str, model: str, lost: list[int]
) -> None:
    jobs = [trained(int(word[0]), word[1]) for word in dropped.split()]
    lineage = model_with(*((int(word[0]), word[1]) for word in model.split()))
    assert numbers(missing_of(jobs, lineage, HOME)) == lost


def test_neither_a_file_that_ended_early_nor_another_home_makes_up_for_anything() -> None:
    for lineage in (model_with((1, "a"), (2, "a"), outcome="ended early"), model_with((1, "a"), (2, "a"), home="2")):
        assert numbers(missing_of([trained(1)], lineage, HOME)) == [1]


pairs = st.lists(st.tuples(st.integers(1, 9), st.sampled_from("ab")), unique_by=lambda pair: pair[0])


@given(pairs, pairs)
def test_dropping_a_missing_file_again_leaves_one_less(
    dropped: list[tuple[int, str]], has: list[tuple[int, str]]
) -> None:
    jobs = [trained(*pair) for pair in dropped]
    lost = missing_of(jobs, model_with(*has), HOME)
    assert not {(found.number, found.sha256) for found in lost} & set(has)
    for again in lost:
        left = missing_of(jobs, model_with(*has, (10, again.sha256)), HOME)
        assert len(left) == len(lost) - 1
        assert set(left) < set(lost)


@given(pairs)
def test_a_model_that_trained_all_misses_nothing(dropped: list[tuple[int, str]]) -> None:
    assert missing_of([trained(*pair) for pair in dropped], model_with(*dropped), HOME) == []


# -- on disk


@pytest.fixture
def after_a_restore(home: Home) -> Home:
    """Trained a and b here; the model has a, and the first step of b."""
    home.id_file.write_text(HOME)
    whole = model_with((1, "a"), (2, "b"))
    record = whole.trained(HOME)[2, "b"].to_json()
    with closing(Ledger.open(home.ledger)) as ledger:
        ledger.claim([trained(1), trained(2, "b", name="b.jsonl", rows=16, record=record), job(3)])
    plan = replace(plan_of(16, base_step=2, job=2, home=HOME), sha256="b")
    middle = model_with((1, "a")).at(InProgress(plan=plan, done_steps=1, loss_sum=1.0, last_loss=1.0))
    home.model.mkdir()
    (home.model / "lineage.json").write_text(middle.to_json())
    return home


def test_a_missing_file_is_told_with_its_steps(after_a_restore: Home) -> None:
    (lost,) = missing.look(after_a_restore)
    assert lost.job.number == 2
    assert lost.record is not None
    assert (lost.record.base_step, lost.record.target_step, lost.record.finished_at) == (2, 4, NOW)
    assert (lost.file, lost.done_steps) == (None, 1)


def test_a_file_that_was_trained_before_there_were_records_is_told_without_steps(after_a_restore: Home) -> None:
    with closing(Ledger.open(after_a_restore.ledger)) as ledger:
        ledger.note(trained(2, "b"), record="")
    (lost,) = missing.look(after_a_restore)
    assert (lost.job.number, lost.record) == (2, None)


def test_a_removed_model_is_none_and_a_home_without_a_ledger_misses_nothing(after_a_restore: Home) -> None:
    (after_a_restore.model / "lineage.json").unlink()
    assert numbers(missing.jobs(after_a_restore)) == [1, 2]
    after_a_restore.ledger.unlink()
    assert missing.jobs(after_a_restore) == []


def test_what_cannot_be_read_is_said(after_a_restore: Home) -> None:
    (after_a_restore.model / "lineage.json").write_text("{")
    with pytest.raises(BadModel, match=r"cannot read .*lineage\.json"):
        missing.jobs(after_a_restore)
    after_a_restore.ledger.write_bytes(b"no database" * 99)
    with pytest.raises(LongrunError, match="cannot read the ledger"):
        missing.jobs(after_a_restore)


def test_a_ledger_made_anew_takes_up_what_it_does_not_know() -> None:
    lineage = model_with((1, "a"), (2, "b"))
    (found,) = missing.forgotten(lineage, HOME, {1}.__contains__)
    assert (found.number, found.sha256, found.state, found.rows) == (2, "b", JobState.TRAINED, 16)
    assert found.record == lineage.trained(HOME)[2, "b"].to_json()
    for of_others in (model_with((1, "a"), home="2"), model_with((1, "a"), home="")):
        assert missing.forgotten(of_others, HOME, {0}.__contains__) == []
