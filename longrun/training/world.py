"""The processes of one worker. One is the rule; more are started by torch's launcher, and the first leads.

Only the first talks to the daemon, writes checkpoints and decides; the others hear its decisions. They do so over
a group of their own on the CPU, so that waiting for work neither keeps a GPU busy nor runs into a time limit.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")

FOR_EVER = timedelta(days=3650)


class World:
    """Must be made after TrainingArguments, which start the process group."""

    def __init__(self) -> None:
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self._group = dist.new_group(backend="gloo", timeout=FOR_EVER) if self.size > 1 else None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, value: Value) -> Value:
        """The leader's value, in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def gather(self, values: list[int]) -> list[int]:
        """The values of all processes, one after another."""
        if self.size == 1:
            return values
        boxes: list[list[int]] = [[] for _ in range(self.size)]
        dist.all_gather_object(boxes, values, group=self._group)
        return [value for box in boxes for value in box]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over all processes, on the CPU; with one process the values as they are."""
        values = values.cpu()
        if self.size > 1:
            dist.all_reduce(values, group=self._group)
            values = values / self.size
        return values


def asked_size() -> int:
    """How many processes the launcher started, known before any of them has begun to talk."""
    return int(os.environ.get("WORLD_SIZE", "1"))
