"""The drills' own bookkeeping: a line that is told must be true, also of a campaign that was cut off."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.drills import campaign
from tests.drills.campaign import Campaign

Run = Callable[..., tuple[list[Any], str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a full campaign of four cases; those that were attempted, and what was told."""
    monkeypatch.setattr(campaign, "FULL", True)
    monkeypatch.setattr(campaign, "RECORDS", tmp_path / "records")
    for name in ("LONGRUN_SEED", "LONGRUN_DRILLS_MINUTES"):
        monkeypatch.delenv(name, raising=False)

    def run(*, fails: str = "", cut_at: str = "", cases: str = "abcd") -> tuple[list[Any], str]:
        attempted = []
        found = Campaign("tests/test_drill.py::test_it")

        def attempt(case: str, dice: random.Random) -> None:
            if case == cut_at:
                raise KeyboardInterrupt
            attempted.append((case, dice.random()))
            found.note("things")
            assert case not in fails

        try:
            found.run("promise", cases, attempt, small=2)
        except (AssertionError, KeyboardInterrupt) as error:
            attempted.append(type(error))
        return attempted, found.lines[0]

    return run


def names(attempted: list[Any]) -> str:
    return "".join(one[0] if isinstance(one, tuple) else "!" for one in attempted)


def test_few_cases_are_drawn_and_not_recorded(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "FULL", False)
    attempted, line = run()
    assert len(attempted) == 2
    assert line.startswith("promise: 2 cases, 0 failures, seed ")
    assert not (tmp_path / "records").exists()


def test_a_campaign_that_was_cut_off_goes_on_with_its_seed(run: Run) -> None:
    first, cut = run(cut_at="c")
    second, line = run()
    assert (names(first), names(second)) == ("ab!", "cd")
    assert cut.startswith("promise: 2 of 4 cases so far, 0 failures, seed ")
    assert line == cut.replace("2 of 4 cases so far", "4 cases").replace(", 2 things", ", 2 of them before, 4 things")


def test_a_case_has_the_same_dice_before_and_after_the_cut(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    attempted = run(cut_at="c")[0][:2]
    cut = run(cut_at="d")[1]
    attempted += run()[0]
    monkeypatch.setenv("LONGRUN_SEED", cut.partition("seed ")[2].partition(",")[0])
    again, _ = run()
    assert (attempted[:2], attempted[-1]) == (again[:2], again[-1])


def test_a_failed_case_is_attempted_again_first_and_stays_told(run: Run) -> None:
    assert names(run(fails="b", cut_at="d")[0]) == "abc!"
    attempted, line = run(fails="b")
    assert names(attempted) == "bd!"
    assert "4 cases, 1 failures, " in line
    attempted, line = run()
    assert names(attempted) == "b"
    assert "4 cases, 1 failures, " in line
    assert "3 of them before, 1 passed when attempted again, 6 things" in line


def test_a_failure_that_was_not_attempted_again_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run(fails="b")
    monkeypatch.setenv("LONGRUN_DRILLS_MINUTES", "0")
    attempted, line = run()
    assert names(attempted) == "!"
    assert "4 cases, 1 failures, " in line


def test_what_is_done_is_not_done_again(run: Run) -> None:
    run()
    attempted, line = run()
    assert attempted == []
    assert "4 cases, 0 failures, " in line
    assert ", 4 of them before, 4 things" in line


def test_a_share_of_time_ends_a_campaign_early(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGRUN_DRILLS_MINUTES", "0")
    attempted, line = run()
    assert attempted == []
    assert line.startswith("promise: 0 of 4 cases so far, 0 failures, seed ")


def test_a_line_that_was_cut_off_is_no_attempt(run: Run, tmp_path: Path) -> None:
    run(cut_at="c")
    (path,) = (tmp_path / "records").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    assert names(run(cut_at="d")[0]) == "bc!"
    assert names(run()[0]) == "d"


def test_a_case_that_has_become_another_is_attempted(run: Run) -> None:
    run()
    assert names(run(cases="axcd")[0]) == "x"


def test_a_given_seed_is_for_looking_again_and_not_recorded(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(cut_at="c")
    monkeypatch.setenv("LONGRUN_SEED", "7.3")
    attempted, line = run()
    assert names(attempted) == "d"
    assert line == "promise: 1 cases, 0 failures, seed 7, 1 things"
    monkeypatch.delenv("LONGRUN_SEED")
    assert names(run()[0]) == "cd"
