"""Runs plans in this process, through the Runner that the worker uses, and can break off at any step."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from longrun import checkpoint, wire
from longrun.examine import examine
from longrun.home import Home
from longrun.plan import Plan, Recipe, make_plan
from longrun.rows import RowFormat
from longrun.training.base_model import load_tokenizer
from longrun.training.masks import Encoder
from longrun.training.prepare import prepare
from longrun.training.run import Options, Runner
from tests.lab import digest_of, numbered

RECIPE = Recipe(
    learning_rate=1e-3,
    weight_decay=0.01,
    adam_beta1=0.9,
    adam_beta2=0.999,
    adam_epsilon=1e-8,
    max_grad_norm=1.0,
    warmup_steps=0,
    epochs=1,
    batch_size=12,
    max_length=256,
    seed=42,
)


class Cut(BaseException):
    """The process ends here, as far as the run is concerned."""


@dataclass
class Workshop:
    root: Path
    base_model: str = "tiny"
    recipe: Recipe = RECIPE
    per_device: int = 12
    may_be_fewer: bool = False
    save_steps: int = 4
    optim: str = "adamw_torch_fused"
    report_to: tuple[str, ...] = ()
    said: list[wire.Message] = field(default_factory=list)
    received: dict[int, list[int]] = field(default_factory=dict)  # global step -> row numbers from 1, last time counts
    jobs: int = 0

    def __post_init__(self) -> None:
        self.home = Home(self.root)
        self.root.mkdir(parents=True, exist_ok=True)
        self.home.make()
        self._ends: tuple[socket.socket, ...] = ()
        self.restart()

    def close(self) -> None:
        for end in self._ends:
            end.close()

    def restart(self) -> None:
        """A new worker: nothing is in memory."""
        self.close()
        ours, theirs = self._ends = socket.socketpair()
        self.channel = wire.Channel(theirs)
        options = Options(
            per_device=self.per_device,
            batch_size=self.recipe.batch_size,
            dtype="auto",
            attn_implementation="auto",
            trust_remote_code=False,
            gradient_checkpointing=False,
            optim=self.optim,
            report_to=self.report_to,
            may_be_fewer=self.may_be_fewer,
        )
        self.runner = Runner(self.home, options, wire.Channel(ours))

    @property
    def newest(self) -> checkpoint.Checkpoint | None:
        return checkpoint.newest(self.home, checkpoint.Verifier(), print)

    def prepare(
        self, name: str, rows: list[dict[str, Any]] | int, *, on_bad_row: str = "reject"
    ) -> tuple[int, dict[str, Any]]:
        content = numbered(name, rows) if isinstance(rows, int) else rows
        self.jobs += 1
        folder = self.home.claimed(self.jobs)
        folder.mkdir(parents=True)
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        task = wire.Prepare(
            job=self.jobs,
            path=str(path),
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            format=_format(content[0]).value,
            on_bad_row=on_bad_row,
            max_line_bytes=1 << 20,
            max_length=self.recipe.max_length,
            folder=str(self.home.prepared(self.jobs)),
            rows=examine(path, on_bad_row=on_bad_row).rows,
            base_model=self.base_model,
            tokenizer=self.base_model,
            trust_remote_code=False,
        )
        tokenizer = load_tokenizer(self.base_model, trust_remote_code=False)
        return self.jobs, prepare(task, Encoder(tokenizer, max_length=self.recipe.max_length), lambda _: None)

    def plan(self, job: int, facts: dict[str, Any]) -> Plan:
        newest = self.newest
        here = newest.lineage.progress_of("", job, facts["sha256"]) if newest else None
        if here is not None:
            return here.plan
        return make_plan(
            job=job,
            name=f"job {job}",
            sha256=facts["sha256"],
            trainable_rows=facts["trainable_rows"],
            base_step=newest.global_step if newest else 0,
            recipe=self.recipe,
        )

    def train(self, job: int, facts: dict[str, Any], *, cut_before: int | None = None) -> wire.Ended | None:
        """Run the job; None when it was cut off before the global step `cut_before`."""
        newest = self.newest
        task = wire.Train(
            plan=self.plan(job, facts).to_dict(),
            prepared=str(self.home.prepared(job)),
            checkpoint=str(newest.path) if newest else None,
            lineage="a" * 32,
            base_model=self.base_model,
            save_steps=self.save_steps,
            save_total_limit=2,
            logging_steps=5,
            row_log=False,
        )
        with self._watched(cut_before), contextlib.suppress(Cut):
            ended = self.runner.run(task)
            self.said += self.channel.receive(0)
            return ended
        self.restart()
        return None

    def train_file(self, name: str, rows: list[dict[str, Any]] | int) -> wire.Ended | None:
        return self.train(*self.prepare(name, rows))

    @contextlib.contextmanager
    def _watched(self, cut_before: int | None) -> Any:
        """Record the rows of every step as they reach the training step, and break off where asked."""
        from longrun.training import trainer

        original = trainer.PlannedTrainer.training_step
        seen: set[int] = set()

        def watched(planned: Any, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
            step = planned.state.global_step
            if step == cut_before:
                raise Cut
            if step not in seen:
                self.received[step] = []
            seen.add(step)
            self.received[step] += [row + 1 for row in inputs["rows"]]
            return original(planned, model, inputs, *rest)

        trainer.PlannedTrainer.training_step = watched  # type: ignore[method-assign]
        try:
            yield
        finally:
            trainer.PlannedTrainer.training_step = original  # type: ignore[method-assign]

    def times_trained(self, base_step: int, target_step: int, rows: int) -> collections.Counter[int]:
        """How often each row of the job over these steps was trained, as {times: rows}."""
        times = collections.Counter(row for step in range(base_step, target_step) for row in self.received[step])
        return collections.Counter(times[row] for row in range(1, rows + 1))

    def state(self) -> dict[str, str]:
        """Every bit of the newest checkpoint's weights and optimizer, by tensor, as digests: they can be shown."""
        import torch
        from safetensors.torch import load_file

        newest = self.newest
        assert newest is not None
        tensors: dict[str, Any] = dict(load_file(newest.path / "model.safetensors"))
        saved = torch.load(newest.path / "optimizer.pt", weights_only=True)["state"]
        tensors |= {f"{index}.{name}": value for index, entry in saved.items() for name, value in entry.items()}
        return {name: digest_of(tensor) for name, tensor in tensors.items()}

    def with_recipe(self, **changes: Any) -> None:
        self.recipe = replace(self.recipe, **changes)


def _format(row: dict[str, Any]) -> RowFormat:
    return RowFormat.MESSAGES if "messages" in row else RowFormat.TEXT
