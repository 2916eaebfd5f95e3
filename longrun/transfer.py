"""Backups on the way: to a folder or an archive that stands for itself, and to a store elsewhere.

    DIR/backup.json  DIR/SHA256SUMS  DIR/model/...    the model ready to use; `sha256sum -c ../SHA256SUMS` in model/
    FILE.tar.zst                                      the same, below ID/, backup.json first
    s3://bucket/folder                                a store as it is on disk, through fsspec

What comes in is believed only as far as it can be checked: the manifest is parsed strictly, each content must have
the size and digest that the manifest names, and nothing is written but parts in the store's tmp/ under names of
our own. Contents go first and the manifest last, in both directions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import stat
import tarfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from longrun import disk
from longrun.backups import stage, staging
from longrun.errors import BadBackup, BadManifest
from longrun.manifest import ANY, MAX_BYTES, Manifest, StoredFile, is_id, parse
from longrun.store import (
    MANIFEST,
    PAPERS,
    PRUNE,
    SUMS,
    Catalogue,
    Damage,
    Store,
    check_room,
    silent,
    stored_files,
    telling,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from longrun.store import Additions

    Meter = Callable[[int], None]

PAPER, MODEL = "backup.json", "model"
HEADERS_MAX_BYTES = 1 << 20  # of an archive, between two contents
ARCHIVES = (".tar.zst", ".tar")
NO_ARCHIVES = (".tgz", ".gz", ".zip", ".xz", ".bz2", ".zst", ".7z")  # names that a person would not give a folder
EXPORT_AGAIN = "export these backups to it again, and they are whole again"


# -- out


def export_folder(store: Store, manifest: Manifest, target: Path, on_bytes: Meter = silent) -> None:
    """The backup as a folder that appears whole; BadBackup when there is something at `target`."""
    with telling(f"export {manifest.id} to {target}"), store.using("export"):
        if store.root.resolve() in target.resolve().parents:
            raise BadBackup(f"cannot export to {target}: that is inside the store", hint="name another folder")
        if target.resolve() == Path.cwd():  # who is in a folder does not see what takes its place
            raise BadBackup(f"cannot export to {target}: that is the folder you are in", hint="name a new folder")
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise BadBackup(f"cannot export to {target}: it exists", hint="name a new folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        with staging(target) as staged:
            check_room(target.parent, manifest.size_bytes, f"export {manifest.id}")
            (staged / MODEL).mkdir()
            stage(store, manifest, staged / MODEL, on_bytes)
            disk.write_file(staged / SUMS, manifest.to_sums())
            disk.write_file(staged / PAPER, manifest.to_json().encode())
            disk.rename(staged, target)


def export_archive(store: Store, manifest: Manifest, target: Path, on_bytes: Meter = silent) -> None:
    """The backup as one file that appears whole; BadBackup when there is one, or a content is damaged."""
    with telling(f"export {manifest.id} to {target}"), store.using("export"), staging(target) as staged:
        if target.exists():
            raise BadBackup(f"cannot export to {target}: it exists", hint="name a new file")
        whole = staged / target.name
        with whole.open("xb") as file:
            _write_archive(store, manifest, file, compressed=target.suffix == ".zst", on_bytes=on_bytes)
        disk.sync_file(whole)
        disk.rename_new(whole, target)
        disk.sync_folder(target.parent)


def _write_archive(store: Store, manifest: Manifest, file: IO[bytes], *, compressed: bool, on_bytes: Meter) -> None:
    with contextlib.ExitStack() as stack:
        out = (
            stack.enter_context(_zstandard().ZstdCompressor().stream_writer(file, closefd=False))
            if compressed
            else file
        )
        archive = stack.enter_context(tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT))
        for name, content in ((PAPER, manifest.to_json().encode()), (SUMS, manifest.to_sums())):
            archive.addfile(_member(f"{manifest.id}/{name}", len(content)), io.BytesIO(content))
        for stored in manifest.files:
            member = _member(f"{manifest.id}/{MODEL}/{stored.path}", stored.size)
            member.mode, member.mtime = stored.mode | 0o600, stored.mtime_ns // 10**9
            with store.object(stored.sha256).open("rb") as opened:
                reader = _Hashing(opened, on_bytes)
                archive.addfile(member, cast("IO[bytes]", reader))
            if reader.digest.hexdigest() != stored.sha256:
                raise BadBackup(f"{stored.path} of {manifest.id} is damaged in the store", hint="see `verify`")


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member


class _Hashing:
    """A file that is hashed as it is read."""

    def __init__(self, file: IO[bytes], on_bytes: Meter) -> None:
        self._file, self._on_bytes = file, on_bytes
        self.digest = hashlib.sha256()

    def read(self, length: int = -1) -> bytes:
        piece = self._file.read(length)
        self.digest.update(piece)
        self._on_bytes(len(piece))
        return piece


def _zstandard() -> Any:
    try:
        import zstandard
    except ModuleNotFoundError:
        raise BadBackup(
            "a .tar.zst needs the zstandard package", hint="pip install zstandard, or name a .tar"
        ) from None
    return zstandard


# -- in


def import_folder(store: Store, folder: Path, on_bytes: Meter = silent) -> Manifest:
    """Take in an exported folder."""
    with telling(f"import {folder}"):
        paper = folder / PAPER
        if not folder.is_dir():
            raise BadBackup(f"cannot import {folder}: there is no such folder", hint="check the path")
        if not paper.is_file():
            raise BadBackup(f"cannot import {folder}: there is no {PAPER} in it", hint="name an exported folder")
        with paper.open("rb") as opened:
            manifest = parse(opened.read(MAX_BYTES + 1), ANY)
        with _arriving(store, manifest) as arrival:
            for file in manifest.files:
                with _opened(folder / MODEL / file.path, file.size) as descriptor:
                    part = arrival.additions.part()
                    digest = disk.copy_hashed(descriptor, part, on_bytes=on_bytes)
                    arrival.take(file, part, digest)
        return arrival.manifest


@contextlib.contextmanager
def _opened(path: Path, size: int) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BadBackup(f"cannot import {path}: it is not a regular file")
        if os.fstat(descriptor).st_size != size:
            raise BadBackup(f"cannot import {path}: it does not have the size of the manifest")
        yield descriptor
    finally:
        os.close(descriptor)


def import_archive(store: Store, archive: Path, on_bytes: Meter = silent) -> Manifest:
    """Take in an exported archive."""
    with telling(f"import {archive}"), archive.open("rb") as file:
        compressed = archive.suffix == ".zst"
        errors: tuple[type[Exception], ...] = (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError)
        errors += (_zstandard().ZstdError,) if compressed else ()
        stream = _Limited(_zstandard().ZstdDecompressor().stream_reader(file) if compressed else file)
        try:
            with tarfile.open(fileobj=cast("IO[bytes]", stream), mode="r|") as opened:
                return _take_members(store, opened, stream, on_bytes)
        except errors as error:
            raise BadBackup(f"cannot import {archive}: it is damaged or no archive ({error})") from None


class _Limited:
    """A stream that ends with an error when it holds more than it was allowed: archives can claim any size."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.allowed = HEADERS_MAX_BYTES + MAX_BYTES

    def read(self, length: int = -1) -> bytes:
        piece = self._stream.read(length)
        self.allowed -= len(piece)
        if self.allowed < 0:
            raise BadBackup("the archive holds more than its manifest says")
        return piece


