"""When a file is at fault, and when what it is trained with."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from longrun import blame
from longrun.config import Settings
from longrun.ledger import Ledger

if TYPE_CHECKING:
    from longrun.home import Home


@pytest.fixture
def context(home: Home) -> Any:
    return SimpleNamespace(settings=Settings(), ledger=Ledger.open(home.ledger))


def test_the_first_file_that_is_given_up_is_at_fault_and_so_it_is_when_it_is_dropped_again(context: Any) -> None:
    assert blame.alike(context, 8, "first.jsonl") is None
    assert blame.alike(context, 8, "first.jsonl") is None


def test_a_second_one_tells_of_what_both_were_trained_with(context: Any) -> None:
    blame.alike(context, 8, "first.jsonl")
    assert blame.alike(context, 8, "second.jsonl") == "first.jsonl"
    assert blame.alike(context, 8, "third.jsonl") == "first.jsonl"


def test_where_something_has_trained_every_file_is_at_fault_itself(context: Any) -> None:
    blame.alike(context, 8, "first.jsonl")
    blame.note_trained(context, 8)
    assert [blame.alike(context, 8, name) for name in ("second.jsonl", "third.jsonl")] == [None, None]


@pytest.mark.parametrize("changed", ["settings", "batch size", "libraries"])
def test_what_has_trained_is_trusted_with_the_same_settings_and_libraries_only(
    context: Any, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    blame.note_trained(context, 8)
    if changed == "settings":
        context.settings = replace(context.settings, train=replace(context.settings.train, optim="sgd"))
    if changed == "libraries":
        monkeypatch.setattr(blame, "_libraries", lambda: "torch 99")
    batch_size = 16 if changed == "batch size" else 8
    blame.alike(context, batch_size, "first.jsonl")
    assert blame.alike(context, batch_size, "second.jsonl") == "first.jsonl"
