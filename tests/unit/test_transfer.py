from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import fsspec
import pytest
import zstandard
from fsspec.implementations.local import LocalFileSystem

from longrun import backups, disk, transfer
from longrun import store as stores
from longrun.errors import BadBackup
from longrun.manifest import Manifest
from longrun.store import Store
from longrun.transfer import Remote
from tests.unit.builders import (
    DAMAGES,
    content_of,
    damage,
    flip_a_bit,
    keep_backup,
    plain_model,
    state_of,
)
from tests.unit.test_manifest import HOSTILE, sealed
from tests.unit.test_store import weights_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def made(store: Store, model: Path) -> Manifest:
    return keep_backup(store, model)


@pytest.fixture
def other(tmp_path: Path) -> Store:
    """Another machine's store."""
    return Store(tmp_path / "other")


@pytest.fixture(autouse=True)
def _no_memory() -> Iterator[None]:
    yield
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


@pytest.fixture(autouse=True)
def _small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "MAX_BYTES", 1 << 18)
    monkeypatch.setattr(transfer, "HEADERS_MAX_BYTES", 1 << 14)


WAYS: dict[str, Callable[[Path], str]] = {
    "folder": lambda tmp: str(tmp / "out"),
    "tar": lambda tmp: str(tmp / "out.tar"),
    "zst": lambda tmp: str(tmp / "out.tar.zst"),
    "file": lambda tmp: f"file://{tmp}/remote/store",
    "memory": lambda tmp: "memory://remote/store",
}


def bring_out(store: Store, manifest: Manifest, target: str) -> None:
    if "://" in target:
        Remote(target).push(store, manifest)
    elif target.endswith(transfer.ARCHIVES):
        transfer.export_archive(store, manifest, Path(target))
    else:
        transfer.export_folder(store, manifest, Path(target))


def bring_in(store: Store, origin: str) -> Manifest:
    if "://" in origin:
        return Remote(origin).pull(store, Remote(origin).find("latest"))
    if origin.endswith(transfer.ARCHIVES):
        return transfer.import_archive(store, Path(origin))
    return transfer.import_folder(store, Path(origin))


def nothing_in(store: Store) -> bool:
    """Neither a backup nor remains of one; a content that is what its name says does no harm."""
    for path in store.objects.glob("*/*"):
        assert disk.hash_file(path) == path.name
    return store.ids() == [] and list(store.tmp.iterdir()) == []


# -- there and back


@pytest.mark.parametrize("way", WAYS)
def test_a_backup_goes_to_another_store_and_is_restored_there(
    model: Path, store: Store, other: Store, tmp_path: Path, way: str
) -> None:
    (model / "deep").mkdir()
    (model / "deep" / "a\nb\udcff").write_bytes(b"1")
    (model / "deep" / "a\nb\udcff").chmod(0o755)
    made = keep_backup(store, model)
    bring_out(store, made, WAYS[way](tmp_path))
    assert list(store.tmp.iterdir()) == []
    found = bring_in(other, WAYS[way](tmp_path))
    assert found == made
    assert other.all() == [made]
    assert other.damage() == []
    backups.restore(other, found, tmp_path / "restored")
    assert state_of(tmp_path / "restored") == state_of(model)


@pytest.mark.parametrize("way", WAYS)
def test_what_came_twice_is_there_once_and_heals(
    store: Store, made: Manifest, other: Store, tmp_path: Path, way: str
) -> None:
    bring_out(store, made, WAYS[way](tmp_path))
    bring_in(other, WAYS[way](tmp_path))
    before = content_of(other.backups) | content_of(other.objects)
    bring_in(other, WAYS[way](tmp_path))
    assert content_of(other.backups) | content_of(other.objects) == before
    flip_a_bit(other.folder(made.id) / "manifest.json")
    damage(weights_in(other, made), "flipped")
    (other.folder(made.id) / "SHA256SUMS").unlink()
    assert [found.backups for found in other.damage()] == [[made.id]]
    bring_in(other, WAYS[way](tmp_path))
    assert content_of(other.backups) | content_of(other.objects) == before
    assert other.damage() == []


@pytest.mark.parametrize("way", WAYS)
def test_what_comes_in_is_the_newest_there(
    store: Store, made: Manifest, other: Store, tmp_path: Path, way: str
) -> None:
    for number in range(3):
        keep_backup(other, plain_model(tmp_path / "x", str(number).encode()))
    bring_out(store, made, WAYS[way](tmp_path))
    assert bring_in(other, WAYS[way](tmp_path)).sequence == 4
    assert other.find("latest").id == made.id


