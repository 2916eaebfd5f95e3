from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from longrun import backups, disk, source
from longrun import store as stores
from longrun.backups import back_up, restore
from longrun.errors import BadBackup
from longrun.manifest import BackupType
from longrun.store import RESTORE_TXT, Store
from tests.unit.builders import (
    DAMAGES,
    add_checkpoint,
    content_of,
    damage,
    keep_backup,
    plain_model,
    safetensors,
    state_of,
)
from tests.unit.test_store import weights_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from longrun.home import Home

MANUAL, PRE_RECOVERY, SCHEDULED = BackupType.MANUAL, BackupType.PRE_RECOVERY, BackupType.SCHEDULED


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "PAUSE_S", 0.0)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was just written counts as long unchanged."""
    monkeypatch.setattr(backups, "SETTLED_S", -60.0)


def failing(number: int) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def objects(store: Store) -> dict[str, bytes]:
    return {name.rpartition("/")[2]: content for name, content in content_of(store.objects).items()}


# -- backing up


def test_a_model_of_longrun_is_backed_up_and_comes_back(home: Home, tmp_path: Path) -> None:
    for step in (5, 6):
        add_checkpoint(home, step)
    store, whole = Store(home.root / "backups"), state_of(home.model)
    saved = back_up(store, home.model, MANUAL, reason="before the bad file")
    made = saved.manifest
    assert (made.global_step, made.lineage, made.base_model, made.faults) == (6, "one", "tiny", ())
    assert (made.reason, made.source, made.sequence) == ("before the bad file", str(home.model), 1)
    assert store.damage() == []
    shutil.rmtree(home.model)
    assert restore(store, made, home.model) is None
    assert state_of(home.model) == whole


def test_each_content_is_stored_once_read_only(store: Store, model: Path) -> None:
    shutil.copy(model / "model.safetensors", model / "copy.safetensors")
    os.link(model / "model.safetensors", model / "link.safetensors")
    made = keep_backup(store, model)
    assert objects(store) == {file.sha256: (model / file.path).read_bytes() for file in made.files}
    assert len(objects(store)) == 2
    assert {path.stat().st_mode & 0o777 for path in store.objects.glob("*/*")} == {0o444}
    assert store.root.stat().st_mode & 0o777 == 0o700
    assert list(store.tmp.iterdir()) == []


def test_a_file_with_two_names_is_read_once(store: Store, model: Path) -> None:
    os.link(model / "model.safetensors", model / "link.safetensors")
    read: list[int] = []
    totals: list[int] = []
    back_up(store, model, MANUAL, on_start=totals.append, on_bytes=read.append)
    assert totals == [sum(read)] == [len(safetensors(b"weights")) + len(b"{}")]


def test_a_backup_exists_after_all_that_it_names(store: Store, model: Path, disk_log: list[str]) -> None:
    made = keep_backup(store, model)
    assert disk_log[-2:] == ["sync backups", f"sync {made.id}"]
    assert disk_log[-3] == f"rename {made.id}"
    before = disk_log[:-3]
    for digest in made.digests:
        at = before.index(f"rename {digest}")
        assert re.fullmatch("sync [0-9a-f]{16}", before[at - 1]) or len(made.digests) > 1
        assert f"sync {digest[:2]}" in before[at:]
    assert before.index("sync sha256") < before.index("rename SHA256SUMS") < before.index("rename manifest.json")


@pytest.mark.usefixtures("settled")
def test_an_unchanged_model_is_not_read_again_but_its_backup_is(
    store: Store, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = keep_backup(store, model)
    read: list[int] = []
    monkeypatch.setattr(disk, "copy_hashed", failing(errno.EIO))
    second = back_up(store, model, MANUAL, on_bytes=read.append)
    assert (second.new_bytes, second.manifest.files) == (0, first.files)
    assert sum(read) == first.size_bytes
    assert len(store.ids()) == 2
    with pytest.raises(BadBackup, match="Input/output error"):
        keep_backup(store, model, PRE_RECOVERY)  # reads everything


def test_what_changed_just_before_a_backup_is_read_by_the_next(
    store: Store, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_backup(store, model)
    monkeypatch.setattr(disk, "copy_hashed", failing(errno.EIO))
    with pytest.raises(BadBackup, match="Input/output error"):
        keep_backup(store, model)


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("kind", [MANUAL, PRE_RECOVERY])
@pytest.mark.parametrize("how", [how for how in DAMAGES if how != "folder"])
def test_damaged_content_is_whole_after_the_next_backup(store: Store, model: Path, kind: BackupType, how: str) -> None:
    first = keep_backup(store, model)
    damage(weights_in(store, first), how)
    saved = back_up(store, model, kind)
    assert saved.healed == ([] if how == "removed" else [digest for digest in first.digests if digest in saved.healed])
    assert len(saved.healed) == (how != "removed")
    assert saved.new_bytes == len(safetensors(b"weights"))
    assert store.damage() == []


@pytest.mark.usefixtures("settled")
def test_another_content_under_the_same_name_is_new(store: Store, model: Path) -> None:
    keep_backup(store, model)
    plain_model(model, b"another")
    saved = back_up(store, model, SCHEDULED)
    assert saved.new_bytes == len(safetensors(b"another"))
    assert store.damage() == []


def test_an_incomplete_model_is_stored_only_before_a_recovery(store: Store, model: Path) -> None:
    os.truncate(model / "model.safetensors", 9)
    (model / "extra.pt").write_bytes(b"")
    for kind in (MANUAL, SCHEDULED, BackupType.PRE_RESTORE):
        with pytest.raises(BadBackup, match=r"is not a whole model: extra.pt: it is empty \(and 1 more\); --type pre_"):
            keep_backup(store, model, kind)
    assert (store.ids(), list(store.tmp.iterdir())) == ([], [])
    made = keep_backup(store, model, PRE_RECOVERY)
    assert made.faults == ("extra.pt: it is empty", "model.safetensors: it is cut off")
    assert store.read(made.id) == made
    target = store.root.parent / "restored"
    restore(store, made, target)
    assert content_of(target) == content_of(model)


def test_what_cannot_be_a_whole_model_leaves_the_backups_alone(store: Store, model: Path) -> None:
    first = keep_backup(store, model)
    shutil.rmtree(model)
    for make in (lambda: None, lambda: model.mkdir()):
        make()
        with pytest.raises(BadBackup, match=r"cannot back up .*model: "):
            keep_backup(store, model)
    assert store.all() == [first]


def test_files_that_are_rewritten_all_the_time_are_told(
    store: Store, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, tries = disk.copy_hashed, []

    def rewriting(*args: Any, **options: Any) -> str:
        tries.append(disk.append_line(model / "config.json", " "))
        return copy(*args, **options)

    monkeypatch.setattr(disk, "copy_hashed", rewriting)
    with pytest.raises(BadBackup, match="its files are being rewritten; stop what writes into it"):
        keep_backup(store, model)
    assert len(tries) == backups.TRIES * 2
    assert (store.ids(), list(store.tmp.iterdir())) == ([], [])


def test_a_rewrite_during_a_backup_is_backed_up_in_the_end(
    store: Store, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = disk.copy_hashed

    def rewriting(*args: Any, **options: Any) -> str:
        monkeypatch.setattr(disk, "copy_hashed", copy)
        digest = copy(*args, **options)
        plain_model(model, b"rewritten")
        return digest

    monkeypatch.setattr(disk, "copy_hashed", rewriting)
    made = keep_backup(store, model)
    restore(store, made, store.root.parent / "restored")
    assert content_of(store.root.parent / "restored") == content_of(model)


@pytest.mark.parametrize(
    ("place", "folder"), [("model", "model"), ("model/backups", "model"), ("", "model"), ("model", "model/sub")]
)
def test_a_model_and_its_backups_are_apart(tmp_path: Path, model: Path, place: str, folder: str) -> None:
    plain_model(model / "sub")
    before = content_of(tmp_path)
    with pytest.raises(BadBackup, match="one is inside the other; name a --store"):
        keep_backup(Store(tmp_path / place), tmp_path / folder)
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(BadBackup, match="one is inside the other"):
        keep_backup(Store(tmp_path / "link" / "backups"), model)
    assert content_of(tmp_path).keys() == before.keys()


def test_strange_names_and_modes_come_back(store: Store, model: Path) -> None:
    for number, name in enumerate(["a\nb", "-rf", "\udcff", "\\", " ", "x" * 255, "deep/er/est"]):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(str(number).encode())
        (model / name).chmod(0o640 + number)
    target = store.root.parent / "restored"
    restore(store, keep_backup(store, model), target)
    assert content_of(target) == content_of(model)
    assert {name: facts[1] | 0o600 for name, facts in state_of(model).items()} == {
        name: facts[1] for name, facts in state_of(target).items()
    }


def test_a_name_that_is_too_long_to_come_back_is_told(store: Store, model: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(backups, "is_inside", lambda _: False)
    with pytest.raises(BadBackup, match="its name is too long"):
        keep_backup(store, model)


# -- room


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda _: stores.ROOM_BYTES + 60)
    monkeypatch.setattr(disk, "can_clone", lambda *_: False)


@pytest.mark.usefixtures("full")
def test_a_backup_that_would_not_fit_is_not_begun(store: Store, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "copy_hashed", failing(errno.ENOSPC))
    with pytest.raises(BadBackup, match=r"cannot back up .*model: 17 MB are needed in .*backups, 17 MB are free"):
        keep_backup(store, model)
    assert (store.ids(), list(store.tmp.iterdir())) == ([], [])


@pytest.mark.usefixtures("settled")
def test_only_what_is_new_needs_room(
    store: Store, home: Home, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    add_checkpoint(home, 5)
    keep_backup(store, home.model)
    keep_backup(store, home.model / "checkpoint-5")  # another source: known by its manifest
    request.getfixturevalue("full")
    keep_backup(store, home.model)
    with pytest.raises(BadBackup, match="MB are needed"):
        keep_backup(store, plain_model(home.root / "other", b"another" * 20))
    monkeypatch.setattr(disk, "can_clone", lambda *_: True)
    keep_backup(store, home.root / "other")


@pytest.mark.usefixtures("full")
@pytest.mark.parametrize("content", [b"", b"[]", b'{"files": []}', b'{"files": {"a": {"sha256": 1}}}', b"[" * 100_000])
def test_a_manifest_that_says_nothing_saves_no_room(store: Store, model: Path, content: bytes) -> None:
    (model / "manifest.json").write_bytes(content)
    with pytest.raises(BadBackup, match="MB are needed"):
        keep_backup(store, model, PRE_RECOVERY)


# -- errors of the system

CALLS = [
    ("copy_file_range", errno.ENOSPC),
    ("copy_file_range", errno.EIO),
    ("pread", errno.EIO),
    ("fsync", errno.EIO),
    ("fsync", errno.ENOSPC),
    ("rename", errno.EXDEV),
    ("rename", errno.EACCES),
]


@pytest.mark.parametrize(("call", "number"), CALLS)
def test_a_backup_that_fails_says_what_and_leaves_the_others_alone(
    store: Store, model: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    first = keep_backup(store, model)
    plain_model(model, b"another")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(number))
        with pytest.raises(BadBackup, match=rf"cannot back up {model}: {os.strerror(number)}.*made before are as they"):
            keep_backup(store, model)
    assert (store.all(), store.damage(), list(store.tmp.iterdir())) == ([first], [], [])
    keep_backup(store, model)
    assert store.damage() == []


@pytest.mark.parametrize(("call", "number"), CALLS)
def test_a_restore_that_fails_leaves_the_target_alone(
    store: Store, model: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    made = keep_backup(store, model)
    plain_model(model, b"another")
    before = state_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(number))
        with pytest.raises(BadBackup, match=rf"cannot restore {made.id} to {model}: {os.strerror(number)}"):
            restore(store, made, model)
    assert state_of(model) == before
    assert sorted(path.name for path in model.parent.iterdir()) == ["backups", "model"]


def test_a_kernel_that_cannot_copy_is_done_without(store: Store, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "copy_file_range", failing(errno.EXDEV))
    made = keep_backup(store, model, PRE_RECOVERY)
    restore(store, made, model.with_name("restored"))
    assert state_of(model.with_name("restored")) == state_of(model)


def test_ctrl_c_leaves_nothing_behind(store: Store, model: Path) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    first = keep_backup(store, model)
    for kind in (MANUAL, PRE_RECOVERY):
        with pytest.raises(KeyboardInterrupt):
            back_up(store, model, kind, on_bytes=interrupted)
    with pytest.raises(KeyboardInterrupt):
        restore(store, first, model, on_bytes=interrupted)
    assert (store.all(), list(store.tmp.iterdir())) == ([first], [])
    assert sorted(path.name for path in model.parent.iterdir()) == ["backups", "model"]


# -- restoring


@pytest.fixture
def changed(store: Store, model: Path) -> Any:
    """A backup of what the model was before it became another."""
    made = keep_backup(store, model)
    plain_model(model, b"another")
    (model / "more.json").write_bytes(b"1")
    return made


def test_what_was_there_is_kept_beside(store: Store, model: Path, changed: Any) -> None:
    another = state_of(model)
    former = restore(store, changed, model)
    assert former is not None
    assert re.fullmatch(r"model\.replaced-\d{8}-\d{6}-[0-9a-f]{8}", former.name)
    assert state_of(former) == another
    assert content_of(model) == {"config.json": b"{}", "model.safetensors": safetensors(b"weights")}
    assert sorted(path.name for path in model.parent.iterdir()) == ["backups", "model", former.name]
    assert restore(store, changed, model) not in (None, former)


def test_what_is_restored_is_durable_before_it_has_its_name(
    store: Store, model: Path, changed: Any, disk_log: list[str]
) -> None:
    restore(store, changed, model)
    renamed = next(line for line in disk_log if line.startswith("rename"))
    before = disk_log[: disk_log.index(renamed)]
    assert "replaced" in renamed
    assert {"sync config.json", "sync model.safetensors"} <= set(before)
    assert before[-1].startswith("sync .model.restore-")
    assert disk_log[-1] == f"sync {model.parent.name}"


def test_what_was_restored_can_be_written_and_belongs_to_no_one_else(store: Store, model: Path) -> None:
    (model / "model.safetensors").chmod(0o444)
    restore(store, keep_backup(store, model), model)
    assert (model / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert (model / "model.safetensors").stat().st_nlink == 1


def test_a_link_stays_a_link(store: Store, model: Path, changed: Any) -> None:
    link = model.with_name("current_model")
    link.symlink_to("model")
    former = restore(store, changed, link)
    assert link.readlink() == Path("model")
    assert former is not None
    assert former.name.startswith("model.replaced-")
    assert (link / "model.safetensors").read_bytes() == safetensors(b"weights")


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.mkdir(parents=True), lambda path: path.parent.mkdir()]
)
def test_a_missing_or_empty_target_is_just_filled(
    store: Store, model: Path, changed: Any, make: Callable[[Path], Any]
) -> None:
    target = model.parent / "new" / "place"
    make(target)
    assert restore(store, changed, target) is None
    assert content_of(target)["model.safetensors"] == safetensors(b"weights")
    assert [path.name for path in target.parent.iterdir()] == ["place"]


@pytest.mark.parametrize("target", ["file", "backups", "backups/objects", "backups/tmp/x", ".", "file/below"])
def test_a_target_that_cannot_be_is_refused(store: Store, model: Path, changed: Any, target: str) -> None:
    (model.parent / "file").write_bytes(b"1")
    before = content_of(model.parent)
    with pytest.raises(BadBackup, match=r"cannot restore "):
        restore(store, changed, model.parent / target)
    assert content_of(model.parent) == before
    assert store.damage() == []


@pytest.mark.parametrize("how", [how for how in DAMAGES if how != "link"])  # which leads to what it should
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_content_never_takes_the_place_of_anything(
    store: Store, model: Path, changed: Any, name: str, how: str
) -> None:
    before = state_of(model)
    damage(store.object(next(file.sha256 for file in changed.files if file.path == name)), how)
    with pytest.raises(
        BadBackup, match=f"nothing was restored or exported: {name} of {changed.id} is damaged or missing"
    ):
        restore(store, changed, model)
    assert state_of(model) == before
    assert sorted(path.name for path in model.parent.iterdir()) == ["backups", "model"]


def test_a_target_without_room_is_left_alone(
    store: Store, model: Path, changed: Any, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue("full")
    before = state_of(model)
    with pytest.raises(BadBackup, match=f"cannot restore {changed.id}: 17 MB are needed in"):
        restore(store, changed, model)
    assert state_of(model) == before


def test_remains_of_a_killed_restore_go_with_the_next(store: Store, model: Path, changed: Any) -> None:
    remains, others = model.parent / ".model.restore-0.1.tmp", model.parent / ".model2.restore-0.1.tmp"
    for folder in (remains, others):
        plain_model(folder)
    with backups._locked(remains):
        restore(store, changed, model)
        assert remains.exists()
    restore(store, changed, model)
    assert not remains.exists()
    assert others.exists()


def test_remains_of_another_folder_are_left_alone_whatever_the_name(store: Store, model: Path, changed: Any) -> None:
    plain_model(model.parent / ".other.restore-0.1.tmp")
    restore(store, changed, model.parent / "*")
    assert (model.parent / ".other.restore-0.1.tmp").exists()


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_swap_that_fails_loses_nothing(
    store: Store, model: Path, changed: Any, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Neither the state that is there nor, after a swap, the one that was."""
    before, rename = state_of(model), Path.rename
    renames: list[Path] = []

    def fail_once(source: Path, target: Path) -> Path:
        renames.append(target)
        if len(renames) == call + 1:  # the first one gives the staged folder its second name
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(source, target)

    monkeypatch.setattr(disk, "RENAME_EXCHANGE", 1 << 20)  # which no kernel knows
    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(BadBackup, match="Permission denied"):
        restore(store, changed, model)
    monkeypatch.undo()
    assert state_of(model) == before
    assert sorted(path.name for path in model.parent.iterdir()) == ["backups", "model"]


