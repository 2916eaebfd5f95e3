"""The store of backups: whole files by their SHA-256, and manifests that name them.

    format.json  RESTORE.txt        what this is, and how to restore with cp and sha256sum alone
    objects/sha256/ab/abcdef...     contents, read-only; only prune deletes
    backups/ID/manifest.json        a backup: its folder appears in one rename, after everything it names is durable
    backups/ID/SHA256SUMS           the same list for sha256sum -c
    tmp/                            what is being written
    lock                            shared by all who add or read, held alone by prune

No packs, no index, no repair: what is stored can be read without this program, and a damaged content is healed
by the next backup of a file that has it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, TypeVar

from longrun import disk, locks
from longrun.errors import BadBackup, BadManifest, Locked
from longrun.manifest import MAX_BYTES, Manifest, StoredFile, is_digest, is_id, parse
from longrun.retention import Keep, expendable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

T = TypeVar("T")

MANIFEST, SUMS = "manifest.json", "SHA256SUMS"
LATEST = "latest"
FORMAT = b'{"format": "longrun backup store", "version": 1, "hash": "sha256"}\n'
THREADS = max(2, min(4, os.cpu_count() or 2))
WAIT_S = 20.0  # for a prune or for the backups that a prune waits for
MADE_ANEW = "the next backup writes it anew"
HEAL = "back up a folder that still has these contents, and they are whole again"
PRUNE = "`prune --execute` frees what retention does not keep, `prune ID --execute` a backup that you name"
ROOM_BYTES = 16 << 20  # kept free beyond what is to be written
YOUNG_S = 86_400.0  # content that no backup names (yet) is left alone for a day

RESTORE_TXT = """\
This folder holds backups of models, made by Longrun's backup_manager.py. To restore one:

    python3 backup_manager.py --store THIS_FOLDER list
    python3 backup_manager.py --store THIS_FOLDER restore ID TARGET

Without that program, in a shell: every file of a backup is listed in backups/ID/SHA256SUMS by the SHA-256 of its
content, and the content is in objects/sha256/ under that name.

    STORE=/path/to/this/folder
    ID=20260101T120000Z-manual-abcdef
    mkdir restored && cd restored
    while read -r digest path; do
        mkdir -p "./$(dirname "$path")"
        cp "$STORE/objects/sha256/$(printf %.2s "$digest")/$digest" "./$path"
    done < "$STORE/backups/$ID/SHA256SUMS"
    sha256sum -c "$STORE/backups/$ID/SHA256SUMS"
    chmod -R u+w .
