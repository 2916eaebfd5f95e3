from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrun.errors import BadFile
from longrun.plan import Plan, held_out
from tests.unit.builders import plan_of


@pytest.mark.parametrize(
    ("rows", "batch_size", "epochs", "kept", "steps"),
    [
        (1, 8, 1, 0, 1),  # 1 / 8, rounded up
        (8, 8, 1, 0, 1),
        (9, 8, 1, 0, 2),
        (199, 8, 1, 0, 25),  # 0.5 % of 199 is 0.995: none; 199 / 8 = 24.875
        (200, 8, 1, 1, 25),  # 0.5 % of 200 is 1; 199 / 8 = 24.875
        (10_000, 8, 1, 50, 1_244),  # 9,950 / 8 = 1,243.75
        (20_000, 8, 1, 100, 2_488),  # 19,900 / 8 = 2,487.5
        (20_000, 8, 3, 100, 7_463),  # 59,700 / 8 = 7,462.5: the epochs follow one another
        (20_000, 1, 1, 100, 19_900),
        (1_000_000, 8, 1, 100, 124_988),  # at most 100; 999,900 / 8 = 124,987.5
        (3, 100, 5, 0, 1),  # 15 / 100
    ],
)
def test_steps_of_a_file(rows: int, batch_size: int, epochs: int, kept: int, steps: int) -> None:
    plan = plan_of(rows, batch_size=batch_size, epochs=epochs)
    assert (plan.held_out_rows, plan.rows, plan.planned_steps) == (kept, rows - kept, steps)


def test_the_second_founding_file_trains_past_the_first() -> None:
    first = plan_of(20_000)
    second = plan_of(20_000, base_step=first.target_step)
    assert (first.target_step, second.base_step, second.target_step) == (2_488, 2_488, 4_976)
    assert second.sentence == "This file will train for 2488 steps (reaching global step 4976)"
    assert second.done_steps(3_000) == 512


def test_no_trainable_row_is_a_refusal_and_never_a_plan_of_0_steps() -> None:
    with pytest.raises(BadFile, match="0 trainable rows, so 0 steps") as refused:
        plan_of(0, max_length=77)
    assert refused.value.kind == "empty"
    assert "max_length = 77" in refused.value.hint


@given(rows=st.integers(1, 10**9), epochs=st.integers(1, 1000), batch_size=st.integers(1, 10**6))
def test_the_last_step_is_needed_and_no_row_is_left(rows: int, epochs: int, batch_size: int) -> None:
    plan = plan_of(rows, epochs=epochs, batch_size=batch_size, base_step=5)
    to_train = epochs * plan.rows
    assert (plan.planned_steps - 1) * batch_size < to_train <= plan.planned_steps * batch_size
    assert plan.target_step - plan.base_step == plan.planned_steps >= 1
    assert plan.rows + held_out(rows) == rows
    assert 0 <= held_out(rows) <= min(100, rows // 200)


def test_a_plan_survives_json() -> None:
    plan = plan_of(20_000, base_step=7)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
