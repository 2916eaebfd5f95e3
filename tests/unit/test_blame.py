"""When a file is at fault, and when what it is trained with."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from longrun import blame, fitting
from longrun.config import Settings
from longrun.job import Job, JobState
from longrun.ledger import Ledger

if TYPE_CHECKING:
    from longrun.home import Home

HERE = "8 rows on this machine"


def file(name: str, sha256: str = "") -> Job:
    return Job(number=1, name=name, state=JobState.RUNNING, sha256=sha256 or f"of {name}", arrived_at=0.0)


@pytest.fixture
def context(home: Home) -> Any:
    return SimpleNamespace(settings=Settings(), ledger=Ledger.open(home.ledger))


def test_the_first_file_that_is_given_up_is_at_fault_and_so_it_is_when_it_is_dropped_again(context: Any) -> None:
    assert blame.alike(context, HERE, file("first.jsonl")) is None
    assert blame.alike(context, HERE, file("first.jsonl")) is None


def test_a_second_one_tells_of_what_both_were_trained_with(context: Any) -> None:
    blame.alike(context, HERE, file("first.jsonl"))
    assert blame.alike(context, HERE, file("second.jsonl")) == "first.jsonl"
    assert blame.alike(context, HERE, file("third.jsonl")) == "first.jsonl"


def test_where_something_has_trained_every_file_is_at_fault_itself(context: Any) -> None:
    blame.alike(context, HERE, file("first.jsonl"))
    blame.note_works(context, HERE)
    assert [blame.alike(context, HERE, file(name)) for name in ("second.jsonl", "third.jsonl")] == [None, None]


def test_other_bytes_under_a_name_that_is_used_again_are_another_file(context: Any) -> None:
    assert blame.alike(context, HERE, file("data.jsonl", "one")) is None
    assert blame.alike(context, HERE, file("data.jsonl", "two")) == "data.jsonl"
    assert blame.alike(context, HERE, file("renamed.jsonl", "one")) is None


@pytest.mark.parametrize("changed", ["settings", "batch size", "libraries", "device"])
def test_what_has_trained_is_trusted_with_the_same_settings_and_libraries_only(
    context: Any, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    recipe = context.settings.recipe
    before = blame.training(fitting.situation(context, recipe).words, "cuda:0 (large)")
    if changed == "settings":
        context.settings = replace(context.settings, train=replace(context.settings.train, optim="sgd"))
    if changed == "batch size":
        recipe = replace(recipe, batch_size=16)
    if changed == "libraries":
        monkeypatch.setattr(blame, "_libraries", lambda: "torch 99")
    device = "cuda:0 (small)" if changed == "device" else "cuda:0 (large)"
    assert blame.training(fitting.situation(context, recipe).words, device) != before


@pytest.mark.parametrize("changed", ["model", "libraries"])
def test_what_has_been_prepared_is_trusted_with_the_same_model_and_libraries_only(
    context: Any, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    before = blame.preparing(context)
    if changed == "model":
        context.settings = replace(context.settings, model=replace(context.settings.model, base_model="other/model"))
    if changed == "libraries":
        monkeypatch.setattr(blame, "_libraries", lambda: "torch 99")
    assert blame.preparing(context) != before