def _take_members(store: Store, archive: tarfile.TarFile, stream: _Limited, on_bytes: Meter) -> Manifest:
    first = archive.next()
    backup, _, name = (first.name if first else "").partition("/")
    if first is None or name != PAPER or not first.isreg() or first.size > MAX_BYTES or not is_id(backup):
        raise BadBackup(f"the archive is not a backup: it does not begin with ID/{PAPER}")
    manifest = parse(b"".join(_pieces_of(archive, first)), backup)
    wanted = {f"{backup}/{MODEL}/{file.path}": file for file in manifest.files}
    with _arriving(store, manifest) as arrival:
        while (member := _next_member(archive, stream)) is not None:
            if member.name == f"{backup}/{SUMS}" and member.isreg() and member.size <= MAX_BYTES:
                stream.allowed += member.size
                continue
            file = wanted.pop(member.name, None)
            if file is None or not member.isreg() or member.issparse() or member.size != file.size:
                raise BadBackup(f"the archive has something else than its manifest says: {member.name!r}")
            stream.allowed += member.size
            part = arrival.additions.part()
            arrival.take(file, part, disk.write_hashed(_pieces_of(archive, member), part, on_bytes))
    return arrival.manifest


def _next_member(archive: tarfile.TarFile, stream: _Limited) -> tarfile.TarInfo | None:
    """The next member; headers, which tarfile reads into memory whole, may take so much and no more."""
    stream.allowed = HEADERS_MAX_BYTES
    return archive.next()


