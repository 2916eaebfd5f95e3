"""Tools that keep backups of a model: what to type for each operation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

ROOT = Path(__file__).parent.parent
OURS, THOROUGH = "longrun", "longrun, pre_recovery"
OPERATIONS = {
    "first": "first backup",
    "unchanged": "second, unchanged",
    "changed": "third, one weights file changed",
    "verify": "full verify",
    "restore": "restore",
}


class Tool:
    """A program that keeps backups of `model` in `store`."""

    name = needs = package = ""
    version = ("--version",)
    operations = tuple(OPERATIONS)
    settings: ClassVar[dict[str, str]] = {}

    def __init__(self, store: Path, model: Path) -> None:
        self.store, self.model = store, model
        own = {"BORG_BASE_DIR": f"{store}.base", "RESTIC_CACHE_DIR": f"{store}.cache"}
        self.environment = {**os.environ, **own, **self.settings}

    @classmethod
    def missing(cls) -> bool:
        return shutil.which(cls.needs) is None

    @classmethod
    def says(cls) -> str:
        """Name and version."""
        said = subprocess.run([cls.needs, *cls.version], capture_output=True, text=True, check=True).stdout
        return said.splitlines()[0]

    def begin(self) -> list[str]:
        """Make an empty store; not measured."""
        return ["mkdir", str(self.store)]

    def save(self, name: str) -> list[str]:
        """Make a backup."""
        raise NotImplementedError

    def verify(self) -> list[str]:
        """Read every byte of all backups."""
        raise NotImplementedError

    def restore(self, target: Path) -> list[str]:
        """Put the last backup below a new folder, in which this is run."""
        raise NotImplementedError

    def restored(self, target: Path) -> Path:
        return target

    def stored_bytes(self) -> int:
        """Bytes on the disk, a file with two names counted once."""
        found = {file.lstat().st_ino: file.lstat().st_blocks * 512 for file in self.store.rglob("*")}
        return sum(found.values())


class Cp(Tool):
    name = needs = "cp"

    def save(self, name: str) -> list[str]:
        return ["cp", "-a", f"{self.model}/.", str(self.store / name)]

    def verify(self) -> list[str]:  # of what a copy must be held against from outside
        sums = sorted(str(file.relative_to(self.model)) for file in self.model.rglob("*") if file.is_file())
        made = subprocess.run(["sha256sum", *sums], cwd=self.model, capture_output=True, check=True).stdout
        (self.store / "sums").write_bytes(made)
        return ["sh", "-c", 'cd "$1/changed" && sha256sum --quiet -c ../sums', "sh", str(self.store)]

    def restore(self, target: Path) -> list[str]:
        return ["cp", "-a", f"{self.store}/changed/.", str(target)]


class Restic(Tool):
    name = needs = package = "restic"
    version = ("version",)
    settings: ClassVar = {"RESTIC_PASSWORD": "bench"}

    def _restic(self, *words: str) -> list[str]:
        return ["restic", "--quiet", "--repo", str(self.store), *words]

    def begin(self) -> list[str]:
        return self._restic("init", "--repository-version", "2")

    def save(self, name: str) -> list[str]:
        return self._restic("backup", "--compression", "off", "--tag", name, str(self.model))

    def verify(self) -> list[str]:
        return self._restic("check", "--read-data")

    def restore(self, target: Path) -> list[str]:
        return self._restic("restore", "latest", "--target", str(target))

    def restored(self, target: Path) -> Path:
        return target / self.model.relative_to("/")


class Borg(Tool):
    name = needs = "borg"
    package = "borgbackup"
    settings: ClassVar = {"BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes"}

    def begin(self) -> list[str]:
        return ["borg", "init", "--encryption", "none", str(self.store)]

    def save(self, name: str) -> list[str]:
        return ["borg", "create", "--compression", "none", f"{self.store}::{name}", str(self.model)]

    def verify(self) -> list[str]:
        return ["borg", "check", "--verify-data", str(self.store)]

    def restore(self, target: Path) -> list[str]:  # noqa: ARG002
        return ["borg", "extract", f"{self.store}::changed"]

    def restored(self, target: Path) -> Path:
        return target / self.model.relative_to("/")


class Ours(Tool):
    name, needs = OURS, sys.executable
    kind = "manual"

    def type_in(self, *words: str) -> list[str]:
        home = str(self.model.parent)
        return [sys.executable, str(ROOT / "backup_manager.py"), "--home", home, "--store", str(self.store), *words]

    def save(self, name: str) -> list[str]:
        return self.type_in("backup", str(self.model), "--type", self.kind, "--reason", name)

    def verify(self) -> list[str]:
        return self.type_in("verify")

    def restore(self, target: Path) -> list[str]:
        return self.type_in("restore", "latest", str(target))


class Thorough(Ours):
    name, kind = THOROUGH, "pre_recovery"
    operations = ("first",)
