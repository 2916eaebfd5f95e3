"""Making a backup of a folder, and putting one in a folder's place.

Both are complete or absent: a backup exists when every byte it names is durable and was hashed as it lies in the
store; a restored folder takes its name in one step, after every byte of it was hashed again, and what was there
before is kept beside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import socket
import stat
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from longrun import __version__, checkpoint, disk
from longrun.errors import BadBackup
from longrun.manifest import BackupType, Manifest, StoredFile, is_digest, is_inside, new_id
from longrun.source import Pinned, Snapshot, check_is_folder, faults, listed, looks_like_model
from longrun.store import PRUNE, Store, check_room, in_parallel, silent, stored_files, telling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from longrun.store import Additions

TRIES = 3
SETTLED_S = 2.0  # a file that changed this shortly before a backup may change again within the clock's grain


@dataclass(frozen=True)
class Saved:
    """A backup that was made."""

    manifest: Manifest
    new_bytes: int
    healed: list[str]  # contents that were damaged in the store and are whole again
    seconds: float


def back_up(
    store: Store,
    folder: Path,
    kind: BackupType,
    *,
    reason: str = "",
    follow: bool = False,
    on_start: Callable[[int], None] = silent,
    on_bytes: Callable[[int], None] = silent,
) -> Saved:
    """Make a backup of `folder`; BadBackup when it is empty, incomplete or does not hold still, or for want of room.

    A pre_recovery backup takes an incomplete model too, and says so in its manifest: it may be all there is. It
    reads every byte of the source, and every stored byte back from the disk. `on_start` hears how many bytes
    there are, `on_bytes` of each piece that was read.
    """
    with telling(f"back up {folder}"):
        check_is_folder(folder)
        _check_apart(store, folder)
        Store.make(store.root)
        started, now = time.monotonic(), datetime.now(UTC)
        backup = new_id(kind, now)
        with store.adding(backup) as additions:
            for _ in range(TRIES):
                with Snapshot.take(folder, follow=follow) as snapshot:
                    _check_whole(snapshot, kind, faults(snapshot, None))
                    on_start(sum(size for size in _sizes(snapshot).values()))
                    files = _Copying(store, additions, snapshot, kind, on_bytes).files()
                    if not snapshot.changed():
                        manifest = _manifest(backup, now, kind, reason, snapshot, files, additions.next_sequence())
                        additions.commit(manifest)
                        return Saved(manifest, additions.new_bytes, additions.healed, time.monotonic() - started)
        raise BadBackup(
            f"cannot back up {folder}: its files are being rewritten",
            hint="stop what writes into it; Longrun's own training never does that",
        )


def _check_apart(store: Store, folder: Path) -> None:
    source, place = folder.resolve(), store.root.resolve()
    if source == place or source in place.parents or place in source.parents:
        raise BadBackup(f"cannot back up {folder} into {store.root}: one is inside the other", hint="name a --store")


def _sizes(snapshot: Snapshot) -> dict[tuple[int, int], int]:
    """Size in bytes by inode: a file with two names is copied once."""
    return {pinned.inode: pinned.found.st_size for pinned in snapshot.files.values()}


class _Copying:
    """Bringing a snapshot's contents into the store."""

    def __init__(
        self,
        store: Store,
        additions: Additions,
        snapshot: Snapshot,
        kind: BackupType,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._store, self._additions, self._snapshot = store, additions, snapshot
        self._on_bytes = on_bytes
        self._thorough = kind is BackupType.PRE_RECOVERY
        self._known = {} if self._thorough else _known(store, snapshot.folder)

    def files(self) -> list[StoredFile]:
        by_inode = {pinned.inode: pinned for pinned in self._snapshot.files.values()}
        self._check_room(by_inode)
        # The largest first, so that no thread is left alone with one at the end.
        ordered = sorted(by_inode.values(), key=lambda pinned: -pinned.found.st_size)
        digests = dict(zip([p.inode for p in ordered], in_parallel(self._bring, ordered, self._on_bytes), strict=True))
        return [_stored(pinned, digests[pinned.inode]) for pinned in self._snapshot.files.values()]

    def _check_room(self, by_inode: dict[tuple[int, int], Pinned]) -> None:
        first = next(iter(by_inode.values()))
        if disk.can_clone(first.descriptor, self._additions.folder):
            return
        expected = _promised(self._snapshot)
        sizes = {
            pinned.inode: pinned.found.st_size
            for pinned in by_inode.values()
            if pinned.signature not in self._known and not self._has(expected.get(pinned.path))
        }
        check_room(self._store.root, sum(sizes.values()), f"back up {self._snapshot.folder}", hint=PRUNE)

    def _has(self, digest: str | None) -> bool:
        return digest is not None and self._store.object(digest).exists()

    def _bring(self, pinned: Pinned, on_bytes: Callable[[int], None]) -> str:
        """The content's digest, when the store has it."""
        known = self._known.get(pinned.signature)
        if known and self._additions.has(known, pinned.found.st_size, on_bytes):
            return known
        part = self._additions.part()
        try:
            digest = disk.copy_hashed(pinned.descriptor, part, read_back=self._thorough, on_bytes=on_bytes)
            self._additions.take_in(part, digest, cached=not self._thorough)
        except OSError as error:
            error.filename = error.filename or pinned.path
            raise
        return digest


def _known(store: Store, folder: Path) -> dict[tuple[int, ...], str]:
    """Digests, by signature, of files that the last backup of this folder read and that were settled then.

    As git's index does: a file that changed within the clock's grain of being read is read again.
    """
    same = [m for m in store.all() if (m.source, m.host) == (str(folder), socket.gethostname())]
    if not same:
        return {}
    before_ns = (datetime.fromisoformat(same[-1].created).timestamp() - SETTLED_S) * 1e9
    return {file.stat: file.sha256 for file in same[-1].files if file.stat and max(file.stat[3:]) < before_ns}


def _promised(snapshot: Snapshot) -> dict[str, str]:
    """Digests by path as the checkpoints' own manifests name them: enough to estimate what is new."""
    found: dict[str, str] = {}
    for path, pinned in snapshot.files.items():
        folder, _, name = path.rpartition("/")
        if name == checkpoint.MANIFEST:
            found |= {f"{folder}/{file}".lstrip("/"): digest for file, digest in listed(pinned).items()}
    return {path: digest for path, digest in found.items() if is_digest(digest)}


def _stored(pinned: Pinned, digest: str) -> StoredFile:
    if not is_inside(pinned.path):
        raise BadBackup(f"cannot back up {pinned.path!r}: its name is too long")
    return StoredFile(
        path=pinned.path,
        size=pinned.found.st_size,
        mode=pinned.found.st_mode & 0o777,
        mtime_ns=pinned.found.st_mtime_ns,
        sha256=digest,
        stat=pinned.signature,
    )


def _check_whole(snapshot: Snapshot, kind: BackupType, found: list[str]) -> None:
    if found and kind is not BackupType.PRE_RECOVERY:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise BadBackup(
            f"cannot back up {snapshot.folder}: it is not a whole model: {found[0]}{more}",
            hint="--type pre_recovery stores it as it is, marked incomplete",
        )


def _manifest(
    backup: str,
    now: datetime,
    kind: BackupType,
    reason: str,
    snapshot: Snapshot,
    files: list[StoredFile],
    sequence: int,
) -> Manifest:
    found = faults(snapshot, {file.path: file.sha256 for file in files})
    _check_whole(snapshot, kind, found)
    step = snapshot.fact(checkpoint.TRAINER_STATE, "global_step")
    lineage, base = (snapshot.fact(checkpoint.LINEAGE, key) for key in ("lineage", "base_model"))
    return Manifest(
        id=backup,
        sequence=sequence,
        type=kind,
        reason=reason,
        created=now.isoformat(timespec="seconds"),
        host=socket.gethostname(),
        tool=f"Longrun {__version__}",
        source=str(snapshot.folder),
        global_step=step if type(step) is int else None,
        lineage=lineage if type(lineage) is str else None,
        base_model=base if type(base) is str else None,
        faults=tuple(found),
        files=tuple(files),
    )


# -- restoring


def restore(store: Store, manifest: Manifest, target: Path, *, on_bytes: Callable[[int], None] = silent) -> Path | None:
    """Put the backup in the place of `target`; where what stood there is now, if anything did.

    The folder is staged beside its place, every file hashed as it lies there, and both change names in one step.
    BadBackup when anything is not as the manifest says: `target` is then as it was.
    """
    target = target.resolve()  # a link stays, and what it leads to is replaced
    with telling(f"restore {manifest.id} to {target}"):
        if target.exists() and not target.is_dir():
            raise BadBackup(f"cannot restore to {target}: it is not a folder", hint="name another TARGET")
        place = store.root.resolve()
        if target == place or target in place.parents or place in target.parents:
            raise BadBackup(f"cannot restore to {target}: the backups are in it, or it in them", hint="name another")
        _check_place(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        with store.using("restore"), staging(target) as staged:
            _check_room(store, manifest, staged)
            stage(store, manifest, staged, on_bytes)
            _take_modes(staged, target)
            return _take_place(staged, target)


def _check_place(target: Path) -> None:
    """BadBackup unless the target is free, empty, or a model: anything else was named by mistake."""
    for folder in target.parents:
        if (folder / checkpoint.LINEAGE).exists():
            raise BadBackup(f"cannot restore to {target}: it is inside the model {folder}", hint="name another TARGET")
    names = [entry.name for entry in target.iterdir()] if target.is_dir() else []
    if names and not any(looks_like_model(name) for name in names):
        raise BadBackup(
            f"cannot restore to {target}: it holds something else than a model", hint="name a new or empty folder"
        )


def stage(store: Store, manifest: Manifest, folder: Path, on_bytes: Callable[[int], None] = silent) -> None:
    """Write the backup's files below a new folder, durably; BadBackup when a content is not what it should be."""

    def bring(files: list[StoredFile], meter: Callable[[int], None]) -> None:
        for file in files:
            _write(store, manifest, file, folder / file.path, meter)

    for file in manifest.files:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
    in_parallel(bring, sorted(stored_files(manifest), key=lambda files: -files[0].size), on_bytes)
    disk.sync_tree(folder)


def _write(store: Store, manifest: Manifest, file: StoredFile, place: Path, meter: Callable[[int], None]) -> None:
    damaged = BadBackup(
        f"nothing was restored or exported: {file.path} of {manifest.id} is damaged or missing in the store",
        hint="`verify` lists which backups are whole; backing up a folder that has this file heals it",
    )
    try:
        with store.object(file.sha256).open("rb") as content:
            digest = disk.copy_hashed(content.fileno(), place, on_bytes=meter)
    except (FileNotFoundError, IsADirectoryError):
        raise damaged from None
    if digest != file.sha256:
        raise damaged
    place.chmod(file.mode | 0o600)
    os.utime(place, ns=(file.mtime_ns, file.mtime_ns))


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """A folder beside the target to write into, locked while it is used, so that remains can be told and removed."""
    for remains in target.parent.glob(f".{glob.escape(target.name)}.restore-*.tmp"):
        with contextlib.suppress(OSError), _locked(remains):
            disk.remove_remains(remains)
    staged = disk.aside(target.with_name(f"{target.name}.restore-{os.urandom(4).hex()}"))
    staged.mkdir()
    with _locked(staged):
        try:
            yield staged
        finally:
            disk.remove_remains(staged)  # gone already when it took its place


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _check_room(store: Store, manifest: Manifest, staged: Path) -> None:
    sample = store.object(manifest.files[0].sha256)
    if not (sample.is_file() and disk.can_clone(sample, staged)):
        check_room(staged.parent, manifest.size_bytes, f"restore {manifest.id}")


def _take_modes(staged: Path, target: Path) -> None:
    """Folders let in whom those that they replace let in: files may be protected by their folder alone."""
    for folder in (staged, *(entry for entry in staged.rglob("*") if entry.is_dir())):
        replaced = target / folder.relative_to(staged)
        if replaced.is_dir():
            folder.chmod(stat.S_IMODE(replaced.stat().st_mode))


def _take_place(staged: Path, target: Path) -> Path | None:
    """After a kill before the swap, what is named "replaced" is what was to be restored; it is complete either way."""
    if not target.exists() or not any(target.iterdir()):
        disk.rename(staged, target)
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S")
    former = target.with_name(f"{target.name}.replaced-{stamp}-{os.urandom(4).hex()}")
    try:
        disk.rename(staged, former)
        disk.swap(target, former)
    except OSError:
        if former.exists():  # it got its name, and then something failed: it must not keep it
            disk.move(former, staged)
        raise
    try:
        disk.sync_folder(target.parent)
    except OSError as error:  # it is done, so this must undo nothing
        raise BadBackup(
            f"{target} is the backup now, but it is not sure to outlast a crash: {error.strerror}",
            hint=f"what was there is kept as {former}",
        ) from error
    return former
