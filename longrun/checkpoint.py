"""What a checkpoint is, when it may be trusted, and how it becomes the model.

    state/staging/checkpoint-N      the trainer writes here; nobody else looks
    current_model/checkpoint-N      complete: one rename, after every byte was synced
    current_model/*                 the published model: the newest checkpoint without its optimizer

`manifest.json` names every file of a checkpoint with size and SHA-256 and is itself the mark of
completeness. `lineage.json` says what the weights have seen. A model without checkpoints does not exist:
the first commit makes current_model/ whole, lineage and all, in one rename, so an existing folder without
a lineage.json is one that is being removed, or not ours.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from longrun import disk
from longrun.errors import BadModel, ModelRemoved
from longrun.lineage import Lineage, LineageReader, head_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from longrun.home import Home

MANIFEST = "manifest.json"
LINEAGE = "lineage.json"
TRAINER_STATE = "trainer_state.json"
MANIFEST_VERSION = 1
GONE = (FileNotFoundError, NotADirectoryError)  # how a model looks that was removed, or replaced by a file

# Of a checkpoint, what only a resume needs: not published. training_args.bin is a pickle, removed unread.
RESUME_ONLY = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state", MANIFEST)
NEVER_KEPT = ("training_args.bin",)

_UNREADABLE = (OSError, ValueError, KeyError, TypeError)  # what reading JSON of a wrong shape may end in
_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were verified against its manifest."""

    path: Path
    lineage: Lineage
    digest: str  # SHA-256 of the manifest: the identity of these exact bytes

    @property
    def global_step(self) -> int:
        return self.lineage.global_step


class Damaged(Exception):
    """What under a checkpoint's name is not one; the message says which file and how."""


# -- reading


def steps(model: Path) -> list[int]:
    """Numbers of the checkpoint folders in the model, highest first, whatever is in them."""
    try:
        names = [entry.name for entry in model.iterdir()]
    except GONE:
        return []
    return sorted((int(m[1]) for name in names if (m := _NAME.fullmatch(name))), reverse=True)


def folder_of(model: Path, global_step: int) -> Path:
    return model / f"checkpoint-{global_step}"


class Verifier:
    """Verifies checkpoints, reading each byte once: what was hashed and has not changed since is trusted.

    "Not changed" is the file's size, inode and time of modification, to the nanosecond; a daemon that starts knows
    nothing and reads everything.
    """

    def __init__(self, on_bytes: Callable[[int], None] = lambda _: None) -> None:
        self._on_bytes = on_bytes
        self._known: dict[Path, tuple[str, tuple[int, ...]]] = {}  # the SHA-256 of each file, and when it had it
        self._last: Checkpoint | None = None
        self.lineages = LineageReader()

    def verify(self, folder: Path) -> Checkpoint:
        """The checkpoint in `folder`, or Damaged saying what is wrong with it."""
        manifest = _read_manifest(folder)
        listed = manifest["files"]
        present = {entry.name for entry in folder.iterdir()} - {MANIFEST}
        if present != set(listed):
            raise Damaged(f"files differ from the manifest: {', '.join(sorted(present ^ set(listed)))}")
        for name, facts in listed.items():
            self._verify_file(folder / name, facts["size"], facts["sha256"])
        found = self._read(folder)
        # What says how every other file must be has nothing to be held against but itself.
        if (folder / MANIFEST).read_bytes() != _manifest(found.global_step, listed).encode():
            raise Damaged(f"{MANIFEST} is not as it was written")
        return found

    def trust(self, folder: Path) -> Checkpoint:
        """The checkpoint our own worker has just hashed and committed; its bytes are taken as read."""
        self._known = {path: known for path, known in self._known.items() if path.parent.exists()}
        for name, facts in _read_manifest(folder)["files"].items():
            self._known[folder / name] = (facts["sha256"], _signature(folder / name))
        return self._read(folder)

    def _read(self, folder: Path) -> Checkpoint:
        """What the files say; the last ones are not read again."""
        try:
            if self._last is None or (self._last.path, self._last.digest) != (folder, _digest(folder)):
                lineage = self.lineages.read((folder / LINEAGE).read_bytes())
                self._last = _checkpoint(folder, lineage)
        except _UNREADABLE as error:
            raise Damaged(f"its lineage cannot be read: {error!r}") from None
        return self._last

    def _verify_file(self, path: Path, size: int, sha256: str) -> None:
        if not path.is_file() or path.is_symlink():
            raise Damaged(f"{path.name} is not a file")
        signature = _signature(path)
        if signature[0] != size:
            raise Damaged(f"{path.name} has {signature[0]} bytes, the manifest says {size}")
        if self._known.get(path) == (sha256, signature):
            return
        if disk.hash_file(path, self._on_bytes) != sha256:
            raise Damaged(f"{path.name} does not have the SHA-256 of the manifest")
        self._known[path] = (sha256, signature)


