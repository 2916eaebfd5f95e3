"""The daemon, its worker or both killed at any moment, and at any call: every file in one place, every row once."""

from __future__ import annotations

import json
import shutil
import time

from longrun import status
from longrun.home import Home
from tests.drills.daemons import Watched

LIVES, KILLS_A_LIFE = 400, 25  # 10,000 kills
ROLES = ("worker", "preparer", "daemon")  # the last does not make the same number of calls every time
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EACCES", "EMFILE")
LIMIT_S = 150.0  # where every call takes long


def test_a_kill_at_any_moment_costs_no_file_and_no_row(campaign, quick, hand):
    def attempt(life, dice):
        lab = Watched(quick / f"life-{life}", hand=hand)
        try:
            for _ in range(KILLS_A_LIFE):
                lab.drop_some(dice, most=3)
                daemon = lab.start()
                who = dice.choice(("daemon", "daemon", "worker", "both"))
                lab.let_live(dice)
                campaign.note(f"when {lab.strike(who, daemon)}")
                campaign.note(f"kills of {who}")
                if who == "worker":
                    lab.drop_some(dice, most=1)
                    time.sleep(dice.uniform(0.0, 0.3))
                    lab.kill(daemon)
            assert lab.drain() == 0
            lab.check()
        finally:
            lab.close()

    campaign.run("1, 2: killed at a random moment, no file and no row is lost", range(LIVES), attempt, small=1)


def test_a_kill_at_any_call_costs_no_file_and_no_row(campaign, quick, hand):
    def attempt(case, dice):
        role, number = case
        lab = struck(hand, quick / "struck", role, number, "SIGKILL")
        campaign.note(f"killed a {role}", lab.was_struck)

    campaign.run("3: killed at a call that changes the disk", cases_of_calls(hand, quick), attempt, small=9)


def test_a_refused_call_is_told_and_costs_no_file_and_no_row(campaign, quick, hand):
    cases = [(role, number, how) for role, number in cases_of_calls(hand, quick) for how in ERRORS]

    def attempt(case, dice):
        lab = struck(hand, quick / "struck", *case)
        assert "Traceback" not in (lab.home / "stderr.log").read_text()
        campaign.note("refused", lab.was_struck)

    campaign.run("4: refused at a call that changes the disk", cases, attempt, small=9)


def test_a_drain_that_was_refused_between_claim_and_ledger_goes_on(quick):
    lab = Watched(quick / "home")
    try:
        for name in ("a", "b"):
            lab.drop_rows(name, 9)
        refused = {"at": "longrun.ledger:Ledger.claim", "role": "daemon", "do": "ENOSPC", "nth": 2}
        assert lab.drain(faults=[refused]) == 0
        assert "paused: disk" in lab.log
        lab.check()
    finally:
        lab.close()


def test_what_a_disk_refused_is_no_problem_when_there_is_nothing_left_to_write(quick):
    lab = Watched(quick / "home")
    try:
        (lab.home / "inbox" / "not-rows.jsonl").write_text("what it was refused is done, and no model is written\n")
        lab.start(faults=[{"at": "longrun.archive:put_away", "role": "daemon", "do": "ENOSPC", "about": "not-rows"}])
        lab.wait_until(lambda: "solved: no file waits for that any more" in lab.log)
        assert "paused: disk" in lab.log
        lab.wait_until(lambda: (told := status.read(Home(lab.home)))["state"] == "idle" and not told["problems"])
        assert lab.names("rejected") == {"not-rows.jsonl", "not-rows.jsonl.reason.json"}
        assert lab.log.count("not-rows.jsonl is rejected") == 1
    finally:
        lab.close()


def cases_of_calls(hand, folder):
    """Each call of each role, with a few to spare: a run that is cut may need more."""
    return [(role, number) for role in ROLES for number in range(1, calls_of(hand, folder / role, role) + 5)]


def calls_of(hand, home, role):
    """How many calls change the disk when three files are trained."""
    lab = struck(hand, home, role, 0, "")
    return len(lab.trace.read_text().splitlines())


def struck(hand, home, role, number, how):
    """A home in which the nth call was struck, and that was taken up again by a daemon which nothing befalls."""
    shutil.rmtree(home, ignore_errors=True)
    lab = Watched(home, hand=hand)
    try:
        for name, rows in (("a", 20), ("b", 1), ("c", 9)):
            lab.drop_rows(name, rows)
        call = json.dumps({"role": role, "nth": number, "how": how, "trace": str(lab.trace)})
        lab.start("--drain", LONGRUN_CALL=call).wait(LIMIT_S)
        assert lab.drain() == 0, lab.log
        lab.check()
    finally:
        lab.close()
    return lab
