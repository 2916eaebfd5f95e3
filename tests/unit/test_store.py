from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from longrun import disk
from longrun import store as stores
from longrun.backups import back_up
from longrun.errors import BadBackup, Locked
from longrun.manifest import BackupType, Manifest
from longrun.retention import Keep
from longrun.store import Damage, Store, check_room, in_parallel, telling
from tests.unit.builders import DAMAGES, content_of, damage, flip_a_bit, keep_backup, plain_model

PRE_RECOVERY, SCHEDULED = BackupType.PRE_RECOVERY, BackupType.SCHEDULED
ONE = Keep(last=1, daily=0, weekly=0, monthly=0)
PAPERS = ["format.json", "RESTORE.txt"]


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def weights_in(store: Store, manifest: Manifest) -> Path:
    """Where the store has the weights of a backup."""
    return store.object(next(file.sha256 for file in manifest.files if file.path.endswith(".safetensors")))


@pytest.fixture
def two(store: Store, model: Path) -> list[Manifest]:
    """Two backups that differ in their weights and share the settings."""
    first = keep_backup(store, model)
    plain_model(model, b"more training")
    return [first, keep_backup(store, model)]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "WAIT_S", 0.0)


@pytest.fixture
def old_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """All content counts as old enough to be removed."""
    monkeypatch.setattr(stores, "YOUNG_S", -60.0)


# -- opening


def test_a_store_says_what_it_is_and_is_for_its_owner_only(store: Store) -> None:
    Store.make(store.root)
    before = content_of(store.root)
    assert before.keys() == {*PAPERS}
    assert sorted(path.name for path in store.root.iterdir() if path.is_dir()) == ["backups", "objects", "tmp"]
    assert store.root.stat().st_mode & 0o777 == 0o700
    Store.make(store.root)
    assert content_of(store.root) == before
    assert Store.open(store.root).ids() == []


def test_a_store_is_durable_before_it_is_used(store: Store, disk_log: list[str]) -> None:
    Store.make(store.root)
    assert disk_log[0] == f"sync {store.root.parent.name}"  # its own name
    assert disk_log[-2:] == ["sync objects", "sync backups"]  # the names in it


def test_a_store_may_lie_where_there_is_an_empty_folder(store: Store) -> None:
    store.root.mkdir()
    assert Store.make(store.root).ids() == []


@pytest.mark.parametrize("name", ["model.safetensors", ".hidden", "backup"])
def test_a_folder_of_something_else_does_not_become_a_store(store: Store, name: str) -> None:
    (store.root / name).mkdir(parents=True)
    with pytest.raises(BadBackup, match=r"backups: it holds something else; name an empty --store"):
        Store.make(store.root)
    assert [path.name for path in store.root.iterdir()] == [name]


def test_a_file_is_no_store(store: Store) -> None:
    store.root.write_bytes(b"")
    with pytest.raises(BadBackup, match="it is not a folder"):
        Store.make(store.root)
    with pytest.raises(BadBackup, match=r"there are no backups in .*; make one with"):
        Store.open(store.root)


def test_what_a_first_backup_left_when_it_was_killed_is_gone_on_with(store: Store, model: Path) -> None:
    Store.make(store.root)
    store.backups.rmdir()
    keep_backup(store, model)
    assert store.damage() == []


def test_a_store_of_a_newer_program_is_left_alone(store: Store) -> None:
    Store.make(store.root)
    (store.root / "format.json").write_text('{"format": "longrun backup store", "version": 2}')
    for use in (Store.open, Store.make):
        with pytest.raises(BadBackup, match="version 2, this program knows 1; use the newer program"):
            use(store.root)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_damaged_note_about_the_format_stops_nothing_and_is_mended(store: Store, content: bytes) -> None:
    Store.make(store.root)
    (store.root / "format.json").write_bytes(content)
    assert [str(found) for found in Store.open(store.root).damage()] == [
        "format.json: missing or changed; the next backup writes it anew"
    ]
    assert Store.make(store.root).damage() == []