def _signature(path: Path) -> tuple[int, ...]:
    # Not the change time: publishing adds and removes hard links, which moves it without touching a byte.
    found = path.stat()
    return (found.st_size, found.st_dev, found.st_ino, found.st_mtime_ns)


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        if (folder / MANIFEST).is_symlink():
            raise Damaged(f"{MANIFEST} is not a file")
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
        files = manifest["files"]
        if any("/" in name or name in (".", "..") for name in files):
            raise Damaged(f"{MANIFEST} names files outside the checkpoint")
        if manifest["version"] != MANIFEST_VERSION:
            raise Damaged(f"{MANIFEST} has version {manifest['version']}, this program reads {MANIFEST_VERSION}")
        if not all(type(facts["size"]) is int for facts in files.values()):
            raise Damaged(f"{MANIFEST} has a size that is not a number")
        if not all(type(facts["sha256"]) is str for facts in files.values()):
            raise Damaged(f"{MANIFEST} has a SHA-256 that is not a word")
    except FileNotFoundError:
        raise Damaged(f"it has no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise Damaged(f"{MANIFEST} cannot be read: {error}") from None
    return manifest


def _checkpoint(folder: Path, lineage: Lineage) -> Checkpoint:
    """The checkpoint in `folder`, which has this lineage; Damaged when its other files are of another step."""
    try:
        global_step = json.loads((folder / TRAINER_STATE).read_bytes())["global_step"]
    except _UNREADABLE as error:
        raise Damaged(f"its trainer state cannot be read: {error!r}") from None
    if not folder.name == f"checkpoint-{global_step}" == f"checkpoint-{lineage.global_step}":
        raise Damaged(f"it says global step {global_step} in the trainer state, {lineage.global_step} in the lineage")
    return Checkpoint(folder, lineage, _digest(folder))


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def _lineage_in(folder: Path) -> str | None:
    """Which lineage the folder says it is of; None when it does not say."""
    try:
        with (folder / LINEAGE).open("rb") as file:
            found: str = head_in(file)["lineage"]
            return found
    except _UNREADABLE:
        return None


def newest(home: Home, verifier: Verifier, on_damaged: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies; damaged ones above it are set aside, and `on_damaged` is told.

    None when there is no model at all. BadModel when there is one but nothing in it can be trusted, or
    when the folder is not one of ours: training from the base model would then destroy it silently.
    """
    found = steps(home.model)
    for number in found:
        folder = folder_of(home.model, number)
        try:
            return verifier.verify(folder)
        except Damaged as damage:
            if not (home.model / LINEAGE).exists():
                break  # not damaged but being removed, or not ours: BadModel, and who asked decides
            with contextlib.suppress(FileNotFoundError):  # removed in this very moment
                put = set_aside(home, folder)
                on_damaged(f"{folder.name} is damaged ({damage}); set aside as {put}")
        except FileNotFoundError:
            break
    if not _is_empty(home.model):
        raise BadModel(
            f"cannot go on from {home.model}: no checkpoint in it verifies"
            if found or (home.model / LINEAGE).exists()
            else f"cannot go on from {home.model}: it is not empty, but it has no {LINEAGE} and no checkpoint",
            hint="restore a backup with backup_manager.py, or `rm -rf current_model/` to begin anew",
        )
    return None


def _is_empty(folder: Path) -> bool:
    try:
        return not any(folder.iterdir())
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return False


def set_aside(home: Home, folder: Path) -> Path:
    """Move what cannot be trusted out of the model, keeping it for a person to look at."""
    disk.make_folder(home.set_aside)
    target = home.set_aside / f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}.{os.urandom(4).hex()}"
    disk.rename(folder, target)
    return target


def clear_remains(home: Home, lived: str | None = None) -> bool:
    """Finish an `rm -rf current_model/` that met a commit on its way; True when there were remains.

    Remains are checkpoints without the lineage.json that every model has, or, where a lineage `lived` under this
    process until now, what was published of it and lacks either. They are set aside, so that the old model does not
    come back. Anything else in the folder is not ours to judge.
    """
    if _is_empty(home.model) or not home.model.is_dir():
        return False
    entries = list(home.model.iterdir())
    if (home.model / LINEAGE).exists():
        remains = lived is not None and not steps(home.model) and _lineage_in(home.model) == lived
    else:
        ours = _noted(home, lived) if lived is not None else {}
        remains = all(_NAME.fullmatch(entry.name) or _is_noted(entry, ours) for entry in entries)
    if remains:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                set_aside(home, entry)
    return remains


def _note(home: Home, lineage: str | None, files: dict[str, tuple[int, ...]]) -> None:
    """Note what is, or is about to be, published.

    An `rm -rf` does not know of what is moved in behind it; this tells that from what somebody else puts there.
    """
    note = {"lineage": lineage, "files": files}
    disk.write_file(home.published, json.dumps(note).encode(), durable=False)


def _noted(home: Home, lineage: str) -> dict[str, tuple[int, ...]]:
    """The files that were published of this lineage, also those on their way when whoever published them died."""
    try:
        note = json.loads(home.published.read_bytes())
        files: dict[str, list[int]] = note["files"] if note["lineage"] == lineage else {}
        return {name: tuple(signature) for name, signature in files.items()}
    except _UNREADABLE:
        return {}


def _is_noted(entry: Path, ours: dict[str, tuple[int, ...]]) -> bool:
    """Whether it is the very file, and not another one of its name, as somebody copies there; or gone."""
    try:
        return ours.get(entry.name) == _signature(entry)
    except FileNotFoundError:
        return True


# -- writing


class OpenModel:
    """current_model/ as a run found it: held open, so that a removal or replacement is noticed.

    `checkpoint` None means that the run starts a lineage and that the folder must still be absent or empty
    at its first commit.
    """

    def __init__(self, home: Home, checkpoint: Checkpoint | None) -> None:
        self._home = home
        self._folder: int | None = None
        self._lineage = checkpoint.lineage.lineage if checkpoint else None
        if checkpoint is not None:
            self._hold()

    def _hold(self) -> None:
        try:
            self._folder = os.open(self._home.model, os.O_RDONLY | os.O_DIRECTORY)
        except GONE:
            raise ModelRemoved(f"{self._home.model} was removed") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    def glance(self) -> None:
        """ModelRemoved when the folder at the model's path is not the one that was opened; cheap enough for a tick."""
        if self._folder is None:
            return
        held = os.fstat(self._folder)
        try:
            there = self._home.model.stat()
            (self._home.model / LINEAGE).stat()
        except GONE:
            raise ModelRemoved(f"{self._home.model.name}/ was removed") from None
        if not steps(self._home.model):
            raise ModelRemoved(f"{self._home.model.name}/ was removed")
        if (held.st_dev, held.st_ino) != (there.st_dev, there.st_ino):
            raise ModelRemoved(f"{self._home.model.name}/ was replaced")

    def check(self) -> None:
        """ModelRemoved unless the folder is still the one that was opened, with the same lineage in it."""
        if self._folder is None:
            if not _is_empty(self._home.model):
                raise ModelRemoved(f"{self._home.model} appeared while a new model was being trained")
            return
        self.glance()
        if _lineage_in(self._home.model) != self._lineage:
            raise ModelRemoved(f"{self._home.model.name}/ was replaced")

    def commit(
        self, staged: Path, lineage: Lineage, *, keep: int, on_bytes: Callable[[int], None] = lambda _: None
    ) -> Checkpoint:
        """Make the staged checkpoint the model: seal it, give it its name in one rename, publish, retire old ones.

        ModelRemoved when the folder went away meanwhile; nothing of the old model is put back then.
        """
        seal(staged, lineage, on_bytes)
        self.check()
        target = folder_of(self._home.model, lineage.global_step)
        if self._folder is None:
            self._found(staged, lineage)
        else:
            self._add(staged)
        try:
            publish(self._home, target)
            retire(self._home, keep)
            self.check()
            return _checkpoint(target, lineage)
        except (OSError, Damaged):
            self.check()  # what is missing may be the whole model
            raise

    def _found(self, staged: Path, lineage: Lineage) -> None:
        """The first commit of a lineage: the whole model folder appears at once."""
        whole = self._home.staging / "model"
        if whole.exists():
            disk.remove_tree(whole, self._home.staging)
        whole.mkdir()
        disk.move(staged, whole / staged.name)
        for name in _published_names(whole / staged.name):
            _place(whole / staged.name / name, whole / name)
        disk.sync_tree(whole)
        try:
            disk.rename(whole, self._home.model.resolve())  # a symbolic link may say where the model is to be
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise ModelRemoved(f"{self._home.model} appeared while a new model was being trained") from None
        self._lineage = lineage.lineage
        self._hold()

    def _add(self, staged: Path) -> None:
        assert self._folder is not None
        target = self._home.model / staged.name
        if _lineage_in(target) == self._lineage:  # our own, of a commit that failed after its rename
            disk.remove_tree(target, self._home.staging)
        elif target.exists():
            set_aside(self._home, target)
        try:
            disk.rename_into(staged, staged.name, self._folder)
        except FileNotFoundError:
            raise ModelRemoved(f"{self._home.model} was removed") from None
        try:
            self.check()
        except ModelRemoved:
            # The removal met our rename: what we have just put there must not survive it.
            clear_remains(self._home)
            raise


def seal(folder: Path, lineage: Lineage, on_bytes: Callable[[int], None] = lambda _: None) -> None:
    """Write lineage and manifest into a staged checkpoint and make every byte of it durable."""
    for name in NEVER_KEPT:
        disk.remove_file(folder / name)
    (folder / LINEAGE).write_text(lineage.to_json(), encoding="utf-8")
    mode = (folder / LINEAGE).stat().st_mode & 0o777
    for path in folder.iterdir():
        path.chmod(mode)  # safetensors makes files for their owner only, and a server may be somebody else
    files = {
        path.name: {"size": path.stat().st_size, "sha256": disk.hash_file(path, on_bytes)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(_manifest(lineage.global_step, files), encoding="utf-8")
    disk.sync_tree(folder, on_bytes)


def _manifest(global_step: int, files: dict[str, Any]) -> str:
    manifest = {"version": MANIFEST_VERSION, "global_step": global_step, "files": files}
    return json.dumps(manifest, indent=1) + "\n"


def publish(home: Home, checkpoint: Path) -> None:
    """Bring the files of the model folder to the state of `checkpoint`; trainer_state.json last.

    Each file is replaced in one step. A crash in between is repaired by the next start, which publishes
    again. ModelRemoved when the folder or the checkpoint goes meanwhile.
    """
    try:
        _publish(home, checkpoint)
    except GONE:
        raise ModelRemoved(f"{home.model.name}/ was removed") from None


def _publish(home: Home, checkpoint: Path) -> None:
    names = _published_names(checkpoint)
    changed = [name for name in names if not _same(checkpoint / name, home.model / name)]
    lineage = _lineage_in(checkpoint)
    ours = {name: _signature(home.model / name) for name in names if name not in changed}
    _note(home, lineage, ours)
    for name in changed:
        fresh = home.staging / f"published-{name}"
        disk.remove_file(fresh)
        _place(checkpoint / name, fresh)
        ours[name] = _signature(fresh)
        _note(home, lineage, ours)
        disk.move(fresh, home.model / name)
    for stale in _stale_names(home.model, set(names)):
        disk.remove_file(home.model / stale)
    if changed:
        disk.sync_folder(home.model)


def published_names(files: Iterable[str]) -> list[str]:
    """Which of a checkpoint's files are published, in the order of publishing."""
    names = {name for name in files if not name.startswith(RESUME_ONLY)}
    return [*sorted(names - {TRAINER_STATE}), TRAINER_STATE]


def _published_names(checkpoint: Path) -> list[str]:
    return published_names(entry.name for entry in checkpoint.iterdir())


def _stale_names(model: Path, published: set[str]) -> Iterator[str]:
    """Weights that a former checkpoint had under other names (shards): from_pretrained must not mix them."""
    for entry in model.iterdir():
        if entry.name not in published and ".safetensors" in entry.name:
            yield entry.name


def _place(source: Path, target: Path) -> None:
    if source.suffix == ".safetensors":
        disk.share_file(source, target)
    else:
        disk.copy_file(source, target)


def _same(source: Path, target: Path) -> bool:
    try:
        old, new = target.stat(), source.stat()
    except FileNotFoundError:
        return False
    if (old.st_dev, old.st_ino) == (new.st_dev, new.st_ino):
        return True
    if source.suffix == ".safetensors" or old.st_size != new.st_size:
        return False
    return source.read_bytes() == target.read_bytes()


def retire(home: Home, keep: int) -> None:
    """Delete checkpoints beyond the newest `keep`, by number; the newest, which resume needs, is never among them."""
    for number in steps(home.model)[max(keep, 1) :]:
        disk.remove_tree(folder_of(home.model, number), home.staging)
