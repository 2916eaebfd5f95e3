from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import shutil
import sys
from typing import TYPE_CHECKING, Any

import pytest

from longrun import disk
from longrun.config import LogSettings
from longrun.journal import Journal, utc_now
from longrun.wording import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from longrun.home import Home

EVIL = "a\nb\r\x1b[31m\x07\x00\u202e\u2028\x85\udcff\N{EURO SIGN}.jsonl"
SAFE = r"a\nb\r\x1b[31m\x07\x00\u202e\u2028\x85\udcff" + "\N{EURO SIGN}.jsonl"


@pytest.fixture
def open_journal(home: Home) -> Iterator[Callable[..., Journal]]:
    yield lambda **settings: Journal(home, LogSettings(**settings))
    for handler in logging.getLogger("longrun").handlers:
        handler.close()
    logging.getLogger("longrun").handlers = []


def events(home: Home) -> list[dict[str, Any]]:
    return [json.loads(line) for line in home.events.read_text().splitlines()]


def test_what_is_printable_stays_and_the_rest_is_escaped() -> None:
    assert printable("caf\u00e9 \u4f60\u597d 'x' \\n") == "caf\u00e9 \u4f60\u597d 'x' \\n"
    assert printable(EVIL) == SAFE


def test_a_log_that_cannot_be_begun_anew_is_told_and_ends_nothing(
    home: Home,
    open_journal: Callable[..., Journal],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    journal = open_journal()
    journal.say("one", "one")
    home.log.rename(home.logs / "moved.log")
    with monkeypatch.context() as patched:
        patched.setattr(logging.FileHandler, "_open", lambda _: disk.sync_file(home.logs / "missing"))
        for text in ("two", "three"):
            journal.say(text, text)
    journal.say("four", "four")
    assert [event["event"] for event in events(home)] == ["one", "two", "three", "four"]
    assert home.log.read_text().endswith("four\n")
    told = capsys.readouterr().err
    assert told.count("daemon.log cannot be written") == 1
    assert "Traceback" not in told


def test_times_are_utc_with_milliseconds() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", utc_now())


def test_an_event_is_one_line_for_people_and_one_for_machines(
    home: Home, open_journal: Callable[..., Journal], capsys: pytest.CaptureFixture[str]
) -> None:
    open_journal().say("rejected", f"{EVIL} is rejected", level="warning", file=EVIL, job=7)
    line = home.log.read_text(encoding="utf-8")
    assert line == capsys.readouterr().err
    assert line.count("\n") == 1
    assert line.endswith(f" WARNING {SAFE} is rejected\n")
    (event,) = events(home)
    assert (event["event"], event["level"], event["file"], event["job"]) == ("rejected", "warning", EVIL, 7)


def rotated_logs() -> list[Any]:
    return [handler for handler in logging.getLogger("longrun").handlers if hasattr(handler, "baseFilename")]


def make_room(home: Home) -> None:
    """What was written to /dev/full can be written now: to home/room."""
    with (home.root / "room").open("wb") as room:
        for rotated in rotated_logs():
            os.dup2(room.fileno(), rotated.stream.fileno())


def test_a_log_that_cannot_be_written_is_told_once_and_misses_nothing(
    home: Home, open_journal: Callable[..., Journal], capsys: pytest.CaptureFixture[str]
) -> None:
    home.log.symlink_to("/dev/full")
    journal = open_journal()
    journal.say("planned", "first")
    journal.say("saved", "second")
    told = capsys.readouterr().err
    assert told.count("\n") == 3
    assert re.search(r" first\n.*daemon.log cannot be written: .*No space left on device\n.* second\n", told)
    (rotated,) = rotated_logs()
    rotated._come_back = lambda: None  # type: ignore[attr-defined]  # it is the same log
    make_room(home)
    journal.say("saved", "third")
    assert [line[-5:] for line in (home.root / "room").read_text().splitlines()] == ["first", "econd", "third"]


def test_a_disk_that_is_full_for_stderr_too_ends_nothing(
    home: Home, open_journal: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    home.log.symlink_to("/dev/full")
    monkeypatch.setattr(sys, "stderr", Full())
    open_journal().say("problem", "paused: disk")
    assert events(home)[0]["message"] == "paused: disk"
    make_room(home)


@pytest.mark.parametrize("gone", ["the log", "its folder", "moved"])
def test_a_log_that_somebody_removed_or_moved_is_begun_anew(
    home: Home, open_journal: Callable[..., Journal], gone: str
) -> None:
    journal = open_journal()
    journal.say("x", "first")
    if gone == "moved":
        home.log.rename(home.logs / "kept.log")
    else:
        shutil.rmtree(home.logs) if gone == "its folder" else home.log.unlink()
    journal.say("x", "second")
    journal.say("x", "third")
    assert [line.split()[-1] for line in home.log.read_text().splitlines()] == ["second", "third"]


def test_a_log_that_cannot_be_begun_anew_is_told_on_stderr(
    home: Home, open_journal: Callable[..., Journal], capsys: pytest.CaptureFixture[str]
) -> None:
    journal = open_journal()
    shutil.rmtree(home.logs)
    home.logs.write_text("no folder")
    journal.say("x", "still told")
    told = capsys.readouterr().err
    assert " still told\n" in told
    assert "daemon.log cannot be written: [Errno 17] File exists" in told


def test_percent_signs_are_only_letters(home: Home, open_journal: Callable[..., Journal]) -> None:
    open_journal().say("x", "100 %s %d done")
    assert home.log.read_text().endswith("100 %s %d done\n")


def test_the_log_can_be_json(home: Home, open_journal: Callable[..., Journal]) -> None:
    journal = open_journal(format="json")
    journal.say("queued", f"{EVIL} waits", file=EVIL)
    journal.progress(name="x", done=1, planned=2, loss=1.0, text="half way")
    said, progress = [json.loads(line) for line in home.log.read_text().splitlines()]
    assert (said["event"], said["message"], said["file"]) == ("queued", f"{EVIL} waits", EVIL)
    assert (progress["event"], progress["message"]) == ("progress", "half way")
    assert home.log.read_text().isascii()


def test_events_are_added_to_those_of_former_lives(home: Home, open_journal: Callable[..., Journal]) -> None:
    for number in range(2):
        journal = open_journal()
        journal.say("start", "x", number=number)
        for handler in logging.getLogger("longrun").handlers:
            handler.close()
    assert [event["number"] for event in events(home)] == [0, 1]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_full_disk_does_not_silence_the_log(
    home: Home, open_journal: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch, log_format: str
) -> None:
    journal = open_journal(format=log_format)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "append_line", full)
    journal.say("problem", "paused: disk")
    first, second = home.log.read_text().splitlines()
    assert "paused: disk" in first
    assert "state/events.jsonl cannot be written: [Errno 28] No space left on device" in second


def test_the_log_is_rotated(home: Home, open_journal: Callable[..., Journal]) -> None:
    journal = open_journal(max_bytes=4096, keep=2)
    for _ in range(200):
        journal.say("x", "y" * 80)
    assert sorted(path.name for path in home.logs.iterdir()) == ["daemon.log", "daemon.log.1", "daemon.log.2"]
    assert all(path.stat().st_size <= 4096 for path in home.logs.iterdir())


def test_progress_is_a_line_now_and_then(home: Home, open_journal: Callable[..., Journal]) -> None:
    journal = open_journal()
    for done in range(1, 50):
        journal.progress(name="x", done=done, planned=100, loss=None, text=f"step {done}")
    journal.progress_over()
    journal.progress(name="y", done=1, planned=100, loss=None, text=f"{EVIL} begins")
    lines = home.log.read_text(encoding="utf-8").splitlines()
    assert [line.split("INFO    ")[1] for line in lines] == ["step 1", f"{SAFE} begins"]
    assert not home.events.exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_makes_room_for_lines(
    home: Home, open_journal: Callable[..., Journal], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    journal = open_journal()
    journal.progress_over()
    journal.say("planned", "before the bar")
    for done in (1, 2):
        journal.progress(name=EVIL, done=done, planned=4, loss=0.5 if done > 1 else None, text="not told")
    journal.say("saved", "beside the bar")
    journal.progress_over()
    shown = terminal.getvalue()
    assert "not told" not in shown
    assert "beside the bar\n" in shown
    assert SAFE[:40] in shown
    assert "2/4" in shown
    assert "loss 0.5000" in shown
    assert "\x1b[31m" not in shown


def test_other_settings_hold_from_the_next_line_on(
    home: Home, open_journal: Callable[..., Journal], capsys: pytest.CaptureFixture[str]
) -> None:
    journal = open_journal()
    journal.say("one", "the first")
    journal.configure(LogSettings(format="json"))
    journal.say("two", "the second")
    first, second = home.log.read_text().splitlines()
    assert first.endswith(" INFO    the first")
    assert json.loads(second)["event"] == "two"
    assert capsys.readouterr().err.splitlines() == [first, second]
