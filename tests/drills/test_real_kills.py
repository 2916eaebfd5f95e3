"""The real tiny model, killed at any moment: each row as often as planned, and not a bit but as if undisturbed."""

from __future__ import annotations

import shutil
from contextlib import closing

import pytest

from tests.drills.campaign import FULL
from tests.drills.daemons import Mortal

LIVES, KILLS_A_LIFE = 20, 15  # 300 kills
ROWS = (1, 7, 37, 60, 100, 160)


@pytest.mark.skipif(not FULL, reason="tests/acceptance/test_kills.py has one in each phase")
def test_a_kill_at_any_moment_changes_no_bit_of_the_real_model(campaign, quick, torch_hand, dropout_model):
    def attempt(life, dice):
        settings = drawn_settings(dice) | {"base_model": dropout_model}
        with (
            closing(Mortal(quick / f"killed-{life}", hand=torch_hand, **settings)) as lab,
            closing(Mortal(quick / f"unbroken-{life}", hand=torch_hand, **settings)) as unbroken,
        ):
            files = live_and_be_killed(lab, dice, campaign)
            assert lab.drain() == 0, lab.log
            for name, rows in files.items():
                unbroken.drop(f"{name}.jsonl", rows)
            assert unbroken.drain() == 0, unbroken.log
            epochs = settings["train.num_train_epochs"]
            assert {name: lab.times_trained(name, rows) for name, rows in files.items()} == {
                name: {epochs: rows} for name, rows in files.items()
            }, lab.log
            assert lab.names("trained") == {f"{name}.jsonl" for name in files}
            assert lab.names("inbox") == lab.names("rejected") == lab.names("state/jobs") == set()
            assert lab.steps_received() == unbroken.steps_received()
            assert lab.weights() == unbroken.weights()
        for home in (unbroken.home, lab.home):
            shutil.rmtree(home)

    campaign.run("2: killed at a random moment, the real model has the same bits", range(LIVES), attempt, small=0)


def drawn_settings(dice):
    rows_at_once = dice.choice((2, 4))
    return {
        "train.learning_rate": 1e-3,
        "train.num_train_epochs": dice.choice((1, 2, 3)),
        "train.per_device_train_batch_size": rows_at_once,
        "train.batch_size": rows_at_once * dice.choice((1, 2, 3)),
        "train.save_steps": dice.choice((2, 3, 7)),
        "worker.max_attempts": 100,
        "worker.retry_s": 0.1,
    }


def live_and_be_killed(lab, dice, campaign):
    """The files that it was given, so many that it was always at one; a daemon whose worker was killed lives on."""
    files, daemon = {}, None
    for _ in range(KILLS_A_LIFE):
        while len(lab.names("inbox") | lab.names("state/jobs")) < 2:
            name = f"f{len(files):02d}"
            files[name] = dice.choice(ROWS)
            lab.drop(f"{name}.jsonl", files[name])
        daemon = daemon or lab.start()
        lab.let_live(dice, a_while_s=120.0, a_little_s=dice.choice((0.1, 1.0)))
        who = dice.choice(("daemon", "worker", "both"))
        campaign.note(f"when {lab.strike(who, daemon)}")
        campaign.note(f"kills of {who}")
        daemon = daemon if who == "worker" else None
    if daemon:
        lab.kill(daemon)
    return files
