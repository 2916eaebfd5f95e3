from __future__ import annotations

import errno
import json
import os
import time
from typing import TYPE_CHECKING, Any

import pytest

from longrun import disk, locks, status

if TYPE_CHECKING:
    from longrun.home import Home

PROMISED = {"state", "pid", "global_step", "current", "queue", "trained", "rejected", "problems"}
TRAINING = {"state": "training", "pid": os.getpid(), "global_step": 9, "current": {"file": "x.jsonl"}, "trained": 3}


@pytest.fixture
def held(home: Home) -> Any:
    with locks.Lock.take(home.daemon_lock, what="the Longrun daemon"):
        yield


def test_a_home_without_a_daemon_has_everything_that_is_promised(home: Home) -> None:
    facts = status.read(home)
    assert facts.keys() >= PROMISED
    assert (facts["state"], facts["pid"], facts["queue"], facts["problems"]) == ("stopped", None, [], [])
    json.dumps(facts)


def test_a_folder_that_is_no_home_is_a_stopped_one(home: Home) -> None:
    disk.remove_tree(home.state, home.root / "trash")
    assert status.read(home)["state"] == "stopped"


@pytest.mark.usefixtures("held")
def test_a_living_daemon_is_believed(home: Home) -> None:
    status.write(home, TRAINING)
    facts = status.read(home)
    assert {key: facts[key] for key in TRAINING} == TRAINING
    assert "stale_s" not in facts
    assert "written_at" not in facts


def test_nobody_trains_when_nobody_holds_the_lock(home: Home) -> None:
    status.write(home, TRAINING)
    facts = status.read(home)
    assert (facts["state"], facts["pid"], facts["current"], facts["trained"]) == ("stopped", None, None, 3)


@pytest.mark.usefixtures("held")
def test_a_daemon_that_has_not_answered_for_long_is_told(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    status.write(home, TRAINING)
    later = time.time() + 40
    monkeypatch.setattr(time, "time", lambda: later)
    facts = status.read(home)
    assert (facts["state"], facts["stale_s"]) == ("training", 40)


@pytest.mark.usefixtures("held")
def test_the_note_of_a_former_daemon_is_not_that_of_a_new_one(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    status.write(home, TRAINING | {"pid": 1})
    later = time.time() + 4000
    monkeypatch.setattr(time, "time", lambda: later)
    facts = status.read(home)
    assert (facts["state"], facts["pid"], facts["current"]) == ("starting", os.getpid(), None)
    assert "stale_s" not in facts


@pytest.mark.usefixtures("held")
@pytest.mark.parametrize(
    "note", [b"", b"{", b"[]", b"null", b"\xff", b"\0" * 100, b'{"written_at": null}', b'{"pid": OUR_PID}']
)
def test_a_note_that_says_nothing_is_no_fault(home: Home, note: bytes) -> None:
    home.status.write_bytes(note.replace(b"OUR_PID", b"%d" % os.getpid()))
    facts = status.read(home)
    assert facts.keys() >= PROMISED
    assert (facts["state"], facts["pid"]) == ("starting", os.getpid())


@pytest.mark.parametrize(
    ("content", "step"), [(b'{"global_step": 7}', 7), (b"{", 0), (b"{}", 0), (b"[]", 0), (b'{"global_step": null}', 0)]
)
def test_the_published_step_is_that_of_the_model(home: Home, content: bytes, step: int) -> None:
    assert status.published_step(home) == 0
    home.model.mkdir()
    (home.model / "trainer_state.json").write_bytes(content)
    assert status.published_step(home) == step


@pytest.mark.usefixtures("held")
def test_a_full_disk_can_still_be_told(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    status.write(home, TRAINING | {"queue": ["a long one"] * 9})

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "write_file", full)
    status.write(home, TRAINING | {"state": "paused: disk"})
    assert status.read(home)["state"] == "paused: disk"


def test_the_file_that_a_killed_daemon_was_training_is_the_first_in_the_queue(home: Home) -> None:
    status.write(home, TRAINING | {"queue": ["y.jsonl"], "queued": 1, "worker_pid": 7})
    facts = status.read(home)
    assert (facts["queue"], facts["queued"], facts["worker_pid"]) == (["x.jsonl", "y.jsonl"], 2, None)
