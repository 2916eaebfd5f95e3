from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import watchdog.observers.api

from longrun import disk, inbox
from longrun.config import InboxSettings
from longrun.inbox import Bell, Inbox
from longrun.job import JobState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from longrun.home import Home

Told = list[tuple[str, str]]


@pytest.fixture
def told() -> Told:
    return []


@pytest.fixture
def box(home: Home, told: Told) -> Inbox:
    return Inbox(home, InboxSettings(), lambda event, text, **_: told.append((event, text)))


def drop(home: Home, name: str, content: bytes = b"{}\n", *, changed_at: int = 0) -> Path:
    path = home.inbox / name
    path.write_bytes(content)
    os.utime(path, ns=(changed_at, changed_at))
    return path


def settled(box: Inbox) -> list[str]:
    """What is found when nothing more happens."""
    box.scan(0.0)
    return box.scan(1000.0)


def claimed(home: Home) -> dict[str, bytes]:
    files = sorted(home.jobs.glob("*/claimed/*"))
    return {f"{path.parent.parent.name}/{path.name}": path.read_bytes() for path in files}


# -- names


@pytest.mark.parametrize(
    "name",
    [
        *("x.jsonl", "x.jsonl.gz", "X.JSONL.ZST", "-rf.jsonl", "a b.jsonl", "a\nb.jsonl", "\udcff\udc80.jsonl"),
        *("\x1b[2J.jsonl", "x" * 249 + ".jsonl", "\N{EURO SIGN}" * 83 + ".jsonl", "a.part.jsonl"),
    ],
)
def test_a_name_is_accepted(home: Home, box: Inbox, told: Told, name: str) -> None:
    drop(home, name)
    assert settled(box) == [name]
    assert [job.name for job in box.claim([name], 1)] == [name]
    assert list(home.claimed(1).iterdir()) == [home.claimed(1) / name]
    assert told == []


@pytest.mark.parametrize("name", ["x.json", "x.txt", "jsonl", "x.jsonl.bz2", "x.jsonl\n", "x.jsonl.gz.1", "x.jsonl "])
def test_a_name_is_left_alone_with_one_warning(home: Home, box: Inbox, told: Told, name: str) -> None:
    drop(home, name)
    assert [settled(box), settled(box)] == [[], []]
    assert [(event, name in text) for event, text in told] == [("left", True)]


@pytest.mark.parametrize(
    "name",
    [
        *(".x.jsonl", "~x.jsonl", "#x.jsonl#", "x.jsonl~", "x.jsonl.part", "x.crdownload", "x.jsonl.TMP", "x.swp"),
        *(".x.jsonl.Ab12Cd", "x.jsonl.filepart", "@eaDir"),
    ],
)
def test_a_name_of_something_unfinished_is_ignored(home: Home, box: Inbox, told: Told, name: str) -> None:
    drop(home, name)
    assert settled(box) == []
    assert (told, box.settling) == ([], [])


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "inside.jsonl").write_bytes(b"{}\n")