"""


PAPERS = {"format.json": FORMAT, "RESTORE.txt": RESTORE_TXT.encode()}  # what says what a store is


def silent(count: int) -> None:
    """A meter that nobody looks at."""


@dataclass
class Damage:
    """Something in the store that is not as it was written, and the backups that need it."""

    what: str
    why: str
    backups: list[str] = field(default_factory=list)
    fix: str = ""

    def __str__(self) -> str:
        needed = f"; needed by {', '.join(self.backups)}" if self.backups else ""
        return f"{self.what}: {self.why}{needed}"


class Catalogue:
    """Backups that can be listed and read, wherever they are."""

    place: str

    def ids(self) -> list[str]:
        raise NotImplementedError

    def read(self, backup: str) -> Manifest:
        """The manifest of a backup; BadManifest when it cannot be trusted."""
        raise NotImplementedError

    def age(self, manifest: Manifest) -> tuple[Any, ...]:
        """What puts backups in order, oldest first."""
        raise NotImplementedError

    def all(self) -> list[Manifest]:
        """All backups whose manifests can be trusted, oldest first."""
        found = []
        for backup in self.ids():
            with contextlib.suppress(BadManifest):
                found.append(self.read(backup))
        return sorted(found, key=self.age)

    def find(self, name: str) -> Manifest:
        """A backup by its id, the beginning of it, or "latest", the newest that is complete."""
        if name == LATEST:
            return self._latest()
        matching = [backup for backup in self.ids() if name and backup.startswith(name)]
        if len(matching) == 1:
            return self.read(matching[0])
        why = f"{len(matching)} backups begin so" if matching else "there is no such backup"
        raise BadBackup(f"cannot find {name!r} in {self.place}: {why}", hint="`list` shows their ids")

    def latest_model(self) -> Manifest:
        """As "latest", but of the models of Longrun alone when there is one: what a home goes on from."""
        return self._latest(ours=any(map(_goes_on, self.all())))

    def _latest(self, *, ours: bool = False) -> Manifest:
        """The newest complete backup; an older one never stands in silently for one that cannot be read."""
        readable = self.all()
        whole = [backup for backup in readable if backup.complete and (_goes_on(backup) or not ours)]
        if not whole:
            raise BadBackup(f"there is no complete backup in {self.place}", hint="`list` shows what there is")
        unreadable = set(self.ids()) - {backup.id for backup in readable}
        newer = [backup for backup in sorted(unreadable) if backup > whole[-1].id]  # an id begins with its time
        if newer:
            raise BadBackup(
                f"cannot tell the latest in {self.place}: the manifest of {newer[-1]} is damaged",
                hint=f"name the one you mean; the newest that can be read is {whole[-1].id}",
            )
        return whole[-1]


@dataclass
class Store(Catalogue):
    root: Path

    @property
    def place(self) -> str:  # type: ignore[override]
        return str(self.root)

    @property
    def objects(self) -> Path:
        return self.root / "objects" / "sha256"

    @property
    def backups(self) -> Path:
        return self.root / "backups"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    def object(self, digest: str) -> Path:
        return self.objects / digest[:2] / digest

    def folder(self, backup: str) -> Path:
        return self.backups / backup

    # -- opening

    @classmethod
    def open(cls, root: Path) -> Self:
        """The store at `root`; BadBackup when there is none."""
        store = cls(root)
        if not store.backups.is_dir():
            raise BadBackup(
                f"there are no backups in {root}", hint="make one with `backup_manager.py backup`, or name a --store"
            )
        store._check_format()
        return store

    @classmethod
    def make(cls, root: Path) -> Self:
        """The store at `root`, created when missing; a folder that holds something else is refused."""
        store = cls(root)
        if root.exists() and not root.is_dir():
            raise BadBackup(f"cannot keep backups in {root}: it is not a folder", hint="name another --store")
        if not store.backups.is_dir():
            strange = [entry.name for entry in root.iterdir()] if root.is_dir() else []
            if not {*PAPERS, "objects", "tmp", "lock"} >= set(strange):
                raise BadBackup(f"cannot keep backups in {root}: it holds something else", hint="name an empty --store")
            new = [folder for folder in (root, *root.parents) if not folder.exists()]
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in new:
                disk.sync_folder(folder.parent)
        store._check_format()
        for folder in (store.objects, store.backups, store.tmp):
            folder.mkdir(parents=True, exist_ok=True)
        for name, content in PAPERS.items():
            if not _holds(root / name, content):
                disk.write_file(root / name, content)
        disk.sync_folder(store.objects.parent)
        disk.sync_folder(root)
        return store

    def _check_format(self) -> None:
        try:
            version = json.loads(_bytes_of(self.root / "format.json") or b"{}").get("version", 1)
        except (ValueError, AttributeError, RecursionError):
            return  # damaged: verify says so, the next backup writes it anew
        if version != 1:
            raise BadBackup(
                f"cannot use the store {self.root}: it has version {version}, this program knows 1",
                hint="use the newer program that wrote it",
            )

    def using(self, what: str) -> locks.Lock:
        """The lock of those who add or read: nothing is pruned meanwhile."""
        return self._lock(what, shared=True, wait_s=WAIT_S)

    def pruning(self, wait_s: float | None = None) -> locks.Lock:
        """The store for oneself: no backup is being made, so what lies in tmp/ or is named by none was left behind."""
        return self._lock("prune", shared=False, wait_s=WAIT_S if wait_s is None else wait_s)

    def _lock(self, what: str, *, shared: bool, wait_s: float) -> locks.Lock:
        return locks.Lock.take(
            self.root / "lock", what=what, shared=shared, wait_s=wait_s, held=self.root, hint="wait for it to end"
        )

    # -- what is there

    def ids(self) -> list[str]:
        return sorted(entry.name for entry in self.backups.iterdir() if is_id(entry.name))

    def read(self, backup: str) -> Manifest:
        try:
            content = _bytes_of(self.folder(backup) / MANIFEST)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise BadManifest(f"the manifest of {backup} cannot be read: {error.strerror}") from None
        if content is None:
            raise BadManifest(f"the manifest of {backup} is missing", hint="`verify` tells what else is damaged")
        return parse(content, backup)

    def age(self, manifest: Manifest) -> tuple[Any, ...]:
        """By sequence: the order in which they came into this store, whatever the clock did."""
        return (manifest.sequence, manifest.created)

    def intact(self, digest: str, size: int, on_bytes: Callable[[int], None] = silent, *, cached: bool = True) -> bool:
        """Whether the content of this digest is there, and every byte of it can be read."""
        path = self.object(digest)
        try:
            if path.is_symlink() or path.stat().st_size != size:
                return False
            if not cached:
                disk.forget_cached(path)
            return disk.hash_file(path, on_bytes) == digest
        except OSError:
            return False

    # -- adding

    @contextlib.contextmanager
    def adding(self, backup: str) -> Iterator[Additions]:
        """A folder of its own to write into; gone afterwards, whatever happens."""
        with contextlib.suppress(Locked), self.pruning(wait_s=0.0):
            disk.empty_folder(self.tmp)  # nobody is writing: it was left behind
        with self.using("a backup"):
            folder = self.tmp / backup
            folder.mkdir()
            try:
                yield Additions(self, folder)
            finally:
                disk.remove_remains(folder)

    # -- looking after it

    def damage(
        self, wanted: Iterable[str] | None = None, *, quick: bool = False, on_bytes: Callable[[int], None] = silent
    ) -> list[Damage]:
        """Everything that is not as it was written, in the whole store or in what some backups need.

        `quick` looks at manifests and sizes; otherwise every byte is read.
        """
        found = [] if wanted else self._damaged_papers()
        manifests = []
        for backup in wanted or self.ids():
            try:
                manifests.append(self.read(backup))
            except BadManifest as error:
                fix = f"import that backup again from a copy, or give it up: move its folder out of {self.backups}"
                found.append(Damage(f"backup {backup}", error.message, [backup], fix))
                continue
            if not self.tells_sums(manifests[-1]):
                why = f"it is not what the manifest says; {MADE_ANEW}"
                found.append(Damage(f"backups/{backup}/{SUMS}", why, [backup]))
        return found + self._damaged_objects(manifests, quick, on_bytes)

    def tells_sums(self, manifest: Manifest) -> bool:
        """Whether the sums beside the manifest, for people without this program, are what it says."""
        return _holds(self.folder(manifest.id) / SUMS, manifest.to_sums())

    def _damaged_papers(self) -> list[Damage]:
        why = f"missing or changed; {MADE_ANEW}"
        return [Damage(name, why) for name, content in PAPERS.items() if not _holds(self.root / name, content)]

    def _damaged_objects(self, manifests: list[Manifest], quick: bool, on_bytes: Callable[[int], None]) -> list[Damage]:
        sizes = {digest: size for manifest in manifests for digest, size in manifest.digests.items()}

        def look(digest: str, meter: Callable[[int], None]) -> Damage | None:
            why = self._why_damaged(digest, sizes[digest], quick, meter)
            place = f"objects/sha256/{digest[:2]}/{digest}"
            return Damage(place, why, _needing(manifests, digest), HEAL) if why else None

        return [damage for damage in in_parallel(look, sorted(sizes), on_bytes) if damage]

    def _why_damaged(self, digest: str, size: int, quick: bool, on_bytes: Callable[[int], None]) -> str | None:
        path = self.object(digest)
        try:
            found = path.lstat().st_size
            if path.is_symlink() or not path.is_file():
                return "it is not a file"
            if found != size:
                return f"it has {found} bytes instead of {size}"
            return None if quick or disk.hash_file(path, on_bytes) == digest else "its content has changed"
        except FileNotFoundError:
            return "it is missing"
        except OSError as error:
            return f"it cannot be read ({error.strerror})"

    def unneeded(self, manifests: list[Manifest], *, older_than_s: float) -> dict[str, int]:
        """Contents that none of the backups names and nobody has touched for a while: size in bytes by digest."""
        needed = {digest for manifest in manifests for digest in manifest.digests}
        before = time.time() - older_than_s
        found = {}
        for path in self.objects.glob("??/*"):
            facts = path.lstat()
            if path.name in needed or not is_digest(path.name) or not stat.S_ISREG(facts.st_mode):
                continue  # needed, or nothing of ours
            if facts.st_ctime < before:
                found[path.name] = facts.st_size
        return found

    def prune(self, named: list[str], keep: Keep, *, execute: bool) -> Pruned:
        """Remove the named backups, or those that retention does not keep, and content that no backup needs.

        Without `execute` it is only said. Nothing is removed while a manifest cannot be read (what it needs
        is unknown), while the newest complete backup is damaged, or when that one was named.
        """
        with self.pruning() if execute else self.using("prune"):
            manifests = self._all_or_none()
            doomed = [self.find(name) for name in named] if named else expendable(manifests, keep)
            self._check_newest(manifests, doomed)
            left = [manifest for manifest in manifests if manifest not in doomed]
            stale = self.unneeded(manifests, older_than_s=YOUNG_S)
            needed = {digest for manifest in left for digest in manifest.digests}
            freed = {d: size for manifest in doomed for d, size in manifest.digests.items() if d not in needed}
            if execute:
                for manifest in doomed:
                    disk.remove_tree(self.folder(manifest.id), self.tmp)
                disk.sync_folder(self.backups)
                for digest in freed | stale:
                    disk.remove_file(self.object(digest))
                disk.empty_folder(self.tmp)
            return Pruned(doomed, sum((freed | stale).values()))

    def _all_or_none(self) -> list[Manifest]:
        """All backups, oldest first; BadBackup when one cannot be read."""
        try:
            return sorted((self.read(backup) for backup in self.ids()), key=self.age)
        except BadManifest as error:
            raise BadBackup(
                f"nothing was pruned: {error.message}, so what it needs is unknown",
                hint=f"to give that backup up, move its folder out of {self.backups}",
            ) from None

    def _check_newest(self, manifests: list[Manifest], doomed: list[Manifest]) -> None:
        newest = next((manifest for manifest in reversed(manifests) if manifest.complete), None)
        if newest is None or not doomed:
            return
        if newest in doomed:
            raise BadBackup(
                f"cannot prune {newest.id}: it is the newest complete backup", hint="make another one first"
            )
        damage = self.damage([newest.id])
        if damage:
            raise BadBackup(
                f"nothing was pruned: the newest complete backup is damaged ({damage[0]})",
                hint="back up the model again first; `verify` lists all damage",
            )


@dataclass
class Pruned:
    backups: list[Manifest]
    freed_bytes: int


@dataclass
class Additions:
    """What one process adds to the store; nothing of it is a backup before `commit`."""

    store: Store
    folder: Path
    new_bytes: int = 0
    healed: list[str] = field(default_factory=list)
    _touched: set[Path] = field(default_factory=set)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def part(self) -> Path:
        """A name to write to."""
        return self.folder / os.urandom(8).hex()

    def has(self, digest: str, size: int, on_bytes: Callable[[int], None] = silent, *, cached: bool = True) -> bool:
        """Whether the store holds this content already, intact; its name will be durable before the backup is."""
        if not self.store.intact(digest, size, on_bytes, cached=cached):
            return False
        with self._guard:
            self._touched.add(self.store.object(digest).parent)
        return True

    def take_in(self, part: Path, digest: str, *, cached: bool = True) -> None:
        """Make the durable file at `part` the content of this digest, unless the store has it already, intact."""
        target, size = self.store.object(digest), part.stat().st_size
        there = target.exists()
        if self.has(digest, size, cached=cached):
            disk.remove_file(part)
            return
        if there and target.is_dir():
            raise BadBackup(f"cannot store a content: {target} is a folder", hint="remove it")
        target.parent.mkdir(exist_ok=True)
        part.chmod(0o444)
        disk.move(part, target)
        with self._guard:
            self._touched.add(target.parent)
            self.new_bytes += size
            self.healed += [digest] if there else []

    def commit(self, manifest: Manifest) -> None:
        """Make the backup exist: everything it names is durable, then its folder appears in one step."""
        if len(manifest.to_json()) > MAX_BYTES:
            raise BadBackup(f"cannot store {manifest.source}: it has too many files", hint="leave some of them out")
        self._sync()
        self._mend_sums()
        papers = self.folder / manifest.id
        papers.mkdir()
        for name, content in ((SUMS, manifest.to_sums()), (MANIFEST, manifest.to_json().encode())):
            disk.write_file(papers / name, content)
        disk.rename(papers, self.store.folder(manifest.id))

    def _mend_sums(self) -> None:
        """What is told by a manifest need not stay damaged; another backup's must not keep this one from being made."""
        for manifest in self.store.all():
            if not self.store.tells_sums(manifest):
                with contextlib.suppress(OSError):
                    disk.write_file(self.store.folder(manifest.id) / SUMS, manifest.to_sums())

    def replace(self, manifest: Manifest) -> None:
        """As `commit`, for a backup that exists: what it names was taken in again."""
        self._sync()
        for name, content in ((SUMS, manifest.to_sums()), (MANIFEST, manifest.to_json().encode())):
            disk.write_file(self.store.folder(manifest.id) / name, content)

    def _sync(self) -> None:
        for folder in sorted(self._touched):
            disk.sync_folder(folder)
        disk.sync_folder(self.store.objects)

    def next_sequence(self) -> int:
        return max((manifest.sequence for manifest in self.store.all()), default=0) + 1


