"""How many rows go onto a device at once, and how long an out of memory is remembered."""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from longrun import fitting
from longrun.config import Settings
from longrun.errors import CannotTrain
from longrun.ledger import Ledger

if TYPE_CHECKING:
    from longrun.home import Home
    from longrun.plan import Recipe


@pytest.fixture
def context(home: Home) -> Any:
    return SimpleNamespace(settings=Settings(), ledger=Ledger.open(home.ledger), say=lambda *_, **__: None)


def change(context: Any, section: str, **values: Any) -> None:
    changed = replace(getattr(context.settings, section), **values)
    context.settings = replace(context.settings, **{section: changed})


def of(context: Any, batch_size: int) -> Recipe:
    return replace(context.settings.recipe, batch_size=batch_size)


def smaller(context: Any, batch_size: int, tried: int) -> bool:
    situation = fitting.situation(context, of(context, batch_size))
    return fitting.make_smaller(context, situation, tried)


def test_a_step_is_taken_at_once_unless_the_settings_say_fewer(context: Any) -> None:
    assert fitting.rows_at_once(context, of(context, 8)) == 8
    change(context, "train", per_device_train_batch_size=2)
    assert fitting.rows_at_once(context, of(context, 8)) == 2


def test_out_of_memory_halves_what_was_tried_until_it_is_one_row(context: Any) -> None:
    for tried, rows in ((8, 4), (4, 2), (2, 1)):
        assert smaller(context, 8, tried)
        assert fitting.rows_at_once(context, of(context, 8)) == rows
    assert not smaller(context, 8, tried=1)
    assert not smaller(context, 8, tried=0)
    assert fitting.rows_at_once(context, of(context, 8)) == 1


def test_what_is_forgotten_of_one_batch_is_remembered_of_another(context: Any) -> None:
    smaller(context, 8, tried=2)
    smaller(context, 6, tried=6)
    fitting.forget(context, fitting.situation(context, of(context, 8)))
    fitting.forget(context, fitting.situation(context, of(context, 8)))
    assert [fitting.rows_at_once(context, of(context, size)) for size in (8, 6)] == [8, 3]


@pytest.mark.parametrize(
    ("section", "changed"),
    [
        ("train", {"gradient_checkpointing": True}),
        ("train", {"optim": "adafactor"}),
        ("train", {"max_length": 64}),
        ("train", {"per_device_train_batch_size": 8}),
        ("model", {"dtype": "bfloat16"}),
        ("model", {"attn_implementation": "sdpa"}),
        ("model", {"base_model": "another"}),
    ],
)
def test_whoever_changes_what_takes_memory_is_not_held_to_what_did_not_fit_before(
    context: Any, section: str, changed: dict[str, Any]
) -> None:
    smaller(context, 8, tried=2)
    before = context.settings
    change(context, section, **changed)
    assert fitting.rows_at_once(context, of(context, 8)) == 8
    context.settings = before
    assert fitting.rows_at_once(context, of(context, 8)) == 1


@pytest.mark.parametrize("clock_s", [fitting.FORGOTTEN_S + 1, -fitting.FORGOTTEN_S - 1])
def test_more_rows_are_tried_again_after_a_day(context: Any, monkeypatch: pytest.MonkeyPatch, clock_s: float) -> None:
    smaller(context, 8, tried=8)
    assert fitting.rows_at_once(context, of(context, 8)) == 4
    later = time.time() + clock_s
    monkeypatch.setattr(fitting.time, "time", lambda: later)
    assert fitting.rows_at_once(context, of(context, 8)) == 8


def test_what_was_learnt_of_one_batch_stays_when_another_teaches_and_one_row_teaches_nothing(context: Any) -> None:
    told: list[str] = []
    context.say = lambda event, *_, **__: told.append(event)
    smaller(context, 8, tried=8)
    smaller(context, 6, tried=6)
    assert [fitting.rows_at_once(context, of(context, size)) for size in (8, 6)] == [4, 3]
    smaller(context, 6, tried=1)
    assert told == ["smaller batches", "smaller batches"]


def test_processes_that_cannot_share_a_step_evenly_are_told(context: Any) -> None:
    change(context, "worker", processes=4)
    assert fitting.rows_at_once(context, of(context, 8)) == 2
    with pytest.raises(CannotTrain, match="cannot share the batch of 6 rows"):
        fitting.rows_at_once(context, of(context, 6))
