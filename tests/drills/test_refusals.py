"""A disk that refuses, at any call: one clear sentence or the full effect, and nothing in between to be seen."""

from __future__ import annotations

import errno

from longrun.disk import CANNOT
from tests.drills.faults import EVER_AFTER
from tests.drills.test_kills import LITTLE
from tests.drills.world import OPERATIONS, World, tree

HOW = ("ENOSPC", "EIO", "EXDEV", "EACCES", "EDQUOT", f"EIO{EVER_AFTER}", f"ENOSPC{EVER_AFTER}")
ALONE = {"longrun.store:THREADS": 1}  # so that the nth call is the same one each time

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
        or (name in A_NOTE and about.endswith("/lock"))
    )


def test_a_refused_call_is_told_in_one_sentence_and_nothing_is_half_done(campaign, hand, quick):
    little = World.make(quick / "little", weights_bytes=LITTLE)
    cases = []
    for name, operation in OPERATIONS.items():
        tried = little.copy(quick / "tried")
        calls = hand.do(*operation.words(tried), home=tried.home, nth=0, settings=ALONE).calls
        cases += [(name, number, how) for number in range(1, len(calls) + 1) for how in HOW]

    def attempt(case, dice):
        name, number, how = case
        operation, world = OPERATIONS[name], little.copy(quick / "world")
        before = tree(world.model)
        outcome = hand.do(*operation.words(world), home=world.home, nth=number, how=how, settings=ALONE)
        outcome.check_told()
        call = outcome.calls[number - 1] if number <= len(outcome.calls) else "none: fewer were needed"
        world.check(gone=operation.gone)
        if outcome.code == 0:
            assert operation.done(world), call
            assert number > len(outcome.calls) or may_succeed(call, how), f"it succeeded in spite of {call}"
            campaign.note("succeeded by another way or for want of importance")
        else:
            assert tree(world.model) == before or name == "restore", call
            if call.partition(" ")[0] not in TIDYING and not how.endswith(EVER_AFTER):
                world.check_swept()
        again = hand.do(*operation.words(world), home=world.home)
        assert again.code == 0 or operation.done(world), again
        world.check(gone=operation.gone)

    campaign.run("refused at any call, one sentence and nothing half done", cases, attempt, small=40)
