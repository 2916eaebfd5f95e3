"""The daemon's state machine on a simulated disk, by a simulated clock: whatever befalls it, in whatever order."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.drills import histories

HISTORIES = 2500  # of 400 steps and those in which the home gets over them: a million and more
LIMIT_S = 120.0


@pytest.fixture
def process(monkeypatch):
    """Forks one process for each history from one that has everything imported, and hashes names alike in all."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    warm = multiprocessing.get_context("forkserver")
    warm.set_forkserver_preload([histories.__name__])
    with ProcessPoolExecutor(1, mp_context=warm, max_tasks_per_child=1) as process:
        yield process


def test_whatever_befalls_a_simulated_home_nothing_is_lost(campaign, process):
    def attempt(number, dice):
        seed = f"{campaign.seed}.{number}"
        try:
            happened = process.submit(histories.live, seed).result(LIMIT_S)
        except Exception as error:
            told = f"PYTHONHASHSEED=0 python -m {histories.__name__} {seed} tells all of it"
            raise AssertionError(f"{error!r}; {told}") from error
        campaign.note("steps", happened.pop("steps"))
        for what, times in happened.items():
            campaign.note(what.replace("_", " "), times)

    campaign.run("1, 2, 3, 5, 8, 10: simulated", range(HISTORIES), attempt, small=12)
