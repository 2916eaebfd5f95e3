"""What a benchmark may say of a goal that a few repetitions were held against."""

from __future__ import annotations

import pytest

from bench import results


@pytest.mark.parametrize(("values", "ends"), [(5, (1, 5)), (6, (1, 6)), (10, (2, 9)), (25, (8, 18)), (50, (18, 33))])
def test_a_median_lies_where_a_table_of_the_sign_test_has_it(values: int, ends: tuple[int, int]) -> None:
    assert results.interval_of_median([float(value) for value in range(values, 0, -1)]) == ends


def test_a_goal_is_reached_or_missed_only_where_the_whole_interval_is_on_one_side() -> None:
    ratios = [1.00, 1.01, 1.02, 1.03, 1.04, 1.05]
    assert results.verdict_of(ratios, 1.05) == "reached"
    assert results.verdict_of(ratios, 1.02) == "undecided"
    assert results.verdict_of(ratios, 0.99) == "**missed**"
