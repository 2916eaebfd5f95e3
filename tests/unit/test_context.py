"""What the parts of the daemon share: an edited longrun.toml, as it is while somebody writes it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

from longrun import checkpoint, config, locks
from longrun import context as context_module
from longrun.context import TRAINING, Context
from longrun.notify import Notifier

if TYPE_CHECKING:
    from longrun.home import Home

RATE = "[train]\nlearning_rate = {}\nbatch_size = 4\n"


class Told:
    """A journal that keeps the sentences."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def say(self, event: str, text: str, *, level: str = "info", **facts: Any) -> None:
        self.sentences.append(text)


@pytest.fixture
def context(home: Home) -> Context:
    home.settings.write_text(RATE.format(0.001))
    found = Context(
        home=home,
        home_id="h",
        settings=config.load(home.settings),
        flags={},
        ledger=None,  # type: ignore[arg-type]
        journal=Told(),  # type: ignore[arg-type]
        verifier=checkpoint.Verifier(),
        notifier=Notifier(),
        lock=None,  # type: ignore[arg-type]
    )
    found.reload_settings(None)
    return found


def told(context: Context) -> list[str]:
    return context.journal.sentences  # type: ignore[attr-defined,no-any-return]


def test_settings_are_read_when_their_editor_has_written_them_and_not_when_it_has_emptied_the_file(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = context.home.settings
    still_to_write = [RATE.format(0.0005), "[train]\nlearning_rate = "]
    monkeypatch.setattr(
        context_module.time, "sleep", lambda _: still_to_write and settings.write_text(still_to_write.pop())
    )
    settings.write_text("")

    context.reload_settings(None)

    assert told(context) == ["from the next file on: train.learning_rate 0.001 -> 0.0005"]
    assert context.settings.train == dataclasses.replace(context.settings.train, learning_rate=0.0005, batch_size=4)
    assert context.problems == {}


def test_settings_that_are_written_without_end_do_not_keep_the_daemon(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter(range(1, 100))
    monkeypatch.setattr(
        context_module.time,
        "sleep",
        lambda _: context.home.settings.write_text(RATE.format(0.002) + "#" * next(sizes)),
    )
    context.home.settings.write_text(RATE.format(0.002))

    context.reload_settings(None)

    assert context.settings.train.learning_rate == 0.002


def test_settings_that_nobody_edits_are_looked_at_once(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_module.time, "sleep", lambda _: pytest.fail("waited for an editor that is not there"))
    for _ in range(3):
        context.reload_settings(None)
    assert told(context) == []


def test_who_wants_the_model_hears_what_it_is_held_for_now(context: Context) -> None:
    def told_of() -> str:
        return (locks.holder(context.home.training_lock) or {})["what"]

    context.hold_model("a scheduled backup")
    with context.model_held():
        assert told_of() == "a scheduled backup"
    context.hold_model(TRAINING)
    assert told_of() == "training"
    context.let_go_model("a scheduled backup")
    context.let_go_model(TRAINING)
    assert locks.holder(context.home.training_lock) is None
    with context.model_held():
        assert told_of() == "the Longrun daemon"
