"""The plan: every number of a job decided before its first step.

The founding fault was one word for two counts: a file's steps and the model's. Here `base_step` and
`target_step` count steps in the model's life, `planned_steps` and `done_steps` those of the job.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from longrun.errors import BadFile

HELD_OUT_MAX = 100  # rows
HELD_OUT_PER_MILLE = 5


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a job is trained. Fixed at its first step: a later edit of longrun.toml is for the next file."""

    learning_rate: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    warmup_steps: int
    epochs: int
    batch_size: int  # rows an optimizer step, over all devices and accumulation
    max_length: int  # tokens
    seed: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    job: int
    name: str
    sha256: str
    rows: int  # trained in each epoch
    held_out_rows: int  # kept for the evaluation after the job
    base_step: int
    recipe: Recipe
    home: str = ""  # id of the home that `job` is a number of; "" in models older than these ids

    @property
    def planned_steps(self) -> int:
        """ceil(epochs * rows / batch_size): the epochs follow one another, so one step a job may be short."""
        return math.ceil(self.recipe.epochs * self.rows / self.recipe.batch_size)

    @property
    def target_step(self) -> int:
        return self.base_step + self.planned_steps

    @property
    def sentence(self) -> str:
        return f"This file will train for {self.planned_steps} steps (reaching global step {self.target_step})"

    def done_steps(self, global_step: int) -> int:
        return global_step - self.base_step

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Plan:
        return cls(**{**values, "recipe": Recipe(**values["recipe"])})


def held_out(rows: int) -> int:
    """How many of a file's trainable rows are kept out of training: half a percent, at most 100."""
    return min(HELD_OUT_MAX, rows * HELD_OUT_PER_MILLE // 1000)


def make_plan(
    *, job: int, name: str, sha256: str, trainable_rows: int, base_step: int, recipe: Recipe, home: str = ""
) -> Plan:
    """The plan of a job that starts at `base_step`; BadFile when it would train nothing."""
    kept = held_out(trainable_rows)
    plan = Plan(
        job=job,
        name=name,
        sha256=sha256,
        rows=trainable_rows - kept,
        held_out_rows=kept,
        base_step=base_step,
        recipe=recipe,
        home=home,
    )
    if plan.planned_steps < 1:
        raise BadFile(
            "0 trainable rows, so 0 steps: no row has a token to learn from",
            kind="empty",
            hint=f"check that answers are not empty and not cut away by max_length = {recipe.max_length}",
        )
    return plan
