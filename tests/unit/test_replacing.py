"""Being alone with a model, and whose turn it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from longrun.errors import Locked
from longrun.locks import Lock, holder
from longrun.replacing import alone_with_model, check_turn

if TYPE_CHECKING:
    from longrun.home import Home


def test_who_waits_for_the_model_comes_before_the_next_file(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    check_turn(home)
    training = Lock.take(home.training_lock, what="training")
    turns: list[str] = []

    def file_ends(_: float) -> None:
        try:
            check_turn(home)
        except Locked as waits:
            turns.append(waits.message)
            training.release()

    monkeypatch.setattr("longrun.replacing.time.sleep", lambda s: file_ends(s) if not turns else None)
    with alone_with_model(home, "restore", wait=True, hint=""):
        assert len(turns) == 1
        assert turns[0].startswith("restore (pid ")
        assert turns[0].endswith(" waits for the model")
        assert holder(home.turn_lock) is None, "it has the model now"
    check_turn(home)