def test_another_backup_of_the_same_id_is_not_replaced(store: Store, made: Manifest, other: Store) -> None:
    Remote("memory://remote").push(store, made)
    keep_backup(other, plain_model(store.root.parent / "x", b"another"))
    other.folder(other.ids()[0]).rename(other.folder(made.id))
    manifest = other.folder(made.id) / "manifest.json"
    values = json.loads(manifest.read_bytes()) | {"id": made.id}
    manifest.write_bytes(sealed(values))
    before = content_of(other.backups)
    with pytest.raises(BadBackup, match="the store has another backup of this id"):
        bring_in(other, "memory://remote")
    assert content_of(other.backups) == before


# -- out


def test_an_exported_folder_is_the_model_ready_to_use(store: Store, made: Manifest, model: Path) -> None:
    out = model.with_name("out")
    transfer.export_folder(store, made, out)
    assert state_of(out / "model") == state_of(model)
    check = ["sha256sum", "--strict", "-c", "../SHA256SUMS"]
    assert subprocess.run(check, cwd=out / "model", capture_output=True, check=False).returncode == 0
    assert sorted(path.name for path in model.parent.iterdir()) == ["backups", "model", "out"]


@pytest.mark.parametrize("way", ["tar", "zst"])
def test_an_exported_archive_is_read_by_tar(store: Store, made: Manifest, model: Path, way: str) -> None:
    out = Path(WAYS[way](model.parent))
    transfer.export_archive(store, made, out)
    if way == "zst":
        with out.open("rb") as packed:
            out = out.with_suffix("")
            out.write_bytes(zstandard.ZstdDecompressor().stream_reader(packed).read())
    subprocess.run(["tar", "-xf", str(out), "-C", str(model.parent)], check=True)
    assert content_of(model.parent / made.id / "model") == content_of(model)


@pytest.mark.parametrize("way", ["folder", "tar", "zst"])
def test_nothing_is_written_over(store: Store, made: Manifest, tmp_path: Path, way: str) -> None:
    Path(WAYS[way](tmp_path)).mkdir()
    (Path(WAYS[way](tmp_path)) / "x").write_bytes(b"1")
    with pytest.raises(BadBackup, match=r"cannot export to .*out.*: it exists; name a new f"):
        bring_out(store, made, WAYS[way](tmp_path))


