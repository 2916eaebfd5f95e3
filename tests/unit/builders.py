"""Small real things for unit tests: plans, lineages, checkpoints of a few bytes, jobs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from longrun import checkpoint
from longrun.job import Job, JobState
from longrun.lineage import Lineage
from longrun.plan import Plan, Recipe, make_plan

if TYPE_CHECKING:
    from pathlib import Path

    from longrun.home import Home

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
    "model.safetensors": b"weights",
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "optimizer.pt": b"moments",
    "scheduler.pt": b"rate",
    "rng_state.pth": b"dice",
    "training_args.bin": b"a pickle, never kept",
}


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
    """What the Trainer leaves in the staging folder; weights=b"..." sets the content of model.safetensors."""
    folder = home.staging / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content + str(step).encode() if name == "model.safetensors" else content)
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