# -- finding


def test_backups_are_found_by_id_by_its_beginning_and_by_latest(store: Store, two: list[Manifest]) -> None:
    assert store.ids() == sorted(found.id for found in two)
    assert store.all() == two
    assert store.find(two[0].id) == two[0]
    assert store.find(two[0].id[:-1]) == two[0]
    assert store.find("latest") == two[1]


@pytest.mark.parametrize("name", ["absent", "../backups", "20"])
@pytest.mark.usefixtures("two")
def test_what_is_not_there_or_not_the_only_one_is_told(store: Store, name: str) -> None:
    with pytest.raises(BadBackup, match=rf"cannot find '{name}' in .*: (there is no such|2 backups)"):
        store.find(name)


def test_latest_is_whole(store: Store, model: Path) -> None:
    os.truncate(model / "model.safetensors", 9)
    keep_backup(store, model, PRE_RECOVERY)
    with pytest.raises(BadBackup, match="there is no complete backup"):
        store.find("latest")
    plain_model(model)
    whole = keep_backup(store, model)
    os.truncate(model / "model.safetensors", 9)
    keep_backup(store, model, PRE_RECOVERY)
    assert store.find("latest") == whole


def test_names_of_somebody_else_are_not_backups(store: Store, two: list[Manifest]) -> None:
    (store.backups / "notes").mkdir()
    (store.backups / ".DS_Store").write_bytes(b"")
    assert store.all() == two
    assert store.damage() == []


def test_order_is_that_of_making_whatever_the_clock_did(store: Store, two: list[Manifest]) -> None:
    with store.adding("x") as additions:
        assert additions.next_sequence() == 3
    assert [found.sequence for found in two] == [1, 2]


# -- damage


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", [*PAPERS, "manifest.json", "SHA256SUMS", "object"])
def test_any_damage_is_found_and_whom_it_concerns(store: Store, two: list[Manifest], name: str, how: str) -> None:
    path = weights_in(store, two[0]) if name == "object" else store.folder(two[0].id) / name
    if (name, how) == ("manifest.json", "truncated"):
        damage(path, how)  # its last byte is a newline, without which it says the same
    damage(store.root / name if name in PAPERS else path, how)
    found = store.damage()
    assert len(found) == 1
    assert found[0].backups == ([] if name in PAPERS else [two[0].id])
    assert (store.damage([two[0].id]) == found) is (name not in PAPERS)
    assert store.damage([two[1].id]) == []


def test_sums_that_cannot_be_read_or_replaced_are_a_damage_and_keep_no_backup_from_being_made(
    store: Store, two: list[Manifest], tmp_path: Path
) -> None:
    sums = store.folder(two[0].id) / "SHA256SUMS"
    sums.unlink()
    sums.mkdir()
    [found] = store.damage()
    assert found.what == f"backups/{two[0].id}/SHA256SUMS"
    plain_model(tmp_path / "model")
    assert back_up(store, tmp_path / "model", BackupType.MANUAL).manifest.sequence == 3


