"""A home with backups and a model, made once and copied for each case; and what must be true of it ever after.

home/backups/          first, second: backups of two states of the model
home/current_model/    a third state
home/brought, brought.tar.zst, brought.tar  an exported backup that the store does not have
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path

from longrun.backups import back_up
from longrun.manifest import BackupType
from longrun.store import Store
from longrun.transfer import export_archive, export_folder

Tree = dict[str, str]
SPARSE_BYTES = 1 << 29


def make_model(folder: Path, dice: random.Random, *, step: int, weights_bytes: int, shared: bytes = b"") -> Path:
    """A model with a checkpoint, as any trainer leaves one; backups of models made with one `shared` share it."""
    whole = {
        "config.json": b'{"model_type": "tiny"}',
        "model.safetensors": _safetensors(dice.randbytes(weights_bytes)),
        "trainer_state.json": json.dumps({"global_step": step}).encode(),
        "tokenizer.json": shared or b"{}",
        "empty": b"",
        "odd/n\n\\ame é.txt": dice.randbytes(100),
    }
    checkpoint = {f"checkpoint-{step}/{name}": whole[name] for name in ("model.safetensors", "trainer_state.json")}
    checkpoint[f"checkpoint-{step}/optimizer.pt"] = dice.randbytes(weights_bytes * 3 // 2)
    for name, content in (whole | checkpoint).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _safetensors(data: bytes) -> bytes:
    header = json.dumps({"weights": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def tree(folder: Path, *, without: Path | None = None) -> Tree:
    """Every file and folder below, by its content; nothing when there is no such folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if without is None or not path.is_relative_to(without):
            found[str(path.relative_to(folder))] = _content(path)
    return found


def _content(path: Path) -> str:
    if path.is_symlink() or not path.is_file():
        return f"-> {path.readlink()}" if path.is_symlink() else "no regular file"
    size = path.stat().st_size
    return hashlib.sha256(path.read_bytes()).hexdigest() if size < SPARSE_BYTES else f"{size} bytes of nothing"


@dataclass(frozen=True)
class World:
    home: Path
    states: dict[str, Tree]  # of models: first, second, current, away
    ids: dict[str, str]  # of their backups: first, second, away

    @classmethod
    def make(cls, folder: Path, *, weights_bytes: int) -> World:
        dice = random.Random(1)
        home, elsewhere = folder / "home", Store(folder / "elsewhere")
        store, shared = Store(home / "backups"), dice.randbytes(weights_bytes // 2)
        home.mkdir(parents=True)
        states, ids = {}, {}
        for step, name in enumerate(("first", "second", "current", "away")):
            model = make_model(folder / name, dice, step=step, weights_bytes=weights_bytes, shared=shared)
            states[name] = tree(model)
            if name != "current":
                at = elsewhere if name == "away" else store
                ids[name] = back_up(at, model, BackupType.MANUAL).manifest.id
        (folder / "current").rename(home / "current_model")
        (folder / "away").rename(folder / "source of away")
        away = elsewhere.read(ids["away"])
        export_folder(elsewhere, away, home / "brought")
        for suffix in (".tar", ".tar.zst"):
            export_archive(elsewhere, away, home / f"brought{suffix}")
        return cls(home, states, ids)

    def copy(self, folder: Path) -> World:
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(self.home, folder, symlinks=True)
        return World(folder, self.states, self.ids)

    @property
    def store(self) -> Store:
        return Store(self.home / "backups")

    @property
    def model(self) -> Path:
        return self.home / "current_model"

    def source(self, name: str) -> Path:
        """The folder that a backup was made of (in the world that was made, not in its copies)."""
        return self.home.parent / name

    def state(self, folder: Path) -> str | None:
        """Which of the known models this folder is, wholly."""
        found = tree(folder)
        return next((name for name, known in self.states.items() if known == found), None)

    def check(self, *, gone: tuple[str, ...] = ()) -> None:
        """Every listed backup verifies, none but the `gone` is missing, and every model is wholly a known one."""
        assert self.store.damage() == []
        assert {self.ids[name] for name in ("first", "second") if name not in gone} <= set(self.store.ids())
        models = {folder: self.state(folder) for folder in [self.model, *self.home.glob("current_model.*")]}
        assert None not in models.values(), models
        assert "current" in models.values(), models

    def check_swept(self) -> None:
        """Nothing unfinished is left anywhere."""
        assert not list(self.store.tmp.iterdir())
        assert not [path for path in self.home.rglob("*") if ".tmp" in path.name and path.name.startswith(".")]


@dataclass(frozen=True)
class Operation:
    """A command; `done` tells from the world whether it has had its effect, all of it."""

    arguments: tuple[str, ...]
    gone: tuple[str, ...] = ()  # backups that it removes
    settings: dict[str, int] = field(default_factory=dict)

    def words(self, world: World) -> list[str]:
        return [world.ids.get(word, word) for word in self.arguments]

    def done(self, world: World) -> bool:
        known = set(world.store.ids())
        match self.arguments:
            case ("backup", *_):
                return len(known - set(world.ids.values())) > 0
            case ("prune", *_):
                return world.ids["first"] not in known
            case ("restore", name, *_):
                return world.state(world.model) == name
            case ("import", *_):
                return world.ids["away"] in known
            case ("export", name, target):
                return is_exported(world, name, world.home / target)
        raise AssertionError(self.arguments)


def is_exported(world: World, name: str, target: Path) -> bool:
    """Whether the backup is there, whole: it can be taken into a new store. What is there in part is a failure."""
    if not target.exists():
        return False
    from longrun.transfer import import_archive, import_folder

    fresh = Store(target.with_name("judge"))
    try:
        (import_folder if target.is_dir() else import_archive)(fresh, target)
        assert fresh.damage() == [] and fresh.ids() == [world.ids[name]]
    finally:
        shutil.rmtree(fresh.root, ignore_errors=True)
    return True


OPERATIONS = {
    "backup": Operation(("backup", "current_model")),
    "backup pre_recovery": Operation(("backup", "current_model", "--type", "pre_recovery")),
    "prune": Operation(("prune", "first", "--execute"), gone=("first",)),
    "restore": Operation(("restore", "first")),
    "import folder": Operation(("import", "brought")),
    "import archive": Operation(("import", "brought.tar.zst")),
    "export folder": Operation(("export", "first", "out")),
    "export archive": Operation(("export", "first", "out.tar.zst")),
}
