"""Losses checked at every step, and the curves: logs/metrics.jsonl and one TensorBoard run a lineage."""

from __future__ import annotations

import contextlib
import json
import math
import traceback
from typing import TYPE_CHECKING, Any

import torch

from longrun import disk

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from longrun.home import Home
    from longrun.training.world import World

CHECK_EVERY = 16  # steps on a GPU: reading a loss makes the processor wait for it


class Diverged(Exception):
    """A loss or a weight is no longer a number."""

    def __init__(self, what: str, global_step: int, rows: list[int]) -> None:
        super().__init__(f"{what} at global step {global_step}")
        self.global_step = global_step
        self.rows = rows


class Losses:
    """The loss of each step of a job, summed in the order of steps so that a resumed sum is bit-identical."""

    def __init__(self, world: World, loss_sum: float, last: float | None, *, check_every: int) -> None:
        self._world = world
        self.sum = loss_sum
        self.last = last
        self._check_every = check_every
        self._parts: list[torch.Tensor] = []  # of the step that is under way
        self._rows: list[int] = []
        self._unread: list[tuple[int, list[int], torch.Tensor]] = []

    def add(self, part: torch.Tensor, rows: list[int]) -> None:
        """One micro-batch's share of the step's loss."""
        self._parts.append(part)
        self._rows += rows

    def end_step(self, global_step: int) -> list[int]:
        """Close the step; the rows that it trained. Diverged as soon as a loss that is not finite is read."""
        rows, self._rows = self._rows, []
        self._unread.append((global_step, rows, torch.stack(self._parts).sum()))
        self._parts = []
        if len(self._unread) >= self._check_every:
            self.read()
        return rows

    def read(self) -> None:
        """Bring what is still on the device over and check it."""
        unread, self._unread = self._unread, []
        values = self._world.mean(torch.stack([loss for _, _, loss in unread])).tolist() if unread else []
        for (global_step, rows, _), value in zip(unread, values, strict=True):
            if not math.isfinite(value):
                raise Diverged(f"the loss became {value}", global_step, rows)
            self.sum += value
            self.last = value


def _free(folder: Path) -> Path:
    """The folder's name, or with a number where that is taken: a lineage may have been left more than once."""
    number, name = 1, folder.name
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{name}.{number}")
    return folder


class Metrics:
    """Where the curves go. Rows and steps of a run that was rolled back appear again; the last ones count."""

    def __init__(self, home: Home, *, writes: bool, tensorboard: bool) -> None:
        self._home = home
        self._writes = writes  # one process of several does
        self._tensorboard = tensorboard and writes
        self._writer: Any = None
        self._lineage = ""

    def begin(self, lineage: str, global_step: int) -> None:
        """Go on with the lineage's run at `global_step`: what an earlier process drew beyond it is hidden."""
        if not self._tensorboard or self._lineage == lineage:
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        folder = self._home.logs / "tensorboard"
        self._put_aside_another(folder, lineage)
        self._writer = SummaryWriter(str(folder), purge_step=global_step + 1, flush_secs=10)
        self._lineage = lineage

    def _put_aside_another(self, folder: Path, lineage: str) -> None:
        """A new model is a new run: the former one's curves move to a folder of their own."""
        mark = folder / "lineage"
        former = mark.read_text(encoding="utf-8") if mark.exists() else ""
        if former and former != lineage:
            folder.rename(_free(folder.with_name(f"tensorboard-{former[:8]}")))
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(lineage, encoding="utf-8")

    def write(self, global_step: int, **values: float) -> None:
        if not self._writes:
            return
        self._append("metrics.jsonl", {"global_step": global_step, **values})
        with self._curves_that_may_go():
            for name, value in values.items() if self._writer is not None else ():
                self._writer.add_scalar(f"{'eval' if name == 'eval_loss' else 'train'}/{name}", value, global_step)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        self._home.logs.mkdir(exist_ok=True)  # a person may have removed it to make room
        disk.append_line(self._home.logs / name, json.dumps(line))

    @contextlib.contextmanager
    def _curves_that_may_go(self) -> Iterator[None]:
        """Curves are no reason to end a run: of those that somebody removed, the next file draws new ones."""
        try:
            yield
        except OSError:
            traceback.print_exc()
            self._writer, self._lineage = None, ""

    def write_rows(self, global_step: int, *, lineage: str, job: int, rows: list[int]) -> None:
        """The rows of a step, numbered from 1, as they reached the model."""
        if not self._writes:
            return
        line = {"lineage": lineage, "global_step": global_step, "job": job, "rows": [row + 1 for row in rows]}
        self._append("rows.jsonl", line)

    def flush(self) -> None:
        with self._curves_that_may_go():
            if self._writer is not None:
                self._writer.flush()