def _pieces_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
    content = archive.extractfile(member)
    assert content is not None, "only regular files are read"
    while piece := content.read(disk.CHUNK_BYTES):
        yield piece


class _Arrival:
    """A backup that is being taken in."""

    def __init__(self, store: Store, manifest: Manifest, additions: Additions) -> None:
        self._store, self.additions = store, additions
        self.manifest = manifest
        self._missing = dict(manifest.digests)

    def take(self, file: StoredFile, part: Path, digest: str) -> None:
        if digest != file.sha256 or part.stat().st_size != file.size:
            raise BadBackup(f"nothing was imported: {file.path} does not have the SHA-256 and size of the manifest")
        self.additions.take_in(part, digest)
        self._missing.pop(digest, None)

    def has(self, digest: str) -> bool:
        """Whether the store holds this content already, whole: it need not come again."""
        return self.additions.has(digest, self.manifest.digests[digest]) and self._missing.pop(digest) >= 0

    def end(self) -> None:
        """Give the backup its place in the order of this store, and make it exist."""
        if self._missing:
            raise BadBackup(f"nothing was imported: {len(self._missing)} contents are missing")
        if self._store.folder(self.manifest.id).exists():
            self._check_same()
            self._heal()
            return
        self.manifest = dataclasses.replace(self.manifest, sequence=self.additions.next_sequence())
        self.additions.commit(self.manifest)

    def _check_same(self) -> None:
        try:
            here = self._store.read(self.manifest.id)
        except BadBackup:
            return  # damaged: what arrives takes its place
        if here.files != self.manifest.files:
            raise BadBackup(f"cannot import {here.id}: the store has another backup of this id")

    def _heal(self) -> None:
        """The backup is here already. Its own manifest, if it was damaged, is now whole again."""
        with contextlib.suppress(BadBackup):
            self.manifest = dataclasses.replace(self.manifest, sequence=self._store.read(self.manifest.id).sequence)
        self.additions.replace(self.manifest)


@contextlib.contextmanager
def _arriving(store: Store, manifest: Manifest) -> Iterator[_Arrival]:
    Store.make(store.root)
    new = sum(size for digest, size in manifest.digests.items() if not store.object(digest).exists())
    check_room(store.root, new, f"import {manifest.id}", hint=PRUNE)
    with store.adding(f"import-{os.urandom(4).hex()}") as additions:
        arrival = _Arrival(store, manifest, additions)
        yield arrival
        arrival.end()


# -- elsewhere


