"""Small real things for unit tests: plans, lineages, checkpoints of a few bytes, jobs."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun import checkpoint
from longrun.backups import back_up
from longrun.job import Job, JobState
from longrun.lineage import Lineage
from longrun.manifest import BackupType, Manifest
from longrun.plan import Plan, Recipe, make_plan

if TYPE_CHECKING:
    from collections.abc import Callable

    from longrun.home import Home
    from longrun.store import Store

RECIPE = Recipe(
    learning_rate=2e-5,
    weight_decay=0.0,
    adam_beta1=0.9,
    adam_beta2=0.999,
    adam_epsilon=1e-8,
    max_grad_norm=1.0,
    warmup_steps=0,
    epochs=1,
    batch_size=8,
    max_length=2048,
    seed=42,
)
FILES = {
    "model.safetensors": b"",  # `weights` of the step
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "optimizer.pt": b"moments",
    "scheduler.pt": b"rate",
    "rng_state.pth": b"dice",
    "training_args.bin": b"a pickle, never kept",
}


def safetensors(content: bytes) -> bytes:
    """A safetensors file with one tensor of these bytes: length of the header, header, data."""
    tensor = {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + content


def weights(step: int) -> bytes:
    return safetensors(b"weights%d" % step)


def plan_of(rows: int, *, base_step: int = 0, job: int = 1, home: str = "", **recipe: Any) -> Plan:
    return make_plan(
        job=job,
        name="x.jsonl",
        sha256="a" * 64,
        trainable_rows=rows,
        base_step=base_step,
        recipe=replace(RECIPE, **recipe),
        home=home,
    )


def job(number: int = 1, state: JobState = JobState.CLAIMED, **facts: Any) -> Job:
    return Job(**{"number": number, "name": "x.jsonl", "state": state, "arrived_at": 1.0, **facts})


def lineage_at(step: int, name: str = "one") -> Lineage:
    return Lineage(lineage=name, base_model="tiny", global_step=step)


def stage(home: Home, step: int, **files: bytes) -> Path:
    """What the Trainer leaves in the staging folder; model__safetensors=b"..." sets the content of that file."""
    folder = home.staging / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content or weights(step))
    for name, content in files.items():
        (folder / name.replace("__", ".").replace("_of_", "-of-")).write_bytes(content)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def add_checkpoint(home: Home, step: int, name: str = "one", *, keep: int = 9) -> Path:
    """Commit a checkpoint as a run would, on top of what is there."""
    newest = checkpoint.newest(home, checkpoint.Verifier(), print)
    with checkpoint.OpenModel(home, newest) as model:
        return model.commit(stage(home, step), lineage_at(step, name), keep=keep).path


def content_of(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def plain_model(folder: Path, content: bytes = b"weights") -> Path:
    """A model as others publish it: settings and weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes(b"{}")
    (folder / "model.safetensors").write_bytes(safetensors(content))
    return folder


def keep_backup(store: Store, folder: Path, kind: BackupType = BackupType.MANUAL) -> Manifest:
    return back_up(store, folder, kind).manifest


def state_of(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    """All that a backup of a folder keeps: content, mode and time of change of each file, by name."""
    facts = {name: (folder / name).stat() for name in content_of(folder)}
    return {
        name: (content, facts[name].st_mode & 0o777, facts[name].st_mtime_ns)
        for name, content in content_of(folder).items()
    }


# -- damage


def damage(path: Path, how: str) -> None:
    """Change what is stored in one of these ways, though it is read-only."""
    path.chmod(0o644)
    DAMAGES[how](path)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "flipped": flip_a_bit,
    "removed": Path.unlink,
    "folder": replace_by_folder,
    "link": replace_by_link,
}
