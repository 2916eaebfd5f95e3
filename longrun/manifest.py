"""What a backup is: a list of files by content, sealed, written last.

    backups/ID/manifest.json   the manifest; its folder appearing is the backup coming into being
    backups/ID/SHA256SUMS      the same list in the form of sha256sum, for restoring by hand

A manifest may come from anywhere (an archive, a bucket, a damaged disk), so nothing in it is believed before
`parse` has looked at every field: a path that leaves the folder, a digest that is no digest, two entries of
one name make the whole manifest refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from longrun.errors import BadBackup, BadManifest

FORMAT = "longrun backup"
VERSION = 1
PATH_MAX_BYTES, NAME_MAX_BYTES = 4096, 255  # limits of Linux
DEPTH_MAX = 100  # folders in one another: walking and making them is recursive
SIZE_MAX_BYTES = 1 << 62
MAX_BYTES = 4 << 20  # of a manifest, some 13,000 files: JSON may take thirty times its length in memory
ANY = "any"
CHECKPOINT_MANIFEST = "manifest.json"  # of a checkpoint; what checkpoint.MANIFEST says

_DIGEST = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"\d{8}T\d{6}Z-[a-z_]{1,20}-[0-9a-f]{6}")


class BackupType(StrEnum):
    MANUAL = "manual"  # asked for by a person; kept until named in prune
    SCHEDULED = "scheduled"  # by the daemon, between files; thinned out with age
    PRE_RECOVERY = "pre_recovery"  # before the model is deleted: may be all the user has, so kept as manual ones are
    PRE_RESTORE = "pre_restore"  # before another state takes the model's place; the last few are kept


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    path: str  # relative, with "/"; bytes that are no UTF-8 are surrogate-escaped
    size: int  # bytes
    mode: int  # permission bits
    mtime_ns: int
    sha256: str
    # Device, inode, size, mtime_ns, ctime_ns of the source: the same file unchanged need not be read again.
    stat: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    id: str
    sequence: int  # order of the backups in a store, whatever the clock did
    type: BackupType
    reason: str
    created: str  # ISO 8601, UTC
    host: str
    tool: str
    source: str
    global_step: int | None
    lineage: str | None
    base_model: str | None
    faults: tuple[str, ...]  # what was incomplete or damaged in the source; empty for a whole model
    files: tuple[StoredFile, ...]

    @property
    def complete(self) -> bool:
        return not self.faults

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is of one checkpoint of a Longrun model: a model to use, but none to train on from."""
        return any(file.path == CHECKPOINT_MANIFEST for file in self.files)

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def digests(self) -> dict[str, int]:
        """Size in bytes by digest: what the store must hold for this backup."""
        return {file.sha256: file.size for file in self.files}

    def facts(self) -> dict[str, Any]:
        """For --json: all but the files, which the manifest itself lists."""
        values = {key: value for key, value in asdict(self).items() if key != "files"}
        return values | {"complete": self.complete, "files": len(self.files), "bytes": self.size_bytes}

    def to_json(self) -> str:
        """The manifest with its seal, one file a line."""
        values = {"format": FORMAT, "version": VERSION, **asdict(self)}
        values["seal"] = _seal(values)
        lines = ",\n".join("  " + json.dumps(file) for file in values.pop("files"))
        head = json.dumps({**values, "files": []}, indent=1)
        return head.removesuffix("[]\n}") + f"[\n{lines}\n ]\n}}\n"

    def to_sums(self) -> bytes:
        """What `sha256sum -c` reads; it marks names with a newline or backslash by a leading backslash."""
        return b"".join(_sum_line(file) for file in self.files)


def _sum_line(file: StoredFile) -> bytes:
    name = os.fsencode(file.path)
    escaped = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    mark = b"\\" if escaped != name else b""
    return mark + file.sha256.encode() + b"  " + escaped + b"\n"