class Remote(Catalogue):
    """A store behind a URL of fsspec. Every content that was newly written is read back and hashed."""

    def __init__(self, url: str) -> None:
        self.place = url
        try:
            from fsspec.core import url_to_fs
        except ModuleNotFoundError:
            raise BadBackup(f"cannot use {url}: the fsspec package is missing", hint="pip install fsspec") from None
        with self._telling("use"):
            found = url_to_fs(url)
        self._fs: Any = found[0]
        self._root = str(found[1]).rstrip("/")
        self._fs.invalidate_cache()

    @contextlib.contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Every kind of file system has errors of its own; each becomes a sentence."""
        try:
            yield
        except BadBackup:
            raise
        except ImportError as error:
            raise BadBackup(f"cannot {what} {self.place}: {error}", hint="pip install that package") from error
        except Exception as error:
            raise BadBackup(f"cannot {what} {self.place}: {error}", hint="check address, rights and network") from error

    def _at(self, *names: str) -> str:
        return "/".join((self._root, *names))

    def _object(self, digest: str) -> str:
        return self._at("objects", "sha256", digest[:2], digest)

    def ids(self) -> list[str]:
        with self._telling("list"):
            try:
                entries = self._fs.ls(self._at("backups"), detail=False)
            except FileNotFoundError:
                return []
        return sorted(name for entry in entries if is_id(name := str(entry).rstrip("/").rpartition("/")[2]))

    def read(self, backup: str) -> Manifest:
        with self._telling("read"):
            try:
                content = self._fs.cat_file(self._at("backups", backup, MANIFEST), end=MAX_BYTES + 1)
            except FileNotFoundError:
                raise BadManifest(f"the manifest of {backup} is missing in {self.place}") from None
        return parse(content, backup)

    def age(self, manifest: Manifest) -> tuple[Any, ...]:
        """By time: backups of several stores may be here, each with an order of its own."""
        return (manifest.created, manifest.sequence)

    def push(self, store: Store, manifest: Manifest, on_bytes: Meter = silent) -> int:
        """Copy a backup to here; the bytes that were new. What an interrupted push has brought is used.

        What other backups here have is taken as read; a backup that is here already is read, and healed.
        """
        with self._telling("export to"), store.using("export"):
            again = manifest.id in self.ids()
            committed = set() if again else {digest for backup in self.all() for digest in backup.digests}
            new_bytes = 0
            for digest, size in manifest.digests.items():
                known = digest in committed and self._size(digest) == size
                if known or (self._size(digest) == size and self._hash(digest, silent) == digest):
                    on_bytes(size)
                    continue
                self._upload(store, digest, on_bytes)
                new_bytes += size
            papers = PAPERS | {f"backups/{manifest.id}/{SUMS}": manifest.to_sums()}
            papers |= {f"backups/{manifest.id}/{MANIFEST}": manifest.to_json().encode()}  # last: it makes the backup
            for name, content in papers.items():
                self._put(name, content)
            return new_bytes

    def _size(self, digest: str) -> int | None:
        try:
            return int(self._fs.info(self._object(digest))["size"])
        except FileNotFoundError:
            return None

    def _upload(self, store: Store, digest: str, on_bytes: Meter) -> None:
        place = self._object(digest)
        self._fs.makedirs(place.rpartition("/")[0], exist_ok=True)
        self._fs.put_file(str(store.object(digest)), place)
        if self._hash(digest, on_bytes) != digest:
            self._fs.rm_file(place)
            raise BadBackup(
                f"nothing was exported to {self.place}: content {digest[:12]} came back changed",
                hint="`verify` tells whether it is damaged here; else try again",
            )

    def _put(self, name: str, content: bytes) -> None:
        place = self._at(name)
        with contextlib.suppress(FileNotFoundError):
            if self._fs.cat_file(place) == content:
                return  # a good one is not put at risk
        self._fs.makedirs(place.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(place, content)
        if self._fs.cat_file(place) != content:
            raise BadBackup(f"nothing was exported to {self.place}: {name} came back changed", hint="try again")

    def _pieces(self, digest: str) -> Iterator[bytes]:
        with self._fs.open(self._object(digest), "rb") as content:
            while piece := content.read(disk.CHUNK_BYTES):
                yield piece

    def _hash(self, digest: str, on_bytes: Meter) -> str:
        found = hashlib.sha256()
        for piece in self._pieces(digest):
            found.update(piece)
            on_bytes(len(piece))
        return found.hexdigest()

    def pull(self, store: Store, manifest: Manifest, on_bytes: Meter = silent) -> Manifest:
        """Take in a backup from here; what an interrupted pull has brought is used."""
        with telling(f"import {manifest.id}"), self._telling("import from"), _arriving(store, manifest) as arrival:
            for files in stored_files(manifest):
                if arrival.has(files[0].sha256):
                    on_bytes(files[0].size)
                    continue
                part = arrival.additions.part()
                pieces = _no_more_than(files[0].size, self._pieces(files[0].sha256))
                arrival.take(files[0], part, disk.write_hashed(pieces, part, on_bytes))
        return arrival.manifest

    def damage(self, wanted: list[str] | None = None, *, quick: bool = False, on_bytes: Meter = silent) -> list[Damage]:
        """Everything in the store that is not as it was written; `quick` looks at manifests and sizes only."""
        found, needed = [], dict[str, tuple[int, list[str]]]()
        for backup in wanted or self.ids():
            try:
                for digest, size in self.read(backup).digests.items():
                    needed.setdefault(digest, (size, []))[1].append(backup)
            except BadManifest as error:
                found.append(Damage(f"backup {backup}", error.message, [backup], EXPORT_AGAIN))
        for digest, (size, backups) in sorted(needed.items()):
            with self._telling("verify"):
                there = self._size(digest)
                why = "it is missing" if there is None else f"it has {there} bytes instead of {size}"
                if there == size:
                    why = "" if quick or self._hash(digest, on_bytes) == digest else "its content has changed"
                if why:
                    found.append(Damage(f"objects/sha256/{digest[:2]}/{digest}", why, backups, EXPORT_AGAIN))
        return found


def _no_more_than(size: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        size -= len(piece)
        if size < 0:
            raise BadBackup("a content is longer than its manifest says")
        yield piece
