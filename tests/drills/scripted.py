"""The daemon's two children without torch: they speak the wire, commit real checkpoints, and train nothing.

    python -m tests.drills.scripted --worker SOCKET --home HOME --options JSON
    python -m tests.drills.scripted --preparer SOCKET --home HOME

What they call weights is the list of all rows that they were given, in order. It is committed as real weights are,
so what a model has seen can be read from it, and held against what its lineage says.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from longrun import checkpoint, disk, examine, locks, process, wire  # noqa: E402
from longrun.errors import BadFile, ModelRemoved  # noqa: E402
from longrun.home import FACTS, ROWS, Home  # noqa: E402
from longrun.lineage import InProgress, Lineage  # noqa: E402
from longrun.plan import Plan  # noqa: E402

NOW = "2026-01-01T00:00:00.000+00:00"
WEIGHTS = "model.safetensors"
BEYOND = "beyond"  # how files begin that have tokens which the model has not
UNEVEN = "uneven"  # and those in whose steps it has a loss for each micro-batch only


def step_s() -> float:
    return float(os.environ.get("LONGRUN_STEP_S", "0.002"))


def outlives() -> bool:
    """Whether the worker notices nothing of its daemon's death until its run is over."""
    return "LONGRUN_OUTLIVES" in os.environ


def order(plan: Plan) -> list[int]:
    """Rows in the order of training: the last ones are held out, so an epoch is range(plan.rows)."""
    return list(range(plan.rows)) * plan.recipe.epochs


def weights_in(folder: Path) -> list[list[Any]]:
    """What these weights have seen: for each step of the model's life, the file's name and its rows."""
    found: list[list[Any]] = json.loads((folder / WEIGHTS).read_bytes())
    return found


@dataclass
class Worker:
    home: Home
    channel: wire.Channel
    optim: str

    def train(self, task: wire.Train) -> wire.Message:
        plan = Plan.from_dict(task.plan)
        if plan.name.startswith(BEYOND):
            raise BadFile("its rows have the token '<extra>' (9), and the model has tokens up to 8", kind="token")
        newest = checkpoint.Verifier().verify(Path(task.checkpoint)) if task.checkpoint else None
        lineage = newest.lineage if newest else self._new_lineage(task)
        seen = weights_in(newest.path) if newest else []
        assert len(seen) == lineage.global_step
        assert int((Path(task.prepared) / ROWS).read_text()) == plan.rows + plan.held_out_rows
        with checkpoint.OpenModel(self.home, newest) as model:
            before, progress = lineage.begun(plan, NOW)
            step = progress.global_step
            facts = {"device": "none", "seconds": 0.0, "warm": False, "rows_at_once": 1}
            adds_up = not plan.name.startswith(UNEVEN)
            self.channel.send(wire.Started(job=plan.job, global_step=step, adds_up=adds_up, **facts))
            stopped = ""
            while progress.done_steps < plan.planned_steps and not stopped:
                progress = self._step(plan, progress, seen)
                stopped = self._asked_to_stop()
                at_end = progress.done_steps == plan.planned_steps
                if at_end or stopped or progress.global_step % task.save_steps == 0:
                    self._save(model, task, seen, _lineage_at(before, progress))
            stopped = "" if progress.done_steps == plan.planned_steps else stopped
            return wire.Ended(job=plan.job, global_step=progress.global_step, stopped=stopped)

    def _new_lineage(self, task: wire.Train) -> Lineage:
        return Lineage(lineage=task.lineage, base_model=task.base_model, optim=self.optim)

    def _step(self, plan: Plan, progress: InProgress, seen: list[list[Any]]) -> InProgress:
        size = plan.recipe.batch_size
        seen.append([plan.name, order(plan)[progress.done_steps * size :][:size]])
        time.sleep(step_s())
        progress = replace(progress, done_steps=progress.done_steps + 1, loss_sum=progress.loss_sum + 1, last_loss=1.0)
        step = progress.global_step
        _note("step", step)
        self._say(wire.Progress(job=plan.job, global_step=step, loss=1.0, learning_rate=1e-5, steps_per_s=1 / step_s()))
        return progress

    def _asked_to_stop(self) -> str:
        try:
            return next((m.why for m in self.channel.receive(0) if isinstance(m, wire.Stop)), "")
        except wire.Closed:
            if not outlives():
                raise
            return ""

    def _say(self, message: wire.Message) -> None:
        with contextlib.suppress(*[wire.Closed] if outlives() else []):
            self.channel.send(message)

    def _save(self, model: checkpoint.OpenModel, task: wire.Train, seen: list[list[Any]], lineage: Lineage) -> None:
        step = lineage.global_step
        for remains in self.home.staging.glob("checkpoint-*"):
            disk.remove_tree(remains, self.home.staging)
        staged = self.home.staging / f"checkpoint-{step}"
        staged.mkdir()
        (staged / WEIGHTS).write_text(json.dumps(seen))
        (staged / "optimizer.pt").write_text(f"moments at {step}")
        (staged / "config.json").write_text("{}")
        (staged / checkpoint.TRAINER_STATE).write_text(json.dumps({"global_step": step}))
        model.commit(staged, lineage, keep=task.save_total_limit)
        _note("saved", step)
        self._say(wire.Saved(job=task.plan["job"], global_step=step, seconds=0.0, size_bytes=0))