class _Stopped(Exception):
    """Another thread has failed."""


def in_parallel(
    work: Callable[[T, Callable[[int], None]], Any], items: Iterable[T], on_bytes: Callable[[int], None] = silent
) -> list[Any]:
    """Results of `work(item, meter)` for all items, by a few threads; the first error ends all of them soon.

    Hashing and copying let go of Python's lock, so while one thread waits for the disk another computes. Threads
    share nothing but the meter: there is no queue between them that could stay full when one fails.
    """
    from concurrent.futures import ThreadPoolExecutor, as_completed

    stop, guard = threading.Event(), threading.Lock()

    def meter(count: int) -> None:
        if stop.is_set():
            raise _Stopped
        with guard:
            on_bytes(count)

    with ThreadPoolExecutor(max_workers=THREADS) as threads:
        waiting = {threads.submit(work, item, meter): number for number, item in enumerate(items)}
        try:
            results = {waiting[done]: done.result() for done in as_completed(waiting)}
        except BaseException:
            stop.set()
            threads.shutdown(wait=True, cancel_futures=True)
            raise
    return [results[number] for number in range(len(results))]


def check_room(folder: Path, need_bytes: int, what: str, *, hint: str = "make room there") -> None:
    """BadBackup when so many bytes, and a little, would not fit where `folder` is."""
    need = need_bytes + need_bytes // 50 + ROOM_BYTES
    free = disk.free_bytes(folder)
    if need > free:
        raise BadBackup(
            f"cannot {what}: {need / 1e6:.0f} MB are needed in {folder}, {free / 1e6:.0f} MB are free",
            hint=hint,
        )