def test_a_swap_that_is_not_durable_yet_loses_nothing(
    store: Store, model: Path, changed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    another, swap = state_of(model), disk.swap

    def swapped(first: Path, second: Path) -> None:
        swap(first, second)
        monkeypatch.setattr(disk, "sync_folder", failing(errno.EIO))

    monkeypatch.setattr(disk, "swap", swapped)
    with pytest.raises(BadBackup, match="Input/output error"):
        restore(store, changed, model)
    former = next(model.parent.glob("model.replaced-*"))
    assert state_of(former) == another
    assert (model / "model.safetensors").read_bytes() == safetensors(b"weights")


def test_backups_that_cannot_be_written_can_be_listed_and_restored(
    store: Store, model: Path, changed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root no mode refuses anything, so it is the call that does."""
    opened = os.open

    def read_only(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR) and str(path).startswith(str(store.root)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return opened(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", read_only)
    for _ in range(2):
        assert Store.open(store.root).all() == [changed]
        restore(store, changed, model)
        assert (model / "model.safetensors").read_bytes() == safetensors(b"weights")
        disk.remove_file(store.root / "lock")  # copied to a disk of its own, without it


# -- without this program


def test_a_shell_alone_restores_by_what_the_store_itself_says(store: Store, home: Home, tmp_path: Path) -> None:
    add_checkpoint(home, 5)
    (home.model / "with blank").write_bytes(b"1")
    (home.model / "sub").mkdir()
    (home.model / "sub" / "deep.json").write_bytes(b"2")
    made = keep_backup(store, home.model)
    lines = (store.root / "RESTORE.txt").read_text().splitlines()
    recipe = [line[4:] for line in lines[lines.index("    STORE=/path/to/this/folder") :] if line]
    recipe[:2] = [f"STORE={store.root}", f"ID={made.id}"]
    done = subprocess.run(
        ["sh", "-e"], input="\n".join(recipe), cwd=tmp_path, text=True, capture_output=True, check=True
    )
    assert done.stdout.count(": OK\n") == len(made.files)
    assert content_of(tmp_path / "restored") == content_of(home.model)
    assert RESTORE_TXT.count("python3 backup_manager.py --store") == 2


# -- where a backup may be put


@pytest.mark.parametrize("name", ["state", "inbox", "notes"])
def test_a_folder_of_something_else_is_not_replaced(store: Store, model: Path, name: str) -> None:
    manifest = back_up(store, model, BackupType.MANUAL).manifest
    target = model.parent / name
    target.mkdir(exist_ok=True)
    (target / "ledger.sqlite3").write_bytes(b"1")
    with pytest.raises(BadBackup, match="it holds something else than a model; name a new or empty folder"):
        restore(store, manifest, target)
    assert [path.name for path in target.iterdir()] == ["ledger.sqlite3"]


def test_nothing_is_restored_into_a_model(store: Store, model: Path) -> None:
    manifest = back_up(store, model, BackupType.MANUAL).manifest
    (model / "lineage.json").write_bytes(b"{}")
    with pytest.raises(BadBackup, match="it is inside the model"):
        restore(store, manifest, model / "sub")
    assert not (model / "sub").exists()


def test_what_can_be_seen_to_be_incomplete_is_not_copied_first(store: Store, model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(BadBackup, match="it is cut off"):
        back_up(store, model, BackupType.MANUAL)
    assert not list(store.objects.glob("*/*"))
