"""Which files of a command that was cut off are not begun anew when it is typed again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from longrun import by_hand
from longrun.config import Settings
from longrun.job import Job, JobState
from longrun.ledger import Ledger
from longrun.plan import make_plan
from tests.unit.builders import lineage_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from longrun.home import Home


@pytest.fixture
def ledger(home: Home) -> Iterator[Ledger]:
    opened = Ledger.open(home.ledger)
    yield opened
    opened.close()


def job(number: int, state: JobState = JobState.QUEUED) -> Job:
    return Job(number=number, name=f"{number}.jsonl", state=state, sha256=f"of {number}", arrived_at=0.0)


def test_a_command_is_known_by_the_contents_of_its_files_in_their_order_until_it_has_ended(ledger: Ledger) -> None:
    by_hand.note(ledger, ["a", "b"], [1, 2])
    by_hand.note(ledger, ["b", "a"], [3, 4])
    assert by_hand.jobs_of(ledger, ["a", "b"]) == [1, 2]
    assert by_hand.jobs_of(ledger, ["a"]) == []
    ledger.learn([job(1, JobState.TRAINED), job(2, JobState.REJECTED), job(3, JobState.TRAINED), job(4)])
    by_hand.forget_ended(ledger, but=["a", "b"])
    assert by_hand.jobs_of(ledger, ["a", "b"]) == [1, 2]
    by_hand.forget_ended(ledger)
    assert by_hand.jobs_of(ledger, ["a", "b"]) == []
    assert by_hand.jobs_of(ledger, ["b", "a"]) == [3, 4]


def test_commands_that_are_never_typed_again_do_not_become_more_and_more(ledger: Ledger) -> None:
    for number in range(by_hand.KEPT + 1):
        by_hand.note(ledger, [f"file {number}"], [number])
    assert by_hand.jobs_of(ledger, ["file 0"]) == []
    assert by_hand.jobs_of(ledger, [f"file {by_hand.KEPT}"]) == [by_hand.KEPT]


def test_trained_already_is_what_the_model_has(home: Home, ledger: Ledger) -> None:
    contents = ["of 1", "of 2", "of 3"]
    ledger.learn([job(1, JobState.TRAINED), job(2, JobState.TRAINED), job(3)])
    by_hand.note(ledger, contents, [1, 2, 3])
    assert by_hand.trained_already(home, contents, None) == [False] * 3
    plan = make_plan(job=1, name="a", sha256="of 1", trainable_rows=8, base_step=0, recipe=Settings().recipe)
    before, progress = lineage_at(0).begun(plan, "now")
    has_a = before.ended(replace(progress, done_steps=1), outcome="trained", finished_at="now", eval_loss=None)
    assert by_hand.trained_already(home, contents, has_a) == [True, False, False]


def test_where_there_is_no_ledger_nothing_was_trained(home: Home) -> None:
    assert by_hand.trained_already(home, ["of a"], None) == [False]
