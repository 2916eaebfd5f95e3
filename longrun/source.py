"""The folder that is backed up, held still while others go on writing into it.

All its files are opened at once and the folder is then listed again. When every name still leads to the file
that was opened, the open files are the folder as it was at one moment; whatever is renamed, replaced or deleted
later, they stay what they are. So a running trainer is never asked to wait: Longrun's checkpoints never change
under their name and its published files are replaced, not rewritten. A writer that does rewrite in place is
noticed afterwards, by size and time of change.
"""

from __future__ import annotations

import json
import os
import re
import resource
import stat
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from longrun import checkpoint
from longrun.errors import BadBackup
from longrun.manifest import DEPTH_MAX

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

TRIES = 40
PAUSE_S = 0.1  # between tries; a commit publishes in less than a second
_INDEX = re.compile(r".*\.index\.json")
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|ckpt|distcp)")
_BESIDE_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state).*"
)  # what a Trainer saves with them
_PART = re.compile(r"(.*)-\d{5}-of-(\d{5}\..*)")  # model-00001-of-00003.safetensors
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class Restless(Exception):
    """The folder changed while it was looked at."""


@dataclass
class Pinned:
    """One file of the source, held open."""

    path: str  # relative, with "/"
    descriptor: int
    found: os.stat_result

    @property
    def inode(self) -> tuple[int, int]:
        return (self.found.st_dev, self.found.st_ino)

    @property
    def signature(self) -> tuple[int, ...]:
        """What differs after any write through the file system, even one that puts the old time back."""
        return (*self.inode, self.found.st_size, self.found.st_mtime_ns, self.found.st_ctime_ns)

    def changed(self) -> bool:
        now = os.fstat(self.descriptor)
        if (now.st_size, now.st_mtime_ns) != (self.found.st_size, self.found.st_mtime_ns):
            return True
        # Links come and go as checkpoints are published and retired, and move only the time of change.
        return now.st_nlink == self.found.st_nlink and now.st_ctime_ns != self.found.st_ctime_ns

    def read(self, start: int, length: int) -> bytes:
        return os.pread(self.descriptor, length, start)

    def json(self) -> Any:
        return json.loads(self.read(0, self.found.st_size))


def check_is_folder(folder: Path) -> None:
    """BadBackup when there is nothing at the path that could be backed up."""
    if not folder.is_dir():
        why = "it is not a folder" if folder.exists() else "there is no such folder"
        raise BadBackup(f"cannot back up {folder}: {why}", hint="check the path")


@dataclass
class Snapshot:
    """The source at one moment."""

    folder: Path
    files: dict[str, Pinned] = field(default_factory=dict)  # by path, in order

    @classmethod
    def take(cls, folder: Path, *, follow: bool = False) -> Self:
        """Hold the folder as it is; BadBackup when there is nothing to hold, or it does not come to rest.

        `follow` also takes what symbolic links outside the folder lead to, as in the hub's cache.
        """
        check_is_folder(folder)
        _allow_many_files()
        for attempt in range(TRIES):
            snapshot = cls(folder.resolve())
            try:
                snapshot._pin(follow)
                snapshot._check_rest(follow, patient=attempt < TRIES - 1)
                return snapshot
            except (Restless, FileNotFoundError):
                snapshot.close()
                time.sleep(PAUSE_S)
            except BaseException:
                snapshot.close()
                raise
        raise BadBackup(
            f"cannot back up {folder}: it keeps changing",
            hint="wait for what writes into it, or stop it, and try again",
        )

    def _pin(self, follow: bool) -> None:
        for path, place in _walk(self.folder, follow):
            descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not block
            found = os.fstat(descriptor)
            self.files[path] = Pinned(path, descriptor, found)
            if not stat.S_ISREG(found.st_mode):
                raise BadBackup(f"cannot back up {place}: it is not a regular file", hint="move it out of the folder")
        if not self.files:
            raise BadBackup(f"cannot back up {self.folder}: it is empty", hint="check the path")

    def _check_rest(self, follow: bool, *, patient: bool) -> None:
        """Restless unless the names still lead to the files that were opened, and no commit is half published."""
        now = {path: place.stat() for path, place in _walk(self.folder, follow)}
        then = {path: pinned.inode for path, pinned in self.files.items()}
        if {path: (found.st_dev, found.st_ino) for path, found in now.items()} != then:
            raise Restless
        if patient and self.half_published():
            raise Restless

    def half_published(self) -> bool:
        """Whether the files of a Longrun model are not (yet) those of its newest checkpoint."""
        newest = self.newest_checkpoint()
        if newest is None or checkpoint.LINEAGE not in self.files:
            return False
        return self._bytes_of(checkpoint.TRAINER_STATE) != self._bytes_of(f"{newest}/{checkpoint.TRAINER_STATE}")

    def newest_checkpoint(self) -> str | None:
        names = {path.partition("/")[0] for path in self.files if "/" in path}
        numbers = [int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))]
        return f"checkpoint-{max(numbers)}" if numbers else None

    def unsealed_checkpoints(self) -> list[str]:
        """Checkpoint folders without the manifest that each of Longrun's has."""
        folders = {path.partition("/")[0] for path in self.files if "/" in path}
        ours = (name for name in folders if _CHECKPOINT.fullmatch(name))
        return sorted(name for name in ours if f"{name}/{checkpoint.MANIFEST}" not in self.files)

    def _bytes_of(self, path: str) -> bytes:
        pinned = self.files.get(path)
        return pinned.read(0, pinned.found.st_size) if pinned else b""

    def changed(self) -> list[str]:
        """Files that were written to since they were opened."""
        return [path for path, pinned in self.files.items() if pinned.changed()]

    def fact(self, name: str, key: str) -> Any:
        """A value of a JSON file of the source's root, or of its newest checkpoint; None when there is none."""
        for path in (name, f"{self.newest_checkpoint()}/{name}"):
            try:
                return self.files[path].json()[key]
            except (KeyError, TypeError, ValueError, RecursionError):
                continue
        return None

    def close(self) -> None:
        for pinned in self.files.values():
            os.close(pinned.descriptor)
        self.files = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _walk(root: Path, follow: bool) -> Iterator[tuple[str, Path]]:
    """Every file below the folder, in order: its relative path, and where its bytes are."""
    yield from _below(root, root, follow, DEPTH_MAX)