def _seal(values: dict[str, Any]) -> str:
    """SHA-256 over the canonical JSON of everything but the seal."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def new_id(kind: BackupType, now: datetime | None = None) -> str:
    return f"{(now or datetime.now(UTC)):%Y%m%dT%H%M%SZ}-{kind}-{os.urandom(3).hex()}"


def is_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def parse(content: bytes, backup: str) -> Manifest:
    """The manifest of the backup of this id (or, for "any", whose it is); BadManifest says what is wrong with it."""
    if len(content) > MAX_BYTES:
        raise BadManifest(f"the manifest of {backup} cannot be trusted: it is longer than any that is written")
    try:
        values = json.loads(content)
        found = _checked(values)
    except BadBackup as error:
        raise BadManifest(f"the manifest of {backup} cannot be trusted: {error.message}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadManifest(f"the manifest of {backup} cannot be read: {error!r}") from None
    if backup not in (ANY, found.id):
        raise BadManifest(f"the manifest of {backup} cannot be trusted: it says that it is {found.id!r}")
    return found


def _checked(values: dict[str, Any]) -> Manifest:
    if values.pop("format") != FORMAT:
        raise BadBackup("it is no backup of Longrun")
    if (version := values.pop("version")) != VERSION:
        raise BadBackup(f"it has version {version}, this program reads {VERSION}")
    sealed = values.pop("seal")
    if sealed != _seal({"format": FORMAT, "version": VERSION, **values}):
        raise BadBackup("its seal does not fit: a byte of it has changed")
    if set(values) != {field.name for field in fields(Manifest)}:
        raise BadBackup("its fields are not those of a manifest")
    _check_types(values)
    files = tuple(_checked_file(entry) for entry in values["files"])
    _check_names([file.path for file in files])
    if len({(file.sha256, file.size) for file in files}) != len({file.sha256 for file in files}):
        raise BadBackup("it gives one content two sizes")
    kind = BackupType(values["type"])
    return Manifest(**{**values, "type": kind, "faults": tuple(values["faults"]), "files": files})


def _check_types(values: dict[str, Any]) -> None:
    words = ("id", "reason", "created", "host", "tool", "source")
    if not all(type(values[key]) is str for key in words) or not is_id(values["id"]):
        raise BadBackup("its id or another word in it is malformed")
    created = datetime.fromisoformat(values["created"])
    if created.tzinfo is None or not 1900 < created.year < 9000:  # any of these can be told in any zone
        raise BadBackup("its time has no time zone, or is impossible")
    if not all(type(values[key]) is str or values[key] is None for key in ("lineage", "base_model")):
        raise BadBackup("its lineage is malformed")
    step = values["global_step"]
    if type(values["sequence"]) is not int or not (step is None or type(step) is int):
        raise BadBackup("a number in it is malformed")
    if not all(type(fault) is str for fault in values["faults"]):
        raise BadBackup("its list of faults is malformed")
    if not values["files"] or type(values["files"]) is not list:
        raise BadBackup("it lists no files")


def _checked_file(entry: dict[str, Any]) -> StoredFile:
    file = StoredFile(**{**entry, "stat": tuple(entry["stat"])})
    if type(file.path) is not str or not is_inside(file.path):
        raise BadBackup(f"it names a file outside the model: {file.path!r}")
    if type(file.sha256) is not str or not is_digest(file.sha256):
        raise BadBackup(f"{file.path!r} has no proper SHA-256")
    if type(file.size) is not int or not 0 <= file.size <= SIZE_MAX_BYTES:
        raise BadBackup(f"{file.path!r} has an impossible size")
    if type(file.mode) is not int or type(file.mtime_ns) is not int or abs(file.mtime_ns) >> 63:
        raise BadBackup(f"{file.path!r} has an impossible mode or time")
    if len(file.stat) not in (0, 5) or not all(type(number) is int for number in file.stat):
        raise BadBackup(f"{file.path!r} has malformed facts")
    return replace(file, mode=file.mode & 0o777)


def is_inside(path: str) -> bool:
    """Whether the path stays below the folder it is resolved in, and can be a name on Linux at all."""
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        return False
    parts = name.split(b"/")
    return (
        b"\0" not in name
        and len(name) < PATH_MAX_BYTES
        and len(parts) <= DEPTH_MAX
        and all(part not in (b"", b".", b"..") and len(part) <= NAME_MAX_BYTES for part in parts)
    )


def _check_names(paths: list[str]) -> None:
    """No name twice, and none that is both a file and a folder."""
    names = set(paths)
    if len(names) != len(paths):
        raise BadBackup("it lists a file twice")
    for path in paths:
        folder = path.rpartition("/")[0]
        while folder:
            if folder in names:
                raise BadBackup(f"it lists {folder!r} both as a file and as a folder")
            folder = folder.rpartition("/")[0]
