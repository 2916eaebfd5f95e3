from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest

from longrun import disk


def failing(number: int) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- complete or absent


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_whole(tmp_path: Path, durable: bool) -> None:
    disk.write_file(tmp_path / "x", b"old", durable=durable)
    disk.write_file(tmp_path / "x", b"new", durable=durable)
    assert (tmp_path / "x").read_bytes() == b"new"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(os, call, failing(errno.ENOSPC))
    for write in (
        lambda: disk.write_file(tmp_path / "x", b"new"),
        lambda: disk.copy_file(tmp_path / "x", tmp_path / "x"),
    ):
        with pytest.raises(OSError, match="No space left"):
            write()
    assert (tmp_path / "x").read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


def test_a_write_that_is_refused_tells_of_the_file_that_was_meant(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for write in (lambda: disk.write_file(tmp_path / "x", b""), lambda: disk.copy_file(Path(__file__), tmp_path / "x")):
        with pytest.raises(IsADirectoryError) as refused:
            write()
        assert str(refused.value) == f"[Errno 21] Is a directory: '{tmp_path / 'x'}'"


@pytest.mark.parametrize("name", ["x" * 255, "\N{EURO SIGN}" * 85, "\udcff" * 255])
def test_the_longest_names_have_room_for_a_name_aside(tmp_path: Path, name: str) -> None:
    disk.write_file(tmp_path / name, b"content")
    disk.copy_file(tmp_path / name, tmp_path / name)
    assert names(tmp_path) == [name]


def test_a_copy_is_apart_from_its_source(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    os.link(tmp_path / "a", tmp_path / "b")
    disk.copy_file(tmp_path / "a", tmp_path / "a")
    (tmp_path / "b").write_bytes(b"2")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_bytes_are_durable_before_their_name_and_the_name_after_that(tmp_path: Path, disk_log: list[str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "source").write_bytes(b"1")
    for write in (
        lambda: disk.write_file(tmp_path / "folder" / "x", b"new"),
        lambda: disk.copy_file(tmp_path / "source", tmp_path / "folder" / "x"),
    ):
        disk_log.clear()
        write()
        assert [re.sub(r"\.x\..*tmp", "ASIDE", line) for line in disk_log] == ["sync ASIDE", "rename x", "sync folder"]


def test_a_note_is_only_renamed(tmp_path: Path, disk_log: list[str]) -> None:
    disk.write_file(tmp_path / "x", b"new", durable=False)
    assert disk_log == ["rename x"]


def test_both_folders_of_a_rename_are_synced(tmp_path: Path, disk_log: list[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "a").write_bytes(b"1")
    disk.rename(tmp_path / "a", tmp_path / "in" / "b")
    assert disk_log == ["rename b", "sync in", f"sync {tmp_path.name}"]
    disk_log.clear()
    disk.rename(tmp_path / "in" / "b", tmp_path / "in" / "c")
    assert disk_log == ["rename c", "sync in"]


def test_a_name_in_a_folder_held_open_is_durable(tmp_path: Path, disk_log: list[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "new").mkdir()
    held = os.open(tmp_path / "model", os.O_RDONLY)
    disk.rename_into(tmp_path / "new", "checkpoint-1", held)
    os.close(held)
    assert disk_log == ["rename checkpoint-1", "sync model"]


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_new_name_never_replaces_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_one_step: bool) -> None:
    if not in_one_step:
        monkeypatch.setattr(disk, "RENAME_NOREPLACE", 1 << 20)  # which no kernel knows
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    with pytest.raises(FileExistsError):
        disk.rename_new(tmp_path / "a", tmp_path / "b")
    disk.rename_new(tmp_path / "a", tmp_path / "c")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"b": b"2", "c": b"1"}


def test_a_move_to_a_new_name_cannot_be_killed_halfway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"1")
    for step in ("link", "unlink"):
        monkeypatch.delattr(os, step)
    disk.rename_new(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_copy_to_a_new_name_leaves_what_came_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"mine")
    names = iter(["x", "x", "y"])

    def find_name() -> Path:
        name = next(names)
        if name == "x":
            (tmp_path / "x").write_bytes(b"theirs")
        return tmp_path / name

    assert disk.copy_new(tmp_path / "in", find_name) == tmp_path / "y"
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == {"in": b"mine", "x": b"theirs", "y": b"mine"}


def test_a_removed_folder_takes_no_new_names_even_if_another_stands_at_its_path(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "new").mkdir()
    held = os.open(tmp_path / "model", os.O_RDONLY)
    (tmp_path / "model").rmdir()
    (tmp_path / "model").mkdir()
    with pytest.raises(FileNotFoundError):
        disk.rename_into(tmp_path / "new", "checkpoint-1", held)
    os.close(held)
    assert names(tmp_path / "model") == []


def test_a_folder_held_open_takes_a_name_wherever_it_was_moved(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "new").mkdir()
    held = os.open(tmp_path / "model", os.O_RDONLY)
    (tmp_path / "model").rename(tmp_path / "moved")
    disk.rename_into(tmp_path / "new", "checkpoint-1", held)
    os.close(held)
    assert names(tmp_path / "moved") == ["checkpoint-1"]


def test_contents_are_synced_before_names(tmp_path: Path, disk_log: list[str]) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"1")
    disk.sync_tree(tmp_path / "a")
    assert disk_log == ["sync file", "sync b", "sync a"]


def test_many_trees_are_synced_and_an_error_is_heard(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(20)]
    for folder in folders:
        folder.mkdir()
    disk.sync_trees(folders)
    with pytest.raises(FileNotFoundError):
        disk.sync_trees([*folders, tmp_path / "absent"])


# -- sharing


def test_a_shared_file_has_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    disk.share_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"weights"


def test_blocks_are_cloned_where_the_file_system_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    monkeypatch.setattr(disk.fcntl, "ioctl", lambda new, _, old: os.write(new, os.pread(old, 99, 0)))
    disk.share_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"weights"
    assert (tmp_path / "a").stat().st_nlink == 1


def test_a_file_is_linked_where_blocks_cannot_be_cloned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    monkeypatch.setattr(disk.fcntl, "ioctl", failing(errno.EOPNOTSUPP))
    disk.share_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").samefile(tmp_path / "b")


def test_a_file_is_copied_where_it_cannot_be_linked_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    monkeypatch.setattr(disk.fcntl, "ioctl", failing(errno.EOPNOTSUPP))
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    disk.share_file(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"weights"
    assert names(tmp_path) == ["a", "b"]


# -- copying


def moved_by(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Let the kernel be able to copy in this way only."""
    if way == "clone":
        monkeypatch.setattr(disk.fcntl, "ioctl", lambda new, _, old: os.write(new, os.pread(old, 1 << 25, 0)))
    elif way == "by hand":
        monkeypatch.setattr(os, "copy_file_range", failing(errno.EXDEV))
    elif way == "half":
        monkeypatch.setattr(os, "copy_file_range", half_copied)


def half_copied(source: int, target: int, _: int, offset_src: int, offset_dst: int) -> int:
    """A file system that says too early that it is at the end (as procfs and some FUSE do)."""
    return 0 if offset_src else os.pwrite(target, os.pread(source, 5, 0), offset_dst)


@pytest.mark.parametrize("read_back", [False, True])
@pytest.mark.parametrize("size", [0, 1, 7, disk.CHUNK_BYTES + 1, disk.COPY_BYTES + 1])
@pytest.mark.parametrize("way", ["kernel", "clone", "by hand", "half"])
def test_what_is_hashed_is_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, size: int, read_back: bool
) -> None:
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "a").write_bytes(content)
    moved_by(monkeypatch, way)
    pieces: list[int] = []
    with (tmp_path / "a").open("rb") as source:
        digest = disk.copy_hashed(source.fileno(), tmp_path / "b", read_back=read_back, on_bytes=pieces.append)
    assert digest == disk.hashlib.sha256(content).hexdigest()
    assert ((tmp_path / "b").read_bytes(), sum(pieces)) == (content, size)


@pytest.mark.parametrize("read_back", [False, True])
def test_a_copy_that_went_wrong_has_another_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_back: bool
) -> None:
    """As openzfs#15526 did: holes where bytes were, and no error."""
    (tmp_path / "a").write_bytes(b"weights")
    monkeypatch.setattr(os, "copy_file_range", zeros_once())
    with (tmp_path / "a").open("rb") as source:
        digest = disk.copy_hashed(source.fileno(), tmp_path / "b", read_back=read_back)
    assert digest == disk.hashlib.sha256(bytes(7)).hexdigest()


def zeros_once() -> Any:
    calls: list[int] = []

    def copy(_: int, target: int, *__: Any, offset_dst: int, **___: Any) -> int:
        calls.append(1)
        return os.pwrite(target, bytes(7), offset_dst) if len(calls) == 1 else 0

    return copy


@pytest.mark.parametrize("call", ["copy_file_range", "fsync"])
def test_an_error_of_a_copy_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    monkeypatch.setattr(os, call, failing(errno.EIO))
    with (tmp_path / "a").open("rb") as source, pytest.raises(OSError, match="Input/output"):
        disk.copy_hashed(source.fileno(), tmp_path / "b")
    monkeypatch.undo()
    monkeypatch.setattr(disk.fcntl, "ioctl", failing(errno.EIO))
    with (tmp_path / "a").open("rb") as source, pytest.raises(OSError, match="Input/output"):
        disk.copy_hashed(source.fileno(), tmp_path / "c")


def test_a_copy_that_lost_its_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    monkeypatch.setattr(disk.fcntl, "ioctl", lambda *_: 0)  # a clone of nothing
    with (tmp_path / "a").open("rb") as source:
        assert disk.copy_hashed(source.fileno(), tmp_path / "b") == disk.hashlib.sha256(b"").hexdigest()
    monkeypatch.setattr(disk, "_copied", lambda *_: iter([7]))
    with (tmp_path / "a").open("rb") as source, pytest.raises(OSError, match="the copy ends too early"):
        disk.copy_hashed(source.fileno(), tmp_path / "c")


@pytest.mark.parametrize("read_back", [False, True])
def test_a_copy_can_be_stopped_at_any_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_back: bool) -> None:
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(disk, "COPY_BYTES", 4)
    (tmp_path / "a").write_bytes(b"weights")
    with (tmp_path / "a").open("rb") as source, pytest.raises(KeyboardInterrupt):
        disk.copy_hashed(source.fileno(), tmp_path / "b", read_back=read_back, on_bytes=stop)
    assert (tmp_path / "b").read_bytes() == b"weig"


def test_what_comes_in_pieces_is_hashed_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, piece: write(file, bytes(piece[:2])))  # not all at once
    pieces: list[int] = []
    digest = disk.write_hashed([b"wei", b"", b"ghts"], tmp_path / "b", pieces.append)
    assert digest == disk.hashlib.sha256(b"weights").hexdigest()
    assert ((tmp_path / "b").read_bytes(), pieces) == (b"weights", [3, 4])


def test_nothing_is_copied_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    with (tmp_path / "a").open("rb") as source, pytest.raises(FileExistsError):
        disk.copy_hashed(source.fileno(), tmp_path / "a")
    with pytest.raises(FileExistsError):
        disk.write_hashed([b"2"], tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_whether_blocks_can_be_shared_is_tried_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"1")
    for found, able in ((failing(errno.EOPNOTSUPP), False), (lambda *_: 0, True)):
        monkeypatch.setattr(disk.fcntl, "ioctl", found)
        assert disk.can_clone(tmp_path / "a", tmp_path) is able
        with (tmp_path / "a").open("rb") as file:
            assert disk.can_clone(file.fileno(), tmp_path) is able
            assert file.read() == b"1"
    monkeypatch.setattr(disk.fcntl, "ioctl", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        disk.can_clone(tmp_path / "a", tmp_path)
    assert names(tmp_path) == ["a"]


def test_what_is_forgotten_is_still_there(tmp_path: Path) -> None:
    disk.write_file(tmp_path / "a", b"weights")
    disk.forget_cached(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"weights"


# -- changing places


def two_folders(folder: Path) -> tuple[Path, Path]:
    for name in ("first", "second"):
        (folder / name).mkdir()
        (folder / name / name).write_bytes(b"")
    return folder / "first", folder / "second"


@pytest.mark.parametrize("way", ["kernel", "no such call", "not in this file system"])
def test_two_folders_change_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    first, second = two_folders(tmp_path)
    if way == "no such call":
        monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    elif way == "not in this file system":
        monkeypatch.setattr(disk, "RENAME_EXCHANGE", 1 << 20)  # which no kernel knows
    disk.swap(first, second)
    assert (names(first), names(second), names(tmp_path)) == (["second"], ["first"], ["first", "second"])


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_swap_that_fails_has_changed_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int) -> None:
    first, second = two_folders(tmp_path)
    rename, calls = Path.rename, []

    def fail(source: Path, target: Path) -> Path:
        calls.append(target)
        return failing(errno.EIO)() if len(calls) == fails_at else rename(source, target)

    monkeypatch.setattr(disk, "RENAME_EXCHANGE", 1 << 20)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        disk.swap(first, second)
    assert (names(first), names(second), names(tmp_path)) == (["first"], ["second"], ["first", "second"])


def test_a_swap_with_nothing_is_an_error(tmp_path: Path) -> None:
    first, _ = two_folders(tmp_path)
    with pytest.raises(FileNotFoundError):
        disk.swap(first, tmp_path / "absent")
    assert names(tmp_path) == ["first", "second"]


# -- deleting


def test_a_tree_leaves_its_name_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model" / "deep").mkdir(parents=True)
    monkeypatch.setattr(disk.shutil, "rmtree", lambda *_, **__: None)  # a kill comes before the deletion
    disk.remove_tree(tmp_path / "model", tmp_path / "trash")
    assert names(tmp_path) == ["trash"]
    monkeypatch.undo()
    disk.empty_folder(tmp_path / "trash")
    assert names(tmp_path / "trash") == []


def test_removing_what_is_not_there_is_no_fault(tmp_path: Path) -> None:
    disk.remove_tree(tmp_path / "absent", tmp_path / "trash")
    assert not disk.remove_file(tmp_path / "absent")


def test_a_folder_is_emptied_of_files_folders_and_links(tmp_path: Path) -> None:
    (tmp_path / "keep").mkdir()
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "file").write_bytes(b"1")
    (tmp_path / "x" / "link").symlink_to(tmp_path / "keep")
    disk.empty_folder(tmp_path / "x")
    assert names(tmp_path) == ["keep", "x"]
    assert names(tmp_path / "x") == []


def test_remains_are_removed_as_far_as_that_goes(tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    disk.remove_remains(tmp_path / "x")
    disk.remove_remains(tmp_path / "x")
    assert names(tmp_path) == []


def test_only_an_empty_folder_is_removed_by_name(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").write_bytes(b"1")
    with pytest.raises(OSError, match="not empty"):
        disk.remove_folder(tmp_path / "x")
    assert disk.remove_file(tmp_path / "x" / "file")
    disk.remove_folder(tmp_path / "x")
    assert names(tmp_path) == []


# -- measuring


def test_a_hash_tells_of_each_piece_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"a" * (disk.CHUNK_BYTES + 1))
    pieces: list[int] = []
    digest = disk.hash_file(tmp_path / "x", pieces.append)
    assert digest == disk.hashlib.sha256(b"a" * (disk.CHUNK_BYTES + 1)).hexdigest()
    assert pieces == [disk.CHUNK_BYTES, 1]


def test_bytes_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"123")
    (tmp_path / "y").write_bytes(b"4")
    assert disk.tree_bytes(tmp_path) == 4
    assert 0 < disk.free_bytes(tmp_path) <= os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize


def test_a_line_cut_off_by_a_crash_harms_only_itself(tmp_path: Path) -> None:
    disk.append_line(tmp_path / "x", "one")
    with (tmp_path / "x").open("ab") as file:
        file.write(b'{"cut')
    disk.append_line(tmp_path / "x", "two")
    disk.append_line(tmp_path / "x", "three")
    assert (tmp_path / "x").read_text() == 'one\n{"cut\ntwo\nthree\n'


def test_a_folder_that_is_made_can_be_reached_after_a_crash(tmp_path: Path, disk_log: list[str]) -> None:
    disk.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert disk_log == [f"sync {tmp_path.name}", "sync a"]
    disk.make_folder(tmp_path / "a" / "b")
    assert len(disk_log) == 2