def _note(what: str, step: int) -> None:
    """For whoever asks which steps were really done."""
    if "LONGRUN_PROBE" in os.environ:
        with (Path(os.environ["LONGRUN_PROBE"]) / "steps.txt").open("a") as file:
            file.write(f"{what} {step}\n")


def _lineage_at(before: Lineage, progress: InProgress) -> Lineage:
    if progress.done_steps < progress.plan.planned_steps:
        return before.at(progress)
    return before.ended(progress, outcome="trained", finished_at=NOW, eval_loss=None)


def work(home: Home, socket: Path, optim: str = "") -> None:
    with locks.Lock.take(home.model_lock, what="scripted worker", wait_s=10.0):
        channel = wire.connect(socket)
        channel.send(wire.Hello(pid=os.getpid(), role="worker", device="none"))
        trainer = Worker(home, channel, optim)
        while True:
            for message in channel.receive(None):
                if isinstance(message, wire.Train):
                    channel.send(_in_words(trainer, message))


def _in_words(trainer: Worker, task: wire.Train) -> wire.Message:
    job = task.plan["job"]
    try:
        return trainer.train(task)
    except ModelRemoved as error:
        return wire.Failed(job=job, kind="model removed", why=str(error))
    except BadFile as error:
        return wire.Failed(job=job, kind=error.kind, why=error.why)
    except checkpoint.Damaged as error:
        return wire.Failed(job=job, kind="crash", why=str(error))
    except OSError as error:
        return wire.Failed(job=job, kind="disk", why=str(error))


def prepare(socket: Path) -> None:
    channel = wire.connect(socket)
    channel.send(wire.Hello(pid=os.getpid(), role="preparer"))
    while True:
        for message in channel.receive(None):
            if isinstance(message, wire.Examine | wire.Prepare):
                try:
                    channel.send(_examined(message) if isinstance(message, wire.Examine) else _prepared(message))
                except BadFile as error:
                    channel.send(wire.Refused(job=message.job, reason=error.reason()))
                except OSError as error:
                    kind = "disk" if error.errno in disk.NO_FILES_FAULT else "crash"
                    channel.send(wire.Failed(job=message.job, kind=kind, why=str(error)))


def _examined(task: wire.Examine) -> wire.Examined:
    found = examine.examine(Path(task.path), on_bad_row=task.on_bad_row, max_line_bytes=task.max_line_bytes)
    facts = {**vars(found), "format": found.format.value, "on_bad_row": task.on_bad_row}
    return wire.Examined(job=task.job, facts=facts)


def _prepared(task: wire.Prepare) -> wire.Prepared:
    rows = examine.examine(Path(task.path), on_bad_row=task.on_bad_row, max_line_bytes=task.max_line_bytes).rows
    needed = ("sha256", "max_length", "base_model", "base_files", "on_bad_row")
    counts = ("tokens", "trained_tokens", "truncated_rows", "untrainable_rows", "refused_rows")
    facts = {name: getattr(task, name) for name in needed} | dict.fromkeys(counts, 0)
    facts |= {"trainable_rows": rows, "mask_source": "scripted"}
    folder = Path(task.folder)
    aside = disk.aside(folder)
    aside.mkdir()
    (aside / ROWS).write_text(str(rows))
    (aside / FACTS).write_text(json.dumps(facts))
    disk.sync_tree(aside)
    disk.remove_tree(folder, aside)  # of other settings
    disk.rename(aside, folder)
    return wire.Prepared(job=task.job, facts=facts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", type=Path)
    parser.add_argument("--preparer", type=Path)
    parser.add_argument("--home", type=Path)
    parser.add_argument("--check-base", help="any will do")
    parser.add_argument("--options")
    args = parser.parse_args(arguments)
    if args.check_base:
        return
    if sys.platform == "linux":  # a fork has the command line of its parent
        Path("/proc/self/comm").write_text("worker" if args.worker else "preparer")
    if not outlives():
        process.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if args.worker:
            work(Home(args.home), args.worker, json.loads(args.options)["optim"])
        else:
            prepare(args.preparer)
    except wire.Closed:
        sys.exit(0)


if __name__ == "__main__":
    main()