@contextlib.contextmanager
def telling(what: str) -> Iterator[None]:
    """Say what was attempted when the system refuses it."""
    try:
        yield
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        why = f"cannot {what}: {error.strerror or error}{place}"
        raise BadBackup(why, hint="backups made before are as they were; mend that and try again") from error


def stored_files(manifest: Manifest) -> Iterator[list[StoredFile]]:
    """The files of a backup by content."""
    by_digest: dict[str, list[StoredFile]] = {}
    for file in manifest.files:
        by_digest.setdefault(file.sha256, []).append(file)
    yield from by_digest.values()


def _goes_on(backup: Manifest) -> bool:
    """Whether a home can train on from it."""
    return backup.complete and backup.lineage is not None and not backup.is_checkpoint


def _needing(manifests: list[Manifest], digest: str) -> list[str]:
    return [manifest.id for manifest in manifests if digest in manifest.digests]


def _holds(path: Path, content: bytes) -> bool:
    """Whether the store's own file is this; what cannot be read is not."""
    try:
        return _bytes_of(path) == content
    except OSError:
        return False


def _bytes_of(path: Path) -> bytes | None:
    """What the store's own file holds; None for anything else. Of one too long to be ours only so much is read."""
    if path.is_symlink():
        return None
    try:
        if not path.is_file():  # a FIFO would be waited for
            return None
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
