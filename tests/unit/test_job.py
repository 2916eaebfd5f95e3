from __future__ import annotations

import itertools

import pytest

from longrun.job import FINAL, TRANSITIONS, WAITING, JobState, check_move
from tests.unit.builders import job


@pytest.mark.parametrize(("state", "target"), list(itertools.product(JobState, JobState)))
def test_every_move_is_in_the_table_or_a_mistake(state: JobState, target: JobState) -> None:
    if (state, target) in TRANSITIONS:
        assert check_move(job(state=state), target) == TRANSITIONS[state, target]
    else:
        with pytest.raises(AssertionError, match=f"job 1 cannot go from {state} to {target}"):
            check_move(job(state=state), target)


def test_only_what_a_model_lost_comes_out_of_a_final_state_and_every_other_state_can_end() -> None:
    assert {move: verb for move, verb in TRANSITIONS.items() if move[0] in FINAL} == {
        (JobState.TRAINED, JobState.CLAIMED): "take back"
    }
    for state in set(JobState) - FINAL:
        assert {target for origin, target in TRANSITIONS if origin == state} >= FINAL
    assert WAITING | FINAL | {JobState.RUNNING} == set(JobState)
