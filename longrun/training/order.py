"""Which row is trained when: seeded permutations that no library version changes.

numpy promises the streams of its bit generators for ever (NEP 19), those of its shuffles not. So a permutation
is the order that sorts one 64-bit Philox draw a row; equal draws keep their order.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from longrun.plan import Plan


def permutation(count: int, *salt: str | int) -> NDArray[np.int64]:
    """A permutation of range(count) that is a function of the salt, shape (count,)."""
    digest = hashlib.sha256(":".join(map(str, salt)).encode()).digest()
    key = np.frombuffer(digest[:16], dtype="<u8")
    draws = np.random.Philox(key=key).random_raw(count)
    return np.argsort(draws, kind="stable").astype(np.int64)


def held_out_rows(plan: Plan) -> NDArray[np.int64]:
    """Indices of the prepared rows that the job never trains, shape (plan.held_out_rows,)."""
    return _split(plan)[: plan.held_out_rows]


def training_order(plan: Plan) -> NDArray[np.int64]:
    """Indices of prepared rows in the order of training, shape (epochs * plan.rows,).

    Optimizer step s of the job trains exactly order[s * batch_size : (s + 1) * batch_size].
    """
    rows = np.sort(_split(plan)[plan.held_out_rows :])
    epochs = range(plan.recipe.epochs)
    return np.concatenate(
        [rows[permutation(len(rows), plan.recipe.seed, plan.sha256, "epoch", epoch)] for epoch in epochs]
    )


def _split(plan: Plan) -> NDArray[np.int64]:
    return permutation(plan.rows + plan.held_out_rows, plan.recipe.seed, plan.sha256, "held out")
