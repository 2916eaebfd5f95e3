from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from longrun import locks
from longrun.errors import Locked
from tests.unit.test_disk import failing

REPOSITORY = Path(__file__).resolve().parents[2]

HOLD = "import sys, time; from pathlib import Path; from longrun import locks; {}"
TAKE = (
    "lock = locks.Lock.take(Path(sys.argv[1]), what='a test', wait_s=0.05); print('held', flush=True); time.sleep(60)"
)


def holding(path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-S", "-c", HOLD.format(TAKE), str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)


def test_a_held_lock_names_its_holder(tmp_path: Path) -> None:
    with locks.Lock.take(tmp_path / "lock", what="the Longrun daemon"):
        second = holding(tmp_path / "lock")
        _, said = second.communicate()
    assert second.returncode == 1
    assert f"is held by the Longrun daemon (pid {os.getpid()}, since 20" in said
    assert "longrun.errors.Locked" in said


def test_a_lock_is_gone_with_its_process_however_that_ends(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    other = holding(path)
    assert other.stdout.readline() == "held\n"
    found = locks.holder(path)
    assert found is not None
    assert (found["pid"], found["what"]) == (other.pid, "a test")
    with pytest.raises(Locked):
        locks.Lock.take(path, what="x", wait_s=0)
    other.send_signal(signal.SIGKILL)
    other.communicate()
    assert locks.holder(path) is None
    locks.Lock.take(path, what="x", wait_s=0).release()


def test_asking_for_the_holder_disturbs_nobody(tmp_path: Path) -> None:
    assert locks.holder(tmp_path / "absent") is None
    assert not (tmp_path / "absent").exists()
    locks.Lock.take(tmp_path / "lock", what="x").release()
    assert locks.holder(tmp_path / "lock") is None
    locks.Lock.take(tmp_path / "lock", what="x", wait_s=0).release()


def test_two_who_ask_at_once_do_not_find_each_other(tmp_path: Path) -> None:
    locks.Lock.take(tmp_path / "lock", what="x").release()
    asking = os.open(tmp_path / "lock", os.O_RDWR)
    locks.fcntl.flock(asking, locks.fcntl.LOCK_SH)  # as the other does, for a moment
    assert locks.holder(tmp_path / "lock") is None
    os.close(asking)


def test_a_lock_whose_file_was_removed_as_stale_is_taken_again_unless_another_was_quicker(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.Lock.take(path, what="first") as first:
        first.keep()
        path.unlink()
        first.keep()
        assert (locks.holder(path) or {})["what"] == "first"
        path.unlink()
        with locks.Lock.take(path, what="second", wait_s=0), pytest.raises(Locked, match="held by second"):
            first.keep()


def test_a_lock_that_was_waited_for_under_a_name_that_is_another_by_now_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    former = locks.Lock.take(path, what="former")
    others: list[locks.Lock] = []

    def replaced(_: float) -> None:
        path.unlink()
        former.release()
        monkeypatch.undo()
        others.append(locks.Lock.take(path, what="other", wait_s=0))

    monkeypatch.setattr(locks.time, "sleep", replaced)
    with pytest.raises(Locked, match="held by other"):
        locks.Lock.take(path, what="late", wait_s=0.1)
    others[0].release()


def test_a_short_wait_outlasts_one_who_only_asks(tmp_path: Path) -> None:
    asking = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    locks.fcntl.flock(asking, locks.fcntl.LOCK_EX)
    started = time.monotonic()
    with pytest.raises(Locked):
        locks.Lock.take(tmp_path / "lock", what="x", wait_s=0.03)
    assert time.monotonic() - started >= 0.03
    os.close(asking)


@pytest.mark.parametrize("note", [b"", b"{", b"[]", b"\xff"])
def test_a_note_that_says_nothing_is_still_a_held_lock(tmp_path: Path, note: bytes) -> None:
    with locks.Lock.take(tmp_path / "lock", what="x"):
        (tmp_path / "lock").write_bytes(note)
        assert locks.holder(tmp_path / "lock") == {}
        with pytest.raises(Locked, match=r"another process \(pid \?"):
            locks.Lock.take(tmp_path / "lock", what="y", wait_s=0)


def test_the_holder_is_told_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.open

    def read_only(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return really(path, flags, *rest, **options)

    with locks.Lock.take(tmp_path / "lock", what="x"):
        monkeypatch.setattr(os, "open", read_only)
        found = locks.holder(tmp_path / "lock")
    assert found is not None
    assert found["what"] == "x"
    assert locks.holder(tmp_path / "lock") is None


def test_a_lock_can_be_taken_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
    with locks.Lock.take(tmp_path / "lock", what="x"):
        assert locks.holder(tmp_path / "lock") == {}


def test_a_note_is_shorter_than_the_one_before(tmp_path: Path) -> None:
    locks.Lock.take(tmp_path / "lock", what="x" * 500).release()
    locks.Lock.take(tmp_path / "lock", what="y").release()
    assert json.loads((tmp_path / "lock").read_bytes())["what"] == "y"


def test_a_shared_lock_keeps_out_only_who_wants_it_alone(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locks.Lock.take(path, what="one", shared=True), locks.Lock.take(path, what="two", shared=True, wait_s=0):
        with pytest.raises(Locked, match=r"cannot start x: the store is held by two .*; wait"):
            locks.Lock.take(path, what="x", wait_s=0, held=Path("the store"), hint="wait")
        assert locks.holder(path) is None, "nobody has it alone"
    with locks.Lock.take(path, what="alone", wait_s=0), pytest.raises(Locked, match="held by alone"):
        locks.Lock.take(path, what="x", shared=True, wait_s=0)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("there", [False, True])
def test_a_lock_to_read_needs_no_right_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, there: bool
) -> None:
    opened = os.open
    if there:
        (tmp_path / "lock").write_bytes(b"")

    def read_only(path: Path, flags: int, *rest: Any) -> int:
        return failing(number)() if flags & os.O_CREAT else opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", read_only)
    locks.Lock.take(tmp_path / "lock", what="x", shared=True).release()
    with pytest.raises(OSError, match=os.strerror(number)):
        locks.Lock.take(tmp_path / "lock", what="x")
