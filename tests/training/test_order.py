"""The order of rows: stable for ever, and complete."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from longrun.plan import Plan
from longrun.training.order import held_out_rows, permutation, training_order
from tests.training.workshop import RECIPE


def plan(rows: int, held_out: int, epochs: int = 1) -> Plan:
    recipe = replace(RECIPE, epochs=epochs)
    return Plan(job=1, name="x", sha256="0" * 64, rows=rows, held_out_rows=held_out, base_step=0, recipe=recipe)


def test_the_permutation_of_a_salt_never_changes():
    # A lineage that began with one version of the libraries must go on with the same order under the next.
    assert permutation(10, 42, "abc", "epoch", 0).tolist() == GOLDEN


GOLDEN = [0, 3, 7, 9, 2, 4, 1, 8, 6, 5]


@given(rows=st.integers(1, 300), held_out=st.integers(0, 20), epochs=st.integers(1, 4))
def test_the_order_holds_each_row_once_an_epoch_and_no_held_out_row(rows, held_out, epochs):
    order = training_order(plan(rows, held_out, epochs))
    kept = held_out_rows(plan(rows, held_out, epochs))
    assert len(order) == rows * epochs
    for epoch in range(epochs):
        together = np.concatenate([order[epoch * rows : (epoch + 1) * rows], kept])
        assert sorted(together.tolist()) == list(range(rows + held_out))


def test_epochs_follow_different_orders():
    order = training_order(plan(50, 0, epochs=2))
    assert order[:50].tolist() != order[50:].tolist()
