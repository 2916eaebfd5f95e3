"""How the benchmark of lost rows counts what is in a model in the end."""

from __future__ import annotations

import json
from pathlib import Path

from bench.rows_lost import Outcome, count, line


def counted(path: Path, *forwards: tuple[int, str, int, list[str]]) -> Outcome:
    lines = [
        json.dumps(
            {"pid": pid, "run": run, "global_step": step, "learning_rate": step / 10, "adam_steps": step, "rows": rows}
        )
        for pid, run, step, rows in forwards
    ]
    path.write_text("\n".join(lines))
    outcome = Outcome(0.0)
    count(path, {"a": 2, "b": 2}, outcome)
    return outcome


def test_a_step_done_again_from_an_older_checkpoint_counts_once(tmp_path: Path) -> None:
    killed = [(1, "all", 0, ["a-0"]), (1, "all", 1, ["a-1"]), (1, "all", 2, ["b-0"])]
    outcome = counted(tmp_path / "probe", *killed, (2, "all", 1, ["a-1"]), (2, "all", 2, ["b-1"]))
    assert outcome.times == {"a-0": 1, "a-1": 1, "b-1": 1}
    assert outcome.steps == 3
    assert outcome.rates == {"a": 0.0, "b": 0.2}
    assert outcome.adam_steps == {"a": 0, "b": 2}


def test_a_run_of_its_own_undoes_nothing_of_the_runs_before(tmp_path: Path) -> None:
    outcome = counted(tmp_path / "probe", (1, "a", 0, ["a-0", "a-1"]), (2, "b", 0, ["b-0"]), (2, "b", 1, ["b-0"]))
    assert outcome.times == {"a-0": 1, "a-1": 1, "b-0": 2}
    assert outcome.steps == 3


def test_a_row_that_was_never_trained_has_no_rate(tmp_path: Path) -> None:
    assert counted(tmp_path / "probe", (1, "all", 0, ["a-0"])).rates == {"a": 0.0, "b": None}


def test_a_recipe_that_failed_has_lost_no_row_in_the_table() -> None:
    told = line("theirs", [Outcome(9.0), Outcome(0.1, failed="Error: a | b")], {"a": 8})
    assert told == ["theirs", "–", "–", "–", "–", "–", "failed: Error: a / b", "–"]