def test_what_the_disk_refuses_to_read_of_a_store_is_a_damage(
    store: Store, two: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = (*PAPERS, "SHA256SUMS")
    real = Path.open

    def opened(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name in refused:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)
    assert len(store.damage()) == len(PAPERS) + len(two)


def test_damage_of_shared_content_concerns_all_who_share_it(store: Store, two: list[Manifest]) -> None:
    shared = two[0].digests.keys() & two[1].digests.keys()
    flip_a_bit(store.object(shared.pop()))
    both = sorted(each.id for each in two)
    assert [found.backups for found in store.damage()] == [both]
    assert str(store.damage()[0]).endswith(f": its content has changed; needed by {', '.join(both)}")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_quick_look_finds_what_sizes_tell(store: Store, two: list[Manifest], how: str) -> None:
    damage(weights_in(store, two[1]), how)
    assert [found.backups for found in store.damage(quick=True)] == ([] if how == "flipped" else [[two[1].id]])


def test_a_backup_that_is_a_file_or_empty_is_damage(store: Store, two: list[Manifest]) -> None:
    for make in (lambda path: path.write_bytes(b""), lambda path: path.mkdir()):
        path = store.folder("20990101T000000Z-manual-abcdef")
        make(path)
        assert [found.backups for found in store.damage()] == [[path.name]]
        assert store.all() == two
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.usefixtures("two")
def test_a_manifest_in_the_place_of_another_is_damage(store: Store, two: list[Manifest]) -> None:
    whole = store.folder(two[1].id) / "manifest.json"
    (store.folder(two[0].id) / "manifest.json").write_bytes(whole.read_bytes())
    assert f"cannot be trusted: it says that it is '{two[1].id}'" in str(store.damage()[0])


def test_content_that_cannot_be_read_is_damage(
    store: Store, two: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(disk, "hash_file", broken)
    found = store.damage()
    assert {each.why for each in found} == {"it cannot be read (Input/output error)"}
    assert len(found) == len({digest for each in two for digest in each.digests})


def broken_at(monkeypatch: pytest.MonkeyPatch, bad: Path) -> None:
    """The disk cannot read this file any more."""
    real_open, real_hash = Path.open, disk.hash_file

    def opened(path: Path, *rest: Any, **options: Any) -> Any:
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real_open(path, *rest, **options)

    def hashed(path: Path, *rest: Any) -> str:
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real_hash(path, *rest)

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(disk, "hash_file", hashed)


def test_content_that_cannot_be_read_is_replaced_by_the_next_backup_of_it(
    store: Store, two: list[Manifest], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = weights_in(store, two[1])
    with monkeypatch.context() as patched:
        broken_at(patched, bad)
        before = bad.stat().st_ino
        keep_backup(store, model)
    assert bad.stat().st_ino != before
    assert store.damage() == []


def test_a_manifest_that_cannot_be_read_stops_no_other_backup(
    store: Store, two: list[Manifest], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_at(monkeypatch, store.folder(two[0].id) / "manifest.json")
    made = keep_backup(store, model)
    assert [backup.id for backup in store.all()] == [two[1].id, made.id]
    (found,) = store.damage()
    assert "the manifest of" in found.why
    assert "cannot be read: Input/output error" in found.why


def test_a_folder_of_contents_that_is_a_file_is_damage(store: Store, two: list[Manifest]) -> None:
    folder = weights_in(store, two[0]).parent
    folder.rename(store.root / "elsewhere")
    folder.write_bytes(b"")
    assert two[0].id in {each for found in store.damage() for each in found.backups}


@pytest.mark.usefixtures("two")
def test_every_stored_byte_is_read_once(store: Store) -> None:
    read: list[int] = []
    store.damage(on_bytes=read.append)
    assert sum(read) == sum(path.stat().st_size for path in store.objects.glob("*/*"))


# -- adding


def test_what_was_left_behind_is_removed_when_nobody_writes(store: Store, two: list[Manifest], model: Path) -> None:
    (store.tmp / "left" / "behind").mkdir(parents=True)
    with store.adding("a") as first, store.adding("b"):
        assert sorted(path.name for path in store.tmp.iterdir()) == ["a", "b"]
        assert first.part().parent == store.tmp / "a"
        (store.tmp / "left").mkdir()
        keep_backup(store, model)
        assert (store.tmp / "left").exists()
    assert store.damage() == []
    keep_backup(store, model)
    assert list(store.tmp.iterdir()) == []


def test_content_behind_a_link_is_stored_again_in_its_own_right(store: Store, two: list[Manifest], model: Path) -> None:
    path = weights_in(store, two[1])
    damage(path, "link")
    keep_backup(store, model)
    assert not path.is_symlink()
    assert store.damage() == []


def test_a_folder_in_the_place_of_content_is_told(store: Store, two: list[Manifest], model: Path) -> None:
    damage(weights_in(store, two[1]), "folder")
    with pytest.raises(BadBackup, match=r"cannot store a content: .* is a folder; remove it"):
        keep_backup(store, model)
    assert list(store.tmp.iterdir()) == []


# -- pruning


def test_only_what_is_executed_is_done(store: Store, model: Path) -> None:
    made = [keep_backup(store, plain_model(model, str(n).encode()), SCHEDULED) for n in range(3)]
    before = content_of(store.root)
    said = store.prune([], ONE, execute=False)
    assert said.backups == made[:2]
    assert {name: before[name] for name in before if name != "lock"} == {
        name: content for name, content in content_of(store.root).items() if name != "lock"
    }
    assert store.prune([], ONE, execute=True) == said
    assert store.ids() == [made[2].id]
    assert said.freed_bytes == sum(len(content) for name, content in before.items() if "objects" in name) - sum(
        path.stat().st_size for path in store.objects.glob("*/*")
    )
    assert store.damage() == []
    assert store.prune([], ONE, execute=True).backups == []


def test_a_named_backup_goes_whatever_its_type(store: Store, two: list[Manifest], model: Path) -> None:
    assert store.prune([two[0].id[:-1], two[0].id], ONE, execute=True).backups[0] == two[0]
    assert store.all() == [two[1]]
    assert store.damage() == []
    assert not weights_in(store, two[0]).exists()
    with pytest.raises(BadBackup, match="there is no such backup"):
        store.prune([two[0].id], ONE, execute=True)


@pytest.mark.parametrize("name", ["latest", "id"])
def test_the_newest_complete_backup_is_not_pruned(store: Store, two: list[Manifest], model: Path, name: str) -> None:
    os.truncate(model / "model.safetensors", 9)
    keep_backup(store, model, PRE_RECOVERY)
    with pytest.raises(BadBackup, match="it is the newest complete backup; make another one first"):
        store.prune([two[1].id if name == "id" else name], ONE, execute=True)
    assert len(store.ids()) == 3
    assert store.damage() == []


def test_an_incomplete_backup_alone_may_go(store: Store, model: Path) -> None:
    os.truncate(model / "model.safetensors", 9)
    made = keep_backup(store, model, PRE_RECOVERY)
    assert store.prune([made.id], ONE, execute=True).backups == [made]
    assert list(store.objects.glob("*/*")) == []


@pytest.mark.parametrize("execute", [False, True])
def test_nothing_is_pruned_while_a_manifest_cannot_be_read(store: Store, two: list[Manifest], execute: bool) -> None:
    flip_a_bit(store.folder(two[0].id) / "manifest.json")
    before = content_of(store.objects)
    for named in ([], [two[0].id], [two[1].id]):
        with pytest.raises(BadBackup, match=f"the manifest of {two[0].id} cannot be"):
            store.prune(named, ONE, execute=execute)
    assert content_of(store.objects) == before


def test_nothing_is_pruned_while_the_newest_is_damaged(store: Store, two: list[Manifest]) -> None:
    flip_a_bit(weights_in(store, two[1]))
    before = content_of(store.objects)
    with pytest.raises(BadBackup, match=r"nothing was pruned: the newest complete backup is damaged \(objects"):
        store.prune([two[0].id], ONE, execute=True)
    assert content_of(store.objects) == before
    assert len(store.ids()) == 2


def lone(store: Store, name: str, content: bytes = b"lone") -> Path:
    path = store.objects / name[:2] / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.usefixtures("two")
def test_content_that_no_backup_names_goes_when_it_is_old(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lone(store, "ab" * 32)
    assert store.prune([], ONE, execute=True).freed_bytes == 0
    assert path.exists()
    monkeypatch.setattr(stores, "YOUNG_S", -60.0)
    assert store.prune([], ONE, execute=False).freed_bytes == 4
    assert path.exists()
    assert store.prune([], ONE, execute=True).freed_bytes == 4
    assert not path.exists()
    assert store.damage() == []


@pytest.mark.usefixtures("two", "old_content")
def test_what_is_not_of_the_store_stays(store: Store) -> None:
    strange = [lone(store, name) for name in ("notes", "x" * 64, "AB" * 32)]
    (store.objects / "ab" / ("ab" * 32)).mkdir(parents=True)
    (store.backups / "notes").mkdir()
    store.prune([], ONE, execute=True)
    assert all(path.exists() for path in (*strange, store.objects / "ab" / ("ab" * 32), store.backups / "notes"))


@pytest.mark.parametrize("moment", ["remove_file", "sync_folder"])
def test_a_prune_that_is_cut_off_leaves_whole_backups(
    store: Store, two: list[Manifest], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(disk, moment, fail)
        store.prune([two[0].id], ONE, execute=True)
    assert store.all() == [two[1]]
    assert store.damage() == []
    monkeypatch.setattr(stores, "YOUNG_S", -60.0)
    assert store.prune([], ONE, execute=True).freed_bytes > 0
    assert not weights_in(store, two[0]).exists()
    assert list(store.tmp.iterdir()) == []


# -- locks


@pytest.mark.usefixtures("impatient")
def test_a_prune_does_not_run_beside_a_backup(store: Store, two: list[Manifest], model: Path) -> None:
    with store.adding("x"):
        with pytest.raises(Locked, match=r"cannot start prune: .*backups is held by a backup .*; wait for it to end"):
            store.prune([], ONE, execute=True)
        store.prune([], ONE, execute=False)  # looking disturbs nobody
        keep_backup(store, model)
    with store.pruning(), pytest.raises(Locked, match=r"cannot start a backup: .* is held by prune"):
        keep_backup(store, model)
    assert len(store.ids()) == 3


@pytest.mark.usefixtures("two")
def test_a_prune_waits_for_a_backup(store: Store) -> None:
    added = store.using("a backup")
    threading.Timer(0.05, added.release).start()
    store.prune([], ONE, execute=True)


# -- many at once


def test_results_come_in_the_order_of_the_work() -> None:
    heard: list[int] = []

    def work(number: int, meter: Any) -> int:
        meter(number)
        return number * number

    assert in_parallel(work, range(50), heard.append) == [number * number for number in range(50)]
    assert sorted(heard) == list(range(50))
    assert in_parallel(work, []) == []


@pytest.mark.parametrize("error", [OSError(errno.EIO, "x"), BadBackup("x"), KeyboardInterrupt()])
def test_an_error_in_one_ends_the_others(error: BaseException) -> None:
    def work(number: int, meter: Any) -> None:
        if number == 1:
            raise error
        while True:  # until the meter says that it is over
            meter(1)

    with pytest.raises(type(error)):
        in_parallel(work, range(100))


def test_ctrl_c_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> Any:
        raise KeyboardInterrupt

    def work(_: int, meter: Any) -> None:
        while True:
            meter(1)

    monkeypatch.setattr(concurrent.futures, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_parallel(work, range(100))


# -- room and words


def test_room_is_needed_for_what_is_written_and_a_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda _: stores.ROOM_BYTES + 1_020_000)
    check_room(tmp_path, 1_000_000, "back up")
    with pytest.raises(BadBackup, match=r"cannot back up: 18 MB are needed in .*, 18 MB are free; make room there"):
        check_room(tmp_path, 1_000_001, "back up")


def test_an_error_of_the_system_says_what_was_attempted() -> None:
    full = r"cannot back up: No space left on device \(x\); backups made before are"
    with pytest.raises(BadBackup, match=full), telling("back up"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x")
    with pytest.raises(BadBackup, match="cannot back up: odd; "), telling("back up"):
        raise OSError("odd")


def test_damage_is_a_sentence() -> None:
    assert str(Damage("x", "it is missing")) == "x: it is missing"