def _below(root: Path, folder: Path, follow: bool, depth: int) -> Iterator[tuple[str, Path]]:
    if not depth:
        raise BadBackup(f"cannot back up {root}: it is deeper than {DEPTH_MAX} folders", hint="check the path")
    for entry in sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name)):
        place = folder / entry.name
        if entry.is_symlink():
            place = _led_to(root, place, follow)
        if place.is_dir():
            deeper = _below(root, place, follow, depth - 1)
            yield from ((f"{entry.name}/{path}", found) for path, found in deeper)
        else:
            yield entry.name, place


def _led_to(root: Path, link: Path, follow: bool) -> Path:
    place = Path(os.path.realpath(link))  # not resolve(), which knows no end of a loop before Python 3.13
    if root in place.parents and place.is_file():
        return place
    if not place.is_file():  # nor folders: a link to one above would have no end
        raise BadBackup(f"cannot back up {link}: {place}, where it leads, is not a file", hint="remove the link")
    if not follow:
        raise BadBackup(
            f"cannot back up {link}: it is a link to {place}", hint="--follow stores the file that is there"
        )
    return place


def _allow_many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# -- is it a whole model?


def faults(snapshot: Snapshot, digests: dict[str, str] | None) -> list[str]:
    """What of the source is incomplete or damaged, in words; nothing for a whole model.

    `digests` are SHA-256 by path, or None before anything was read: what can be seen then is told early. A checkpoint
    of Longrun is held against its manifest, byte for byte; of other folders the shape is looked at: weights are there,
    none is cut off, and every shard is present.
    """
    folders = sorted({path.rpartition("/")[0] for path in snapshot.files})
    found = [fault for folder in folders for fault in _faults_in(snapshot, folder, digests)]
    if not any(map(_is_weights, snapshot.files)):
        found.append("there are no weights in it")
    own = (folder for folder in folders if not folder or _CHECKPOINT.fullmatch(folder))
    names_a_lineage = any(f"{folder}/{checkpoint.LINEAGE}".lstrip("/") in snapshot.files for folder in own)
    if names_a_lineage and checkpoint.MANIFEST not in snapshot.files:  # a Longrun model, not a checkpoint of one
        found += _faults_of_publishing(snapshot, digests)
    return found


def _is_weights(path: str) -> bool:
    name = path.rpartition("/")[2]
    return bool(_WEIGHTS.fullmatch(name)) and not _BESIDE_WEIGHTS.fullmatch(name)


def _faults_of_publishing(snapshot: Snapshot, digests: dict[str, str] | None) -> list[str]:
    """Whether the files of a Longrun model are those of its newest checkpoint, each byte of them."""
    newest = snapshot.newest_checkpoint()
    if checkpoint.LINEAGE not in snapshot.files:
        return [f"it has checkpoints, but no {checkpoint.LINEAGE}: it is being removed, or a part of a model"]
    if newest is None:
        return ["it has a lineage, but no checkpoint to go on from"]
    if snapshot.half_published():
        return [f"its files are not those of {newest}: a publish was cut off (the next daemon finishes it)"]
    found = [f"{name}: it has no {checkpoint.MANIFEST}" for name in snapshot.unsealed_checkpoints()]
    sealed = snapshot.files.get(f"{newest}/{checkpoint.MANIFEST}")
    names = listed(sealed) if sealed else {}
    found += [
        f"{name} is {'not that of' if name in snapshot.files else 'missing, unlike in'} {newest}"
        for name in (checkpoint.published_names(names) if names else [])
        if (digests.get(name) != names.get(name) if digests else name not in snapshot.files)
    ]
    return found


