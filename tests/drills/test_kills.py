"""Killed at any moment, and at any call: backups verify, the model is old or new, the next command works."""

from __future__ import annotations

from tests.drills.campaign import FULL
from tests.drills.world import OPERATIONS, World

MOMENTS = 200
LARGE, LITTLE = 2_000_000, 300_000  # bytes of weights


def check_after(hand, world, operation):
    """After a cut: what is there is whole, the same command and a backup do their work, and nothing is left over."""
    world.check(gone=operation.gone)
    done = operation.done(world)
    again = hand.do(*operation.words(world), home=world.home)
    assert again.code == 0 or (done and again.code == 1), again  # what is pruned or exported already is not again
    assert operation.done(world)
    after = hand.do("backup", "current_model", home=world.home)
    assert after.code == 0, after
    world.check(gone=operation.gone)
    world.check_swept()


def test_a_kill_at_any_moment_costs_nothing_but_the_command(campaign, hand, tmp_path, quick):
    tmp_path = tmp_path if FULL else quick  # a real disk is where a command spends its time, in syncs
    large = World.make(tmp_path / "large", weights_bytes=LARGE)
    seconds = {}
    for name, operation in OPERATIONS.items():
        tried = large.copy(tmp_path / "tried")
        outcome = hand.do(*operation.words(tried), home=tried.home)
        assert outcome.code == 0 and operation.done(tried), outcome
        seconds[name] = outcome.seconds

    def attempt(name, dice):
        world = large.copy(tmp_path / "world")
        words = OPERATIONS[name].words(world)
        outcome = hand.do(*words, home=world.home, after_s=dice.uniform(0, seconds[name]))
        campaign.note("hit the command running", outcome.code < 0)
        check_after(hand, world, OPERATIONS[name])

    names = list(OPERATIONS)
    cases = [names[number % len(names)] for number in range(MOMENTS)]
    campaign.run("killed at a random moment, nothing is lost", cases, attempt, small=16)


def test_a_kill_at_any_call_costs_nothing_but_the_command(campaign, hand, quick):
    little = World.make(quick / "little", weights_bytes=LITTLE)
    cases = []
    for name, operation in OPERATIONS.items():
        tried = little.copy(quick / "tried")
        calls = hand.do(*operation.words(tried), home=tried.home, nth=0, settings={"longrun.store:THREADS": 1}).calls
        names = [call.partition(" ")[0] for call in calls]  # the rest is another place every time
        cases += [(name, number, call) for number, call in enumerate(names, 1) if call != "pread"]

    def attempt(case, dice):
        name, number, _ = case
        world = little.copy(quick / "world")
        orders = {"nth": number, "how": "SIGKILL", "settings": {"longrun.store:THREADS": 1}}
        outcome = hand.do(*OPERATIONS[name].words(world), home=world.home, **orders)
        # The kernel may copy in fewer pieces this time, so that the last call is not reached.
        assert outcome.code == -9 or OPERATIONS[name].done(world), outcome
        check_after(hand, world, OPERATIONS[name])

    campaign.run("killed at a call that changes the disk, nothing is lost", cases, attempt, small=24)
