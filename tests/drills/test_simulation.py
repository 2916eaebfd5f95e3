"""The daemon's state machine on a simulated disk, by a simulated clock: whatever befalls it, in whatever order."""

from __future__ import annotations

import multiprocessing

import pytest

from tests.drills import histories

HISTORIES = 2500  # of 400 steps and those in which the home gets over them: a million and more
LIMIT_S = 120.0


@pytest.fixture
def warm(monkeypatch):
    """Forks processes from one that has everything imported, and in which names have the same hashes every time."""
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([histories.__name__])
    return found


def test_whatever_befalls_a_simulated_home_nothing_is_lost(campaign, warm):
    def attempt(number, dice):
        seed = f"{campaign.seed}.{number}"
        failure, happened = lived(warm, seed)
        told = f"PYTHONHASHSEED=0 python -m {histories.__name__} {seed} tells all of it"
        assert not failure, f"{failure}; {told}"
        campaign.note("steps", happened.pop("steps"))
        for what, times in happened.items():
            campaign.note(what.replace("_", " "), times)

    campaign.run("1, 2, 3, 5, 8, 10: simulated", range(HISTORIES), attempt, small=12)


def lived(warm, seed):
    """How a history ended, in a process of its own: why it failed, or what happened in it."""
    here, there = warm.Pipe(duplex=False)
    process = warm.Process(target=live, args=(there, seed))
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(LIMIT_S) else (f"it is not over after {LIMIT_S} s", {})
    except EOFError:
        return "its process ended without a word", {}
    finally:
        here.close()
        process.kill()
        process.join()


def live(there, seed):
    try:
        there.send(("", histories.live(seed)))
    except BaseException as error:  # noqa: BLE001 - the campaign goes on
        there.send((repr(error), {}))