def _faults_in(snapshot: Snapshot, folder: str, digests: dict[str, str] | None) -> Iterator[str]:
    prefix = f"{folder}/" if folder else ""
    here = {path.removeprefix(prefix): path for path in snapshot.files if path.rpartition("/")[0] == folder}
    where = f"{folder}: " if folder else ""
    if checkpoint.MANIFEST in here:
        yield from (
            where + fault for fault in _against_manifest(snapshot.files[here[checkpoint.MANIFEST]], here, digests)
        )
        return
    for name, path in here.items():
        fault = _fault_of(name, snapshot.files[path], here)
        if fault:
            yield f"{path}: {fault}"
    yield from (where + fault for fault in _missing_parts(here))
    number = _CHECKPOINT.fullmatch(folder.rpartition("/")[2])
    if number and not any(_is_weights(path) for path in snapshot.files if path.startswith(prefix)):
        yield f"{where}there are no weights in it"
    if number and _step_of(snapshot, here) != int(number[1]):
        yield f"{where}its trainer_state.json is missing or says another step: the checkpoint was cut off"


def _missing_parts(here: Collection[str]) -> Iterator[str]:
    """Of weights in several files, by their names where no index lists them: an interrupted copy may lack it."""
    if any(_INDEX.fullmatch(name) for name in here):
        return
    parts = Counter(f"{match[1]}-*-of-{match[2]}" for name in here if (match := _PART.fullmatch(name)))
    for name, count in parts.items():
        wanted = int(name.rpartition("-of-")[2].partition(".")[0])
        if count < wanted:
            yield f"{name} has {count} of {wanted} parts"


def listed(manifest: Pinned) -> dict[str, str]:
    """SHA-256 by name as a checkpoint's manifest has them; nothing when it cannot be read."""
    try:
        return {str(name): str(facts["sha256"]) for name, facts in manifest.json()["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _against_manifest(manifest: Pinned, here: dict[str, str], digests: dict[str, str] | None) -> Iterator[str]:
    named = listed(manifest)
    if not named:
        yield f"{checkpoint.MANIFEST} cannot be read"
        return
    for name in sorted(named.keys() ^ (here.keys() - {checkpoint.MANIFEST})):
        yield f"{name} is {'missing' if name in named else 'not in its manifest'}"
    for name in sorted(named.keys() & here.keys()):
        if digests and digests.get(here[name]) != named[name]:
            yield f"{name} does not have the SHA-256 of its manifest"


def _step_of(snapshot: Snapshot, here: dict[str, str]) -> Any:
    try:
        return snapshot.files[here[checkpoint.TRAINER_STATE]].json()["global_step"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return None


def looks_like_model(name: str) -> bool:
    """Whether a file or folder of this name stands in a model and hardly anywhere else."""
    return name in ("config.json", checkpoint.LINEAGE) or bool(_WEIGHTS.fullmatch(name) or _CHECKPOINT.fullmatch(name))


def _fault_of(name: str, file: Pinned, here: dict[str, str]) -> str | None:
    if _WEIGHTS.fullmatch(name) and not file.found.st_size:
        return "it is empty"
    try:
        if name.endswith(".safetensors"):
            return _safetensors_fault(file)
        if name.endswith((".pt", ".pth", ".bin")):
            return _zip_fault(file)
        if _INDEX.fullmatch(name):
            missing = sorted(set(file.json()["weight_map"].values()) - here.keys())
            return f"its shard {missing[0]} is missing" if missing else None
        if name == "config.json" or name == checkpoint.TRAINER_STATE:
            file.json()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "it cannot be read"
    return None


def _safetensors_fault(file: Pinned) -> str | None:
    """A safetensors file says in its header where its last tensor ends (format: 8 bytes length, JSON, data)."""
    size = file.found.st_size
    header_bytes = int.from_bytes(file.read(0, 8), "little")
    if size < 8 or header_bytes > size - 8:
        return "it is cut off"
    tensors = json.loads(file.read(8, header_bytes))
    ends = [facts["data_offsets"][1] for name, facts in tensors.items() if name != "__metadata__"]
    return None if 8 + header_bytes + max(ends, default=0) == size else "it is cut off"


def _zip_fault(file: Pinned) -> str | None:
    """torch.save writes a zip archive, whose directory comes last. It is never unpickled here."""
    size = file.found.st_size
    if file.read(0, 4) != b"PK\x03\x04":
        return None  # an older format, or a file of somebody else
    tail_bytes = min(size, 66_000)  # the record may be followed by a comment of 65,535 bytes
    return None if b"PK\x05\x06" in file.read(size - tail_bytes, tail_bytes) else "it is cut off"