@pytest.mark.parametrize("how", ["flipped", "truncated", "removed", "folder"])
@pytest.mark.parametrize("way", WAYS)
def test_damaged_content_does_not_go_out(store: Store, made: Manifest, tmp_path: Path, way: str, how: str) -> None:
    damage(weights_in(store, made), how)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(BadBackup):
        bring_out(store, made, WAYS[way](tmp_path))
    if "://" in WAYS[way](tmp_path):
        assert Remote(WAYS[way](tmp_path)).ids() == []
    else:
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_without_room_is_not_begun(
    store: Store, made: Manifest, other: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transfer.export_archive(store, made, tmp_path / "out.tar")
    monkeypatch.setattr(disk, "free_bytes", lambda _: stores.ROOM_BYTES)
    with pytest.raises(BadBackup, match="MB are needed"):
        transfer.export_folder(store, made, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadBackup, match="MB are needed"):
        transfer.import_archive(other, tmp_path / "out.tar")
    assert nothing_in(other)


# -- a folder that comes in


@pytest.fixture
def exported(store: Store, made: Manifest, tmp_path: Path) -> Path:
    transfer.export_folder(store, made, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("how", [*DAMAGES, "fifo"])
def test_a_damaged_folder_is_refused(exported: Path, other: Store, how: str) -> None:
    path = exported / "model" / "model.safetensors"
    if how == "fifo":
        path.unlink()
        os.mkfifo(path)
    else:
        damage(path, how)
    with pytest.raises(BadBackup, match=r"model.safetensors"):
        transfer.import_folder(other, exported)
    assert nothing_in(other)


def test_a_folder_without_its_paper_is_told(exported: Path, other: Store) -> None:
    disk.remove_file(exported / "backup.json")
    with pytest.raises(BadBackup, match=r"there is no backup.json in it; name an exported folder"):
        transfer.import_folder(other, exported)
    with pytest.raises(BadBackup, match=r"there is no such folder"):
        transfer.import_folder(other, exported / "absent")


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_paper_is_refused(exported: Path, other: Store, case: str) -> None:
    (exported / "backup.json").write_bytes(HOSTILE[case])
    before = content_of(exported.parent)
    with pytest.raises(BadBackup):  # one names an id that is right in itself, but not of these contents
        transfer.import_folder(other, exported)
    assert {name: content for name, content in content_of(exported.parent).items() if "other/" not in name} == before


@pytest.mark.parametrize("size", [0, 1 << 40])
def test_a_size_that_is_a_lie_is_refused(
    exported: Path, other: Store, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda _: 1 << 50)
    values = json.loads((exported / "backup.json").read_bytes())
    values["files"][0]["size"] = size
    (exported / "backup.json").write_bytes(sealed(values))
    with pytest.raises(BadBackup, match=r"does not have the (SHA-256 and )?size of the manifest"):
        transfer.import_folder(other, exported)
    assert nothing_in(other)


# -- an archive that comes in


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[Any, bytes]:
    found = tarfile.TarInfo(name)
    found.type, found.linkname, found.size = kind, link, len(content)
    return found, content


def packed(path: Path, members: list[tuple[Any, bytes]], **options: Any) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, **options) as archive:
        for found, content in members:
            archive.addfile(found, io.BytesIO(content))
    return path


def members_of(store: Store, made: Manifest) -> list[tuple[Any, bytes]]:
    """A good archive, to be spoilt."""
    files = [member(f"{made.id}/model/{file.path}", store.object(file.sha256).read_bytes()) for file in made.files]
    return [member(f"{made.id}/backup.json", made.to_json().encode()), *files]


def other_kind(kind: bytes, link: str = "") -> Callable[[list[Any], str], list[Any]]:
    return lambda good, name: [*good[:-1], member(f"{name}/model/model.safetensors", b"", kind, link)]


def extra(name: str, content: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> Callable[..., list[Any]]:
    return lambda good, id_: [good[0], member(name.replace("ID", id_), content, kind, link), *good[1:]]


def large_header(good: list[Any], name: str) -> list[Any]:
    good[-1][0].pax_headers = {"comment": "x" * (1 << 20)}
    return good


def wrong_path_in_header(good: list[Any], name: str) -> list[Any]:
    good[-1][0].pax_headers = {"path": f"{name}/model/../../../../escaped"}
    return good


def longer(good: list[Any], name: str) -> list[Any]:
    return [*good[:-1], member(good[-1][0].name, good[-1][1] + b"x")]


def changed(good: list[Any], name: str) -> list[Any]:
    return [*good[:-1], member(good[-1][0].name, bytes(len(good[-1][1])))]


SPOILT: dict[str, Callable[[list[Any], str], list[Any]]] = {
    "nothing": lambda good, name: [],
    "no paper": lambda good, name: good[1:],
    "paper later": lambda good, name: good[::-1],
    "paper of another id": lambda good, name: [member("20260102T030405Z-manual-abcdef/backup.json", good[0][1])],
    "paper of no id": lambda good, name: [member("../backup.json", good[0][1]), *good[1:]],
    "paper that is a link": lambda good, name: [member(f"{name}/backup.json", b"", tarfile.SYMTYPE, "/etc/passwd")],
    "paper without end": lambda good, name: [member(f"{name}/backup.json", b" " * ((1 << 18) + 1))],
    "paper that is none": lambda good, name: [member(f"{name}/backup.json", b"[" * 100_000)],
    "file missing": lambda good, name: good[:-1],
    "file twice": lambda good, name: [*good, good[-1]],
    "file too many": extra("ID/model/extra.bin"),
    "file outside": extra("escaped"),
    "file above": extra("ID/model/../../../escaped"),
    "absolute file": extra("/tmp/escaped"),
    "file of another backup": extra("20260102T030405Z-manual-abcdef/model/config.json", b"{}"),
    "folder": extra("ID/model", b"", tarfile.DIRTYPE),
    "symbolic link": other_kind(tarfile.SYMTYPE, "/etc/passwd"),
    "symbolic link beside": extra("ID/model/link", b"", tarfile.SYMTYPE, "/etc"),
    "hard link": other_kind(tarfile.LNKTYPE, "/etc/passwd"),
    "device": other_kind(tarfile.CHRTYPE),
    "fifo": other_kind(tarfile.FIFOTYPE),
    "sums that are a link": extra("ID/SHA256SUMS", b"", tarfile.SYMTYPE, "/etc/passwd"),
    "longer than said": longer,
    "another content": changed,
    "header without end": large_header,
    "another path in the header": wrong_path_in_header,
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_hostile_archive_is_refused_and_writes_nothing(
    store: Store, made: Manifest, other: Store, tmp_path: Path, case: str
) -> None:
    Store.make(other.root)
    archive = packed(tmp_path / "in.tar", SPOILT[case](members_of(store, made), made.id))
    before = {path for path in tmp_path.rglob("*") if other.root not in path.parents}
    with pytest.raises(BadBackup):
        transfer.import_archive(other, archive)
    assert {path for path in tmp_path.rglob("*") if other.root not in path.parents} == before
    assert nothing_in(other)
    assert not Path("/tmp/escaped").exists()


def test_the_archive_that_is_spoilt_there_is_good(store: Store, made: Manifest, other: Store, tmp_path: Path) -> None:
    assert transfer.import_archive(other, packed(tmp_path / "in.tar", members_of(store, made))) == made


@pytest.mark.parametrize("way", ["tar", "zst"])
def test_an_archive_that_was_cut_off_is_refused(
    store: Store, made: Manifest, other: Store, tmp_path: Path, way: str
) -> None:
    Store.make(other.root)
    archive = Path(WAYS[way](tmp_path))
    bring_out(store, made, str(archive))
    whole = archive.read_bytes()
    for length in [0, 1, *range(100, len(whole) * 3 // 4, len(whole) // 12)]:
        archive.write_bytes(whole[:length])
        try:
            transfer.import_archive(other, archive)
        except BadBackup:
            assert nothing_in(other)
        else:  # only the padding at the end was lost
            assert other.damage() == []
            assert way == "tar"
            break


@pytest.mark.parametrize("way", ["tar", "zst"])
def test_a_flipped_bit_in_an_archive_is_refused_or_did_no_harm(
    store: Store, made: Manifest, other: Store, tmp_path: Path, way: str
) -> None:
    archive = Path(WAYS[way](tmp_path))
    bring_out(store, made, str(archive))
    whole = archive.read_bytes()
    for at in range(0, len(whole), len(whole) // 15):
        archive.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            assert transfer.import_archive(other, archive).files == made.files
        except BadBackup:
            continue
    assert not other.backups.exists() or other.damage() == []


@pytest.mark.parametrize(
    "content", [b"", b"x" * 2000, b"\x28\xb5\x2f\xfd", b"\x28\xb5\x2f\xfd" + b"x" * 99, b"\0" * 10_240, b"PK\3\4" * 300]
)
@pytest.mark.parametrize("suffix", ["tar", "tar.zst"])
def test_what_is_no_archive_is_told(other: Store, tmp_path: Path, content: bytes, suffix: str) -> None:
    archive = tmp_path / f"in.{suffix}"
    archive.write_bytes(content)
    with pytest.raises(BadBackup, match=r"it is damaged or no archive|does not begin with ID/backup.json"):
        transfer.import_archive(other, archive)
    assert not other.root.exists()
    with pytest.raises(BadBackup, match=r"cannot import .*: No such file"):
        transfer.import_archive(other, tmp_path / "absent.tar")


def test_headers_in_one_another_have_an_end(other: Store, tmp_path: Path) -> None:
    header, _ = member("x", b"")
    header.type, header.size = tarfile.XHDTYPE, 0
    (tmp_path / "in.tar").write_bytes(header.tobuf(tarfile.USTAR_FORMAT) * 3_000)
    with pytest.raises(BadBackup, match="damaged or no archive"):
        transfer.import_archive(other, tmp_path / "in.tar")


@pytest.mark.parametrize("begin", ["none", "paper"])
def test_an_archive_that_grows_without_end_is_stopped(
    store: Store, made: Manifest, other: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begin: str
) -> None:
    read: list[int] = []
    limited = transfer._Limited.read

    def counted(stream: Any, length: int = -1) -> bytes:
        piece = limited(stream, length)
        read.append(len(piece))
        return piece

    monkeypatch.setattr(transfer._Limited, "read", counted)
    good = packed(tmp_path / "in.tar", members_of(store, made)).read_bytes()[:-10_240]
    bomb = zstandard.ZstdCompressor().compressobj()
    with (tmp_path / "in.tar.zst").open("wb") as file:
        file.write(bomb.compress(good if begin == "paper" else b""))
        claimed, _ = member(f"{made.id}/SHA256SUMS")
        claimed.size = 1 << 33
        file.write(bomb.compress(claimed.tobuf()))
        for _ in range(4):
            file.write(bomb.compress(bytes(1 << 20)))
        file.write(bomb.flush())
    with pytest.raises(BadBackup, match=r"more than its manifest says|does not begin"):
        transfer.import_archive(other, tmp_path / "in.tar.zst")
    assert sum(read) < 1 << 20


def test_archives_need_their_package(
    store: Store, made: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(BadBackup, match=r"needs the zstandard package; pip install zstandard, or name a .tar"):
        transfer.export_archive(store, made, tmp_path / "out.tar.zst")
    transfer.export_archive(store, made, tmp_path / "out.tar")
    assert not (tmp_path / "out.tar.zst").exists()


# -- a store elsewhere


class Frail(LocalFileSystem):
    """A file system that fails after so many operations."""

    left = 1_000

    def _spend(self) -> None:
        type(self).left -= 1
        if self.left < 0:
            raise ConnectionError("the line is cut")

    def put_file(self, *args: Any, **options: Any) -> Any:
        self._spend()
        return super().put_file(*args, **options)

    def pipe_file(self, *args: Any, **options: Any) -> Any:
        self._spend()
        return super().pipe_file(*args, **options)

    def open(self, *args: Any, **options: Any) -> Any:
        self._spend()
        return super().open(*args, **options)


@pytest.fixture
def frail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    remote = Remote(f"file://{tmp_path}/remote")
    remote._fs = Frail()
    monkeypatch.setattr(Frail, "left", 1_000)
    return remote


@pytest.mark.parametrize("fails_after", range(8))
def test_a_push_that_was_cut_off_goes_on_where_it_was(
    store: Store, made: Manifest, other: Store, frail: Remote, fails_after: int
) -> None:
    total = sum(made.digests.values())
    Frail.left = fails_after
    with pytest.raises(BadBackup, match=r"cannot export to file:.*: the line is cut; check address, rights"):
        frail.push(store, made)
    Frail.left = 1_000
    read: list[int] = []
    assert frail.push(store, made, read.append) <= total
    assert sum(read) == total
    assert frail.push(store, made) == 0
    assert frail.damage() == []
    assert frail.pull(other, frail.find("latest")) == made


def test_what_a_push_has_brought_is_not_sent_again(store: Store, made: Manifest, frail: Remote) -> None:
    Frail.left = 2  # put, and read back
    with pytest.raises(BadBackup):
        frail.push(store, made)
    Frail.left = 1_000
    assert 0 < frail.push(store, made) < sum(made.digests.values())


def test_a_content_that_was_sent_in_part_is_sent_again(store: Store, made: Manifest, frail: Remote) -> None:
    frail.push(store, made)
    shutil.rmtree(Path(frail._root) / "backups")
    for how in ("truncated", "flipped"):
        damage(Path(frail._object(weights_in(store, made).name)), how)
        assert frail.push(store, made) == weights_in(store, made).stat().st_size
        assert frail.damage() == []
        shutil.rmtree(Path(frail._root) / "backups")


def test_a_push_writes_no_good_paper_again(store: Store, made: Manifest, frail: Remote) -> None:
    frail.push(store, made)
    inodes = {path: path.stat().st_mtime_ns for path in Path(frail._root).rglob("*")}
    frail.push(store, made)
    assert {path: path.stat().st_mtime_ns for path in Path(frail._root).rglob("*")} == inodes


def test_a_push_of_what_is_there_reads_and_heals_it(store: Store, made: Manifest, frail: Remote) -> None:
    frail.push(store, made)
    damage(Path(frail._object(weights_in(store, made).name)), "flipped")
    damage(Path(frail._at("backups", made.id, "manifest.json")), "flipped")
    assert frail.push(store, made) == weights_in(store, made).stat().st_size
    assert frail.damage() == []


def test_a_push_sends_only_what_other_backups_there_have_not(store: Store, made: Manifest, frail: Remote) -> None:
    frail.push(store, made)
    second = keep_backup(store, plain_model(store.root.parent / "x", b"another"))
    assert frail.push(store, second) == weights_in(store, second).stat().st_size
    assert frail.all() == [made, second]


@pytest.mark.parametrize("fails_after", range(2))
def test_a_pull_that_was_cut_off_goes_on_where_it_was(
    store: Store, made: Manifest, other: Store, frail: Remote, fails_after: int, disk_log: list[str]
) -> None:
    frail.push(store, made)
    Frail.left = fails_after
    with pytest.raises(BadBackup, match=r"cannot import from file:.*: the line is cut"):
        frail.pull(other, made)
    assert nothing_in(other)
    Frail.left = 2 - fails_after  # no more than what is missing
    disk_log.clear()
    assert frail.pull(other, made) == made
    assert {f"sync {digest[:2]}" for digest in made.digests} <= set(disk_log), "also what had come before"
    assert other.damage() == []


@pytest.mark.parametrize("how", ["truncated", "emptied", "grown", "flipped", "removed"])
@pytest.mark.parametrize("name", ["object", "manifest.json"])
def test_damage_elsewhere_is_found_and_does_not_come_in(
    store: Store, made: Manifest, other: Store, frail: Remote, name: str, how: str
) -> None:
    frail.push(store, made)
    path = frail._object(weights_in(store, made).name) if name == "object" else frail._at("backups", made.id, name)
    for _ in range(1 + (name == "manifest.json" and how == "truncated")):  # its last byte is a newline
        damage(Path(path), how)
    assert [found.backups for found in frail.damage()] == [[made.id]]
    assert [found.backups for found in frail.damage([made.id])] == [[made.id]]
    assert len(frail.damage(quick=True)) == ((name, how) != ("object", "flipped"))
    with pytest.raises(BadBackup):
        frail.pull(other, frail.read(made.id))
    assert not other.root.exists() or nothing_in(other)


def test_a_content_that_came_back_changed_is_taken_away_again(
    store: Store, made: Manifest, frail: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(weights_in(store, made), "flipped")
    with pytest.raises(BadBackup, match=r"nothing was exported to .* came back changed; `verify` tells"):
        frail.push(store, made)
    assert not Path(frail._object(weights_in(store, made).name)).exists()
    damage(weights_in(store, made), "flipped")  # back
    monkeypatch.setattr(Frail, "cat_file", lambda *_: b"x")
    with pytest.raises(BadBackup, match=r"format.json came back changed; try again"):
        frail.push(store, made)


def test_a_remote_store_is_a_store(store: Store, made: Manifest, tmp_path: Path) -> None:
    Remote(f"file://{tmp_path}/remote").push(store, made)
    copied = Store.open(tmp_path / "remote")
    assert copied.damage() == []
    assert copied.all() == [made]


def test_the_latest_of_several_stores_is_the_latest_in_time(
    store: Store, other: Store, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a disaster: the new machine's store counts its backups from 1 again."""
    clock = iter(datetime(2026, 1, day, tzinfo=UTC) for day in (1, 2, 3, 4))
    monkeypatch.setattr(backups, "datetime", SimpleNamespace(now=lambda _: next(clock)))
    monkeypatch.setattr(backups, "_known", lambda *_: {})
    remote = Remote(f"file://{tmp_path}/remote")
    before = [keep_backup(store, model) for _ in range(3)]
    after = keep_backup(other, model)
    remote.push(other, after)
    remote.push(store, before[2])
    assert (before[2].sequence, after.sequence) == (3, 1)
    assert remote.find("latest").id == after.id
    assert [backup.id for backup in remote.all()] == [before[2].id, after.id]


def test_a_store_that_refuses_is_not_told_as_damaged(
    store: Store, made: Manifest, frail: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    frail.push(store, made)
    refused = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Frail, "cat_file", lambda *_, **__: (_ for _ in ()).throw(refused))
    for look in (frail.all, frail.damage, lambda: frail.find("latest")):
        with pytest.raises(BadBackup, match=r"cannot read file:.*Permission denied; check address, rights"):
            look()


def test_a_place_without_backups_has_none(tmp_path: Path) -> None:
    remote = Remote(f"file://{tmp_path}/absent")
    assert (remote.ids(), remote.all(), remote.damage()) == ([], [], [])
    with pytest.raises(BadBackup, match=r"there is no complete backup in file:"):
        remote.find("latest")
    with pytest.raises(BadBackup, match=r"the manifest of x is missing in file:"):
        remote.read("x")


def test_an_address_that_cannot_be_is_told() -> None:
    with pytest.raises(BadBackup, match=r"cannot use nonsense://x: .*; check address, rights and network"):
        Remote("nonsense://x")


def test_addresses_need_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(BadBackup, match=r"cannot use s3://x: .*; pip install that package"):
        Remote("s3://x")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(BadBackup, match="the fsspec package is missing; pip install fsspec"):
        Remote("memory://x")
