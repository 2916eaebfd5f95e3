"""The daemon, its worker or both killed at any moment, and at any call: every file in one place, every row once."""

from __future__ import annotations

import time

from tests.drills.daemons import Watched

LIVES, KILLS_A_LIFE = 400, 25  # 10,000 kills
ROLES = ("daemon", "worker", "preparer")


def test_a_kill_at_any_moment_costs_no_file_and_no_row(campaign, quick):
    def attempt(life, dice):
        lab = Watched(quick / f"life-{life}")
        try:
            for _ in range(KILLS_A_LIFE):
                lab.drop_some(dice)
                daemon = lab.start()
                who = dice.choice(("daemon", "daemon", "worker", "both"))
                time.sleep(dice.uniform(0.05, 0.9))
                lab.strike(who, daemon)
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
