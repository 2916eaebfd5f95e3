"""A disk that refuses, at any call: one clear sentence or the full effect, and nothing in between to be seen."""

from __future__ import annotations

import errno

from longrun.disk import CANNOT
from tests.drills.faults import EVER_AFTER
from tests.drills.test_kills import LITTLE
from tests.drills.world import OPERATIONS, Operation, World, tree

HOW = ("ENOSPC", "EIO", "EXDEV", "EACCES", "EDQUOT", f"EIO{EVER_AFTER}", f"ENOSPC{EVER_AFTER}")
ALONE = {"longrun.store:THREADS": 1}  # so that the nth call is the same one each time
OLD_KERNEL = Operation(("restore", "first"), settings={"longrun.disk:RENAME_EXCHANGE": 1 << 20})  # or NFS, or FUSE
REFUSED = OPERATIONS | {"restore without an exchange of names": OLD_KERNEL}

# Where a command may succeed all the same: there is another way, or it only tidies up (the next command does it).
ANOTHER_WAY = ("ioctl", "copy_file_range", "renameat2")
TIDYING = ("unlink", "rmdir")
THERE = ("mkdir",)  # of a folder that exists already
A_NOTE = ("ftruncate", "pwrite")  # in the lock's file, of who holds it


def may_succeed(call, how):
    name, _, about = call.partition(" ")
    number = getattr(errno, how.removesuffix(EVER_AFTER))
    return (
        (name in ANOTHER_WAY and number in CANNOT)
        or name in TIDYING + THERE
        or (name == "open" and "/probe-" in about and number in CANNOT)
        or (name in A_NOTE and about.endswith("/lock"))
    )


def test_a_refused_call_is_told_in_one_sentence_and_nothing_is_half_done(campaign, hand, quick):
    little = World.make(quick / "little", weights_bytes=LITTLE)
    cases = []
    for name, operation in REFUSED.items():
        tried = little.copy(quick / "tried")
        calls = hand.do(*operation.words(tried), home=tried.home, nth=0, settings=ALONE | operation.settings).calls
        # Two names change places in three steps there: a disk that dies between them is past the help of a command.
        hows = [how for how in HOW if operation is not OLD_KERNEL or not how.endswith(EVER_AFTER)]
        cases += [(name, number, how) for number in range(1, len(calls) + 1) for how in hows]

    def attempt(case, dice):
        name, number, how = case
        operation, world = REFUSED[name], little.copy(quick / "world")
        before = tree(world.model)
        orders = {"nth": number, "how": how, "settings": ALONE | operation.settings}
        outcome = hand.do(*operation.words(world), home=world.home, **orders)
        outcome.check_told()
        call = outcome.calls[number - 1] if number <= len(outcome.calls) else "none: fewer were needed"
        world.check(gone=operation.gone)
        if outcome.code == 0:
            assert operation.done(world), call
            assert number > len(outcome.calls) or may_succeed(call, how), f"it succeeded in spite of {call}"
            campaign.note("succeeded by another way or for want of importance")
        else:
            assert tree(world.model) == before or name.startswith("restore"), call
            if call.partition(" ")[0] not in TIDYING and not how.endswith(EVER_AFTER):
                world.check_swept()
        again = hand.do(*operation.words(world), home=world.home)
        assert again.code == 0 or operation.done(world), again
        world.check(gone=operation.gone)

    campaign.run("refused at any call, one sentence and nothing half done", cases, attempt, small=40)


def test_a_sync_that_fails_after_the_exchange_costs_neither_model(hand, quick):
    little = World.make(quick / "little", weights_bytes=LITTLE)
    tried, world = little.copy(quick / "tried"), little.copy(quick / "world")
    restore = OPERATIONS["restore"].words(world)
    last = len(hand.do(*restore, home=tried.home, nth=0, settings=ALONE).calls)
    outcome = hand.do(*restore, home=world.home, nth=last, how="EIO", settings=ALONE)
    outcome.check_told()
    assert outcome.calls[-1].startswith("fsync")
    assert outcome.code == 1
    assert world.state(world.model) == "first"
    assert [world.state(kept) for kept in world.home.glob("current_model.replaced-*")] == ["current"]