MAKERS: dict[str, Any] = {
    "folder": make_folder,
    "symbolic link": lambda path: path.symlink_to("/etc/hostname"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "named pipe": os.mkfifo,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_no_regular_file_is_left_alone_with_one_warning(home: Home, box: Inbox, told: Told, kind: str) -> None:
    MAKERS[kind](home.inbox / "x.jsonl")
    assert [settled(box), settled(box)] == [[], []]
    assert len(told) == 1
    assert "inbox/x.jsonl is left alone: " in told[0][1]


def test_a_warning_is_given_again_for_another_arrival(home: Home, box: Inbox, told: Told) -> None:
    for _ in range(2):
        path = drop(home, "x.txt")
        box.scan(0)
        path.unlink()
        box.scan(0)
    assert len(told) == 2


# -- settling


def test_a_file_settles_when_nothing_about_it_changes(home: Home, box: Inbox) -> None:
    path = drop(home, "x.jsonl")
    assert [box.scan(0.0), box.scan(0.9)] == [[], []]
    assert box.settling == ["x.jsonl"]
    with path.open("ab") as file:
        file.write(b"{}\n")
    assert [box.scan(1.1), box.scan(2.0)] == [[], []]
    assert box.scan(2.2) == ["x.jsonl"]


def test_an_old_time_of_change_proves_nothing(home: Home, box: Inbox) -> None:
    path = drop(home, "x.jsonl", changed_at=1)
    box.scan(0.0)
    path.unlink()
    drop(home, "x.jsonl", changed_at=1)  # cp -p: same name, size and time, another file
    assert [box.scan(1.1), box.scan(2.2)] == [[], ["x.jsonl"]]


def test_a_file_held_open_for_writing_has_not_settled(home: Home, box: Inbox) -> None:
    path = drop(home, "x.jsonl")
    with path.open("ab"):
        assert settled(box) == []
        assert box.being_written == ["x.jsonl"]
    assert box.scan(1001.0) == ["x.jsonl"]
    assert box.being_written == []


def test_a_reader_does_not_keep_a_file_waiting(home: Home, box: Inbox) -> None:
    with drop(home, "x.jsonl").open("rb"):
        assert settled(box) == ["x.jsonl"]


def test_what_was_being_written_and_is_gone_is_forgotten(home: Home, box: Inbox) -> None:
    path = drop(home, "x.jsonl")
    with path.open("ab"):
        settled(box)
    path.unlink()
    box.scan(1001.0)
    assert (box.settling, box.being_written) == ([], [])


def test_without_leases_only_time_can_tell(home: Home, box: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    drop(home, "x.jsonl")
    monkeypatch.setattr(inbox, "has_writer", lambda _: None)
    assert [box.scan(0.0), box.scan(9.9), box.scan(10.1)] == [[], [], ["x.jsonl"]]


def test_whether_there_is_a_writer_may_be_unknown(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    path = drop(home, "x.jsonl")
    assert inbox.has_writer(path) is False
    assert inbox.has_writer(home.inbox / "absent") is None
    os.mkfifo(home.inbox / "fifo")
    assert inbox.has_writer(home.inbox / "fifo") is None
    monkeypatch.delattr(inbox.fcntl, "F_SETLEASE")
    assert inbox.has_writer(path) is None


def test_a_file_that_vanishes_during_a_look_is_no_fault(home: Home, box: Inbox) -> None:
    with os.scandir(drop(home, "x.jsonl").parent) as entries:
        entry = next(entries)
    (home.inbox / "x.jsonl").unlink()
    assert box._look(entry) == {}


def test_files_are_taken_oldest_first_and_then_by_name(home: Home, box: Inbox) -> None:
    drop(home, "a.jsonl", changed_at=3)
    drop(home, "c.jsonl", changed_at=1)
    drop(home, "b.jsonl", changed_at=1)
    drop(home, "\udcff.jsonl", changed_at=1)
    assert settled(box) == ["b.jsonl", "c.jsonl", "\udcff.jsonl", "a.jsonl"]


def test_the_next_look_is_when_something_could_have_settled(home: Home, box: Inbox) -> None:
    box.scan(0.0)
    assert box.next_look(0.0) == 5.0
    drop(home, "x.jsonl")
    box.scan(10.0)
    assert box.next_look(10.0) == pytest.approx(1.0)
    assert box.next_look(10.999) == 0.02
    assert box.next_look(12.0) == 5.0


def test_a_removed_inbox_is_made_again(home: Home, box: Inbox) -> None:
    home.inbox.rmdir()
    assert box.scan(0.0) == []
    assert home.inbox.is_dir()


# -- claiming


def test_a_settled_file_is_claimed_once(home: Home, box: Inbox) -> None:
    drop(home, "x.jsonl", b"content")
    (job,) = box.claim(settled(box), 7)
    assert (job.number, job.name, job.state) == (7, "x.jsonl", JobState.CLAIMED)
    assert claimed(home) == {"000007/x.jsonl": b"content"}
    assert settled(box) == []
    assert box.settling == []


def test_a_claim_is_durable(home: Home, box: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    drop(home, "x.jsonl")
    names = settled(box)
    synced: list[Path] = []
    monkeypatch.setattr(disk, "sync_folder", lambda folder: synced.append(folder))
    monkeypatch.setattr(disk, "sync_file", lambda file: synced.append(file))
    box.claim(names, 1)
    file = home.claimed(1) / "x.jsonl"
    assert synced == [file.parent, home.job(1), home.jobs, file, file.parent, home.inbox]


@pytest.mark.parametrize("writer", [False, True])
def test_what_was_claimed_when_the_inbox_went_stays_claimed_or_goes_back(
    home: Home, box: Inbox, monkeypatch: pytest.MonkeyPatch, writer: bool
) -> None:
    drop(home, "x.jsonl", b"content")
    real = disk.move

    def then_gone(source: Path, target: Path) -> None:
        real(source, target)
        source.parent.rmdir()

    monkeypatch.setattr(disk, "move", then_gone)
    monkeypatch.setattr(inbox, "has_writer", lambda path: writer)
    jobs = box.claim(["x.jsonl"], 1)
    if writer:
        assert (jobs, claimed(home)) == ([], {})
        assert (home.inbox / "x.jsonl").read_bytes() == b"content"
    else:
        assert [job.name for job in jobs] == ["x.jsonl"]
        assert claimed(home) == {"000001/x.jsonl": b"content"}


def test_a_file_that_vanished_leaves_no_job(home: Home, box: Inbox) -> None:
    drop(home, "b.jsonl")
    jobs = box.claim(["a.jsonl", "b.jsonl"], 1)
    assert [(job.number, job.name) for job in jobs] == [(1, "b.jsonl")]
    assert claimed(home) == {"000001/b.jsonl": b"{}\n"}
    assert box.claim(["a.jsonl"], 2) == []
    assert [path.name for path in home.jobs.iterdir()] == ["000001"]


def test_a_file_with_a_second_name_gets_bytes_of_its_own(home: Home, box: Inbox) -> None:
    path = drop(home, "x.jsonl", b"1")
    os.link(path, home.root / "second")
    box.claim(["x.jsonl"], 1)
    (home.root / "second").write_bytes(b"2")
    assert claimed(home) == {"000001/x.jsonl": b"1"}
    assert not path.exists()


def write_at(monkeypatch: pytest.MonkeyPatch, moment: str) -> list[Any]:
    """Somebody opens the file for writing right after the function `moment` of longrun.disk was called."""
    writers: list[Any] = []
    real = getattr(disk, moment)

    def met(source: Path, target: Path) -> None:
        real(source, target)
        writers.append((source if source.exists() else target).open("ab"))

    def met_after_the_pieces(source: Path, target: Path) -> Iterator[int]:
        yield from real(source, target)
        writers.append(source.open("ab"))

    monkeypatch.setattr(disk, moment, met_after_the_pieces if moment == "copy_in_pieces" else met)
    return writers


@pytest.mark.parametrize("second_name", [False, True])
def test_a_writer_that_comes_between_look_and_claim_may_finish(
    home: Home, box: Inbox, monkeypatch: pytest.MonkeyPatch, second_name: bool
) -> None:
    path = drop(home, "x.jsonl", b"1")
    if second_name:
        os.link(path, home.root / "second")
    writers = write_at(monkeypatch, "copy_in_pieces" if second_name else "move")
    assert box.claim(["x.jsonl"], 1) == []
    writers[0].write(b"2")
    writers[0].close()
    assert path.read_bytes() == b"12"
    assert list(home.jobs.iterdir()) == []


def test_a_file_that_changed_while_it_was_copied_is_not_taken(
    home: Home, box: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = drop(home, "x.jsonl", b"1")
    os.link(path, home.root / "second")
    real = disk.copy_in_pieces

    def met(source: Path, target: Path) -> Iterator[int]:
        yield from real(source, target)
        (home.root / "second").write_bytes(b"2")

    monkeypatch.setattr(disk, "copy_in_pieces", met)
    assert box.claim(["x.jsonl"], 1) == []
    assert path.read_bytes() == b"2"
    assert list(home.jobs.iterdir()) == []


def test_a_copy_is_durable_before_its_original_goes(
    home: Home, box: Inbox, monkeypatch: pytest.MonkeyPatch, disk_log: list[str]
) -> None:
    path = drop(home, "x.jsonl")
    os.link(path, home.root / "second")
    real = disk.remove_file

    def removed(path: Path) -> bool:
        disk_log.append(f"remove {path.name}")
        return real(path)

    monkeypatch.setattr(disk, "remove_file", removed)
    box.claim(["x.jsonl"], 1)
    before = disk_log[: disk_log.index("remove x.jsonl")]
    assert before.index("rename origin.json") < before.index("rename x.jsonl")
    assert before[-3].startswith("sync .x.jsonl.")
    assert before[-2:] == ["rename x.jsonl", "sync claimed"]


def test_a_writer_and_a_new_file_of_its_name_both_stay(home: Home, box: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    drop(home, "x.jsonl", b"written")
    writers: list[Any] = []
    real = disk.move

    def met(source: Path, target: Path) -> None:
        real(source, target)
        writers.append(target.open("ab"))
        drop(home, "x.jsonl", b"new")

    monkeypatch.setattr(disk, "move", met)
    assert box.claim(["x.jsonl"], 1) == []
    writers[0].close()
    assert {path.name: path.read_bytes() for path in home.inbox.iterdir()} == {
        "x.jsonl": b"new",
        "x.2.jsonl": b"written",
    }


@pytest.mark.parametrize("writing", [True, False])
def test_a_claim_that_died_before_it_was_recorded_goes_back_while_somebody_writes_it(home: Home, writing: bool) -> None:
    home.claimed(1).mkdir(parents=True)
    with (home.claimed(1) / "x.jsonl").open("wb") as writer:
        writer.write(b"{}")
        writer.close() if not writing else writer.flush()
        jobs = inbox.unrecorded(home, lambda _: None)
    if writing:
        assert (jobs, [path.name for path in home.inbox.iterdir()]) == ([], ["x.jsonl"])
        assert list(home.jobs.iterdir()) == []
    else:
        assert [job.name for job in jobs] == ["x.jsonl"]
        assert claimed(home) == {"000001/x.jsonl": b"{}"}


def test_a_link_that_took_the_place_of_a_settled_file_is_not_claimed(home: Home, box: Inbox, tmp_path: Path) -> None:
    path = drop(home, "x.jsonl")
    names = settled(box)
    path.rename(tmp_path / "elsewhere.jsonl")
    path.symlink_to(tmp_path / "elsewhere.jsonl")
    assert box.claim(names, 1) == []
    assert path.is_symlink()
    assert list(home.jobs.iterdir()) == []


def test_a_file_that_can_be_moved_but_not_read_is_left_and_told(
    home: Home, box: Inbox, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = drop(home, "x.jsonl")
    real = os.open
    with monkeypatch.context() as patched:  # root may read everything
        patched.setattr(os, "open", lambda file, *rest, **more: refuse() if file == path else real(file, *rest, **more))
        names = settled(box)
        assert names == ["x.jsonl"]
        assert box.claim(names, 1) == []
        assert (box.settling, box.left_alone) == ([], ["x.jsonl"])
    assert path.exists()
    assert [text for _, text in told] == [
        "inbox/x.jsonl is left alone: it cannot be taken (Permission denied). change its owner or mode"
    ]
    path.chmod(0o644)
    box.scan(1000.0)
    assert (box.settling, box.left_alone) == (["x.jsonl"], [])
    assert [job.name for job in box.claim(box.scan(2000.0), 1)] == ["x.jsonl"]


def test_a_file_that_must_be_copied_and_does_not_fit_stops_no_other(
    home: Home, box: Inbox, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(home, "large.jsonl", b"x" * 3_000_000)
    drop(home, "small.jsonl", b"{}")
    fail_for(monkeypatch, home.inbox, errno.EXDEV)
    with monkeypatch.context() as patched:
        patched.setattr(disk, "free_bytes", lambda _: 1_000_000)
        assert [job.name for job in box.claim(settled(box), 1)] == ["small.jsonl"]
    (text,) = (text for _, text in told)
    assert "it has to be copied and does not fit: 3 MB, and 1 MB are free. Make room: it is tried again" in text
    assert box.scan(1000.0 + inbox.TRY_AGAIN_S - 1) == []
    assert [job.name for job in box.claim(box.scan(1000.0 + inbox.TRY_AGAIN_S), 2)] == ["large.jsonl"]


# -- copies that take many rounds


@pytest.fixture
def far(home: Home, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home whose inbox is on another file system, one that cannot clone, and a round copies one byte."""
    fail_for(monkeypatch, home.inbox, errno.EXDEV)
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: refuse(errno.EOPNOTSUPP))
    monkeypatch.setattr(disk, "COPY_BYTES", 1)
    monkeypatch.setattr(inbox, "COPY_S", 0)
    return home


def test_a_large_copy_takes_a_piece_of_each_round_and_later_files_wait_for_it(far: Home, box: Inbox) -> None:
    drop(far, "a.jsonl", b"123", changed_at=1)
    drop(far, "b.jsonl", b"4", changed_at=2)
    assert box.claim(settled(box), 7) == []
    assert inbox.unrecorded(far, lambda number: number == box.copying) == []
    assert [box.copying, box.go_on_copying(), box.go_on_copying()] == [7, [], []]
    assert claimed(far).keys() == {next(iter(claimed(far)))}, "only the copy, under a name that is not its own yet"
    assert [(job.number, job.name) for job in box.go_on_copying()] == [(7, "a.jsonl")]
    assert box.copying is None
    assert box.claim(settled(box), 8) == []
    assert [(job.number, job.name) for job in box.go_on_copying()] == [(8, "b.jsonl")]
    assert claimed(far) == {"000007/a.jsonl": b"123", "000008/b.jsonl": b"4"}
    assert list(far.inbox.iterdir()) == []


def test_many_small_copies_take_many_rounds(home: Home, box: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_for(monkeypatch, home.inbox, errno.EXDEV)
    monkeypatch.setattr(inbox, "COPY_S", 0.5)
    times = iter((0.0, 0.1, 0.2, 0.6, 1.0, 1.1))
    for number in range(5):
        drop(home, f"{number}.jsonl", changed_at=number)
    names = settled(box)
    monkeypatch.setattr(inbox, "time", SimpleNamespace(monotonic=lambda: next(times), time=time.time))
    assert [job.name for job in box.claim(names, 1)] == ["0.jsonl", "1.jsonl"]
    assert [(job.number, job.name) for job in box.go_on_copying()] == [(3, "2.jsonl")]
    assert box.copying is None


def test_of_a_far_inbox_fewer_files_are_taken_at_once(home: Home, box: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.stat
    assert box.at_once == inbox.CLAIM_AT_ONCE
    far_away = SimpleNamespace(st_dev=-1)
    monkeypatch.setattr(Path, "stat", lambda path: far_away if path == home.inbox else real(path))
    assert box.at_once == inbox.COPY_AT_ONCE


def test_a_copy_that_is_left_in_its_middle_leaves_the_original_alone(far: Home, box: Inbox) -> None:
    drop(far, "x.jsonl", b"123")
    box.claim(settled(box), 1)
    box.abandon()
    assert (box.copying, list(far.jobs.iterdir())) == (None, [])
    assert (far.inbox / "x.jsonl").read_bytes() == b"123"


def test_a_file_that_goes_while_it_is_copied_leaves_no_job(far: Home, box: Inbox) -> None:
    path = drop(far, "x.jsonl", b"12")
    box.claim(settled(box), 1)
    path.unlink()
    assert (box.go_on_copying(), box.copying, list(far.jobs.iterdir())) == ([], None, [])


def test_a_disk_that_fills_up_under_a_copy_is_told_and_the_file_is_taken_later(
    far: Home, box: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(far, "x.jsonl", b"12")
    box.claim(settled(box), 1)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(os, "fsync", lambda _: refuse(errno.ENOSPC))
        box.go_on_copying()
    assert box.copying is None
    assert inbox.unrecorded(far, lambda _: None) == []
    assert (claimed(far), settled(box)) == ({}, ["x.jsonl"])


def fail_for(monkeypatch: pytest.MonkeyPatch, folder: Path, number: int) -> None:
    """Path.rename out of `folder` fails with this error number."""
    real = Path.rename

    def rename(source: Path, target: Path) -> Path:
        if source.parent == folder:
            raise OSError(number, os.strerror(number))
        return real(source, target)

    monkeypatch.setattr(Path, "rename", rename)


def test_an_inbox_on_another_file_system_is_copied_from(
    home: Home, box: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(home, "\udcff.jsonl", b"content")
    fail_for(monkeypatch, home.inbox, errno.EXDEV)
    (job,) = box.claim(settled(box), 1)
    assert job.name == "\udcff.jsonl"
    assert claimed(home) == {"000001/\udcff.jsonl": b"content"}
    assert list(home.inbox.iterdir()) == []


@pytest.mark.parametrize("crash_at", ["sync_folder", "remove_file"])
def test_a_crash_after_the_copy_trains_the_file_once(
    home: Home, box: Inbox, monkeypatch: pytest.MonkeyPatch, crash_at: str
) -> None:
    drop(home, "x.jsonl", b"content")
    names = settled(box)
    fail_for(monkeypatch, home.inbox, errno.EXDEV)
    places = {"sync_folder": home.claimed(1), "remove_file": home.inbox / "x.jsonl"}
    crash(monkeypatch, crash_at, lambda path: path == places[crash_at] and (home.claimed(1) / "x.jsonl").exists())
    with pytest.raises(KeyboardInterrupt):
        box.claim(names, 1)
    monkeypatch.undo()
    assert [job.number for job in inbox.unrecorded(home, lambda _: None)] == [1]
    assert settled(box) == []
    assert claimed(home) == {"000001/x.jsonl": b"content"}


def test_a_claim_whose_sync_failed_is_durable_before_it_is_a_job(
    home: Home, box: Inbox, monkeypatch: pytest.MonkeyPatch, disk_log: list[str]
) -> None:
    drop(home, "x.jsonl")
    names = settled(box)
    with monkeypatch.context() as patched, pytest.raises(PermissionError):
        patched.setattr(disk, "sync_trees", lambda folders: refuse() if "claimed" in str(folders) else None)
        box.claim(names, 1)
    disk_log.clear()
    assert [job.name for job in inbox.unrecorded(home, lambda _: None)] == ["x.jsonl"]
    assert disk_log == ["sync x.jsonl", "sync claimed", "sync inbox"]


@pytest.mark.parametrize("crash_at", ["write_file", "copy_in_pieces", "move"])
def test_a_crash_before_the_copy_is_whole_leaves_the_original(
    home: Home, box: Inbox, monkeypatch: pytest.MonkeyPatch, crash_at: str
) -> None:
    drop(home, "x.jsonl", b"content")
    names = settled(box)
    if crash_at != "move":
        fail_for(monkeypatch, home.inbox, errno.EXDEV)
    crash(monkeypatch, crash_at, lambda _: True)
    with pytest.raises(KeyboardInterrupt):
        box.claim(names, 1)
    (home.claimed(1) / ".x.jsonl.0123abcd.tmp").write_bytes(b"half")
    monkeypatch.undo()
    assert inbox.unrecorded(home, lambda _: None) == []
    assert list(home.jobs.iterdir()) == []
    assert settled(box) == ["x.jsonl"]


def crash(monkeypatch: pytest.MonkeyPatch, function: str, here: Any) -> None:
    """The process dies at this function of longrun.disk: from then on nothing of it has any effect."""
    real = getattr(disk, function)
    everything = {name: getattr(disk, name) for name in ("remove_file", "remove_folder", "remove_tree", "rename_new")}

    def die(path: Path, *rest: Any) -> Any:
        if not here(path):
            return real(path, *rest)
        for name in everything:
            monkeypatch.setattr(disk, name, lambda *_: None)
        raise KeyboardInterrupt

    monkeypatch.setattr(disk, function, die)


def test_the_original_of_a_copy_that_changed_since_is_another_arrival(home: Home, box: Inbox) -> None:
    path = drop(home, "x.jsonl", b"one")
    home.claimed(1).mkdir(parents=True)
    (home.claimed(1) / "x.jsonl").write_bytes(b"one")
    (home.job(1) / inbox.ORIGIN).write_bytes(inbox._origin("x.jsonl", inbox._signature(path.lstat())))
    path.write_bytes(b"another")
    inbox.unrecorded(home, lambda _: True)
    assert settled(box) == ["x.jsonl"]
    path.unlink()
    inbox.unrecorded(home, lambda _: True)
    assert claimed(home) == {"000001/x.jsonl": b"one"}


def test_a_file_that_may_not_be_taken_stops_no_other(
    home: Home, box: Inbox, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(home, "a.jsonl")
    drop(home, "b.jsonl")
    real = disk.move
    monkeypatch.setattr(
        disk, "move", lambda source, target: refuse() if source.name == "a.jsonl" else real(source, target)
    )
    assert [job.name for job in box.claim(settled(box), 1)] == ["b.jsonl"]
    assert [job.name for job in box.claim(settled(box), 2)] == []
    assert [text for _, text in told] == [
        "inbox/a.jsonl is left alone: it cannot be taken (Permission denied). change its owner or mode"
    ]
    assert [path.name for path in home.jobs.iterdir()] == ["000001"]


def refuse(number: int = errno.EACCES) -> None:
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("fails_at", ["stat", "open"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_file_that_the_disk_cannot_read_is_left_alone_and_the_others_are_taken(
    home: Home, box: Inbox, told: Told, monkeypatch: pytest.MonkeyPatch, fails_at: str, number: int
) -> None:
    drop(home, "a.jsonl")
    drop(home, "b.jsonl")
    real_open = inbox._open

    class Entry:
        """What os.scandir gives, of a.jsonl without its facts."""

        def __init__(self, entry: os.DirEntry[str]) -> None:
            self._entry, self.name = entry, entry.name

        def __getattr__(self, name: str) -> Any:
            return getattr(self._entry, name)

        def stat(self, **options: Any) -> os.stat_result:
            return refuse(number) if self.name == "a.jsonl" else self._entry.stat(**options)

    if fails_at == "stat":
        real_scan = os.scandir
        monkeypatch.setattr(os, "scandir", lambda path: contextlib.nullcontext([*map(Entry, real_scan(path))]))
    else:
        monkeypatch.setattr(inbox, "_open", lambda path: refuse(number) if path.name == "a.jsonl" else real_open(path))
        monkeypatch.setattr(inbox, "has_writer", lambda _: False)
    assert [job.name for job in box.claim(settled(box), 1)] == ["b.jsonl"]
    (text,) = (text for _, text in told)
    assert os.strerror(number) in text
    assert (home.inbox / "a.jsonl").exists()


def test_files_that_may_not_be_read_keep_no_other_waiting(
    home: Home, box: Inbox, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many they are, and without making folders for them."""
    monkeypatch.setattr(inbox, "CLAIM_AT_ONCE", 3)
    for number in range(5):
        drop(home, f"{number}.jsonl", changed_at=number)
    drop(home, "good.jsonl", changed_at=9)
    refused = lambda path: path.name != "good.jsonl"  # noqa: E731
    monkeypatch.setattr(inbox, "has_writer", lambda path: None if refused(path) else False)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.R_OK or not refused(Path(path)))
    names = settled(box)
    assert names == ["good.jsonl"]
    assert len(told) == 5
    assert box.scan(1001.0) == ["good.jsonl"]
    assert len(told) == 5, "each is told once"


@pytest.mark.parametrize(
    ("read_only", "number", "to_blame"),
    [((), errno.EACCES, "inbox"), (("inbox",), errno.EROFS, "inbox"), (("", "inbox"), errno.EROFS, "")],
)
def test_what_lets_go_of_no_file_is_told_before_anything_is_copied(
    home: Home, box: Inbox, monkeypatch: pytest.MonkeyPatch, read_only: tuple[str, ...], number: int, to_blame: str
) -> None:
    drop(home, "x.jsonl")
    such = [home.root / place for place in read_only]
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY if path in such else 0))
    box.scan(0.0)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        box.scan(1000.0)
    assert caught.value.filename == str(home.root / to_blame)


def test_a_full_disk_is_told_and_takes_nothing(home: Home, box: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    drop(home, "x.jsonl")
    names = settled(box)
    fail_for(monkeypatch, home.inbox, errno.ENOSPC)
    with pytest.raises(OSError, match="No space left"):
        box.claim(names, 1)
    monkeypatch.undo()
    assert inbox.unrecorded(home, lambda _: None) == []
    assert [job.name for job in box.claim(names, 2)] == ["x.jsonl"]


def test_claimed_files_that_the_ledger_does_not_know_are_found(home: Home, box: Inbox) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        drop(home, name)
    box.claim(settled(box), 1)
    (home.job(9) / "claimed").mkdir(parents=True)
    home.job(10).mkdir()
    (home.jobs / "notes").mkdir()
    found = inbox.unrecorded(home, lambda number: number == 2)
    assert [(job.number, job.name) for job in found] == [(1, "a.jsonl"), (3, "c.jsonl")]
    assert sorted(path.name for path in home.jobs.iterdir()) == ["000001", "000002", "000003", "notes"]


def test_2000_files_are_claimed_in_batches_in_order(home: Home, box: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "CLAIM_AT_ONCE", 500)
    for number in range(2000):
        drop(home, f"{number:04}.jsonl", changed_at=2000 - number)
    names: list[str] = []
    box.scan(0.0)
    while waiting := box.scan(2.0):
        batch = box.claim(waiting, len(names) + 1)
        assert len(batch) == 500
        names += [job.name for job in batch]
    assert names == [f"{number:04}.jsonl" for number in reversed(range(2000))]
    assert sorted(int(path.name) for path in home.jobs.iterdir()) == list(range(1, 2001))


# -- the bell


class Ring:
    """Counts rings, and waits for one."""

    def __init__(self) -> None:
        self.rung = threading.Event()

    def heard(self, wait_s: float = 5.0) -> bool:
        heard = self.rung.wait(wait_s)
        self.rung.clear()
        return heard


@pytest.fixture
def ring() -> Ring:
    return Ring()


@pytest.fixture
def bell(home: Home, ring: Ring, told: Told) -> Iterator[Bell]:
    bell = Bell(home, ring.rung.set, lambda event, text, **_: told.append((event, text)))
    yield bell
    observer = bell._observer
    bell.stop()
    if observer is not None:
        observer.join()


def test_the_bell_rings_for_an_arrival(home: Home, bell: Bell, ring: Ring) -> None:
    bell.check()
    drop(home, "x.jsonl")
    assert ring.heard()


def test_the_bell_does_not_ring_for_our_own_looks(home: Home, box: Inbox, bell: Bell, ring: Ring) -> None:
    drop(home, "x.jsonl")
    bell.check()
    settled(box)
    assert not ring.heard(0.02)
    drop(home, "y.jsonl")
    assert ring.heard()


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_the_bell_survives_its_inbox(home: Home, bell: Bell, ring: Ring, how: str) -> None:
    bell.check()
    if how == "removed":
        home.inbox.rmdir()
    else:
        home.inbox.rename(home.root / "former")
    home.inbox.mkdir()
    former = bell._observer
    bell.check()
    assert bell._observer is not former
    former.join()
    ring.heard(0.01)
    drop(home, "x.jsonl")
    assert ring.heard()


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_bell_survives_an_inbox_that_goes_during_its_check(
    home: Home, bell: Bell, ring: Ring, told: Told, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    real = watchdog.observers.api.BaseObserver.start

    def late(observer: Any) -> None:
        shutil.rmtree(home.inbox, ignore_errors=True)
        real(observer)

    monkeypatch.setattr(watchdog.observers.api.BaseObserver, "start", late)
    if when == "before":
        home.inbox.rmdir()
    bell.check()
    monkeypatch.undo()
    home.inbox.mkdir()
    bell.check()
    drop(home, "x.jsonl")
    assert ring.heard()
    assert told == []


def test_a_bell_that_is_well_is_left_alone(bell: Bell) -> None:
    bell.check()
    observer = bell._observer
    bell.check()
    assert bell._observer is observer


def test_a_watcher_that_died_is_started_again(home: Home, bell: Bell, ring: Ring) -> None:
    bell.check()
    bell._observer.stop()
    bell._observer.join()
    bell.check()
    drop(home, "x.jsonl")
    assert ring.heard()


def test_a_watcher_that_cannot_start_is_one_warning(bell: Bell, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    def limit(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "inotify instance limit reached")

    monkeypatch.setattr("watchdog.observers.api.BaseObserver.start", limit)
    for _ in range(3):
        bell.check()
    bell.stop()
    assert [event for event, _ in told] == ["watch failed"]
    assert "inotify instance limit reached" in told[0][1]
    assert "max_user_instances" in told[0][1]
