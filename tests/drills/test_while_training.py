"""Backups of a model that is being trained: each is a whole model, and training goes on from it row by row."""

from __future__ import annotations

import collections
import json

import pytest

from longrun import checkpoint
from longrun.home import Home
from tests.drills.campaign import FULL
from tests.lab import Lab

BACKUPS, SMALL = 100, 2
ROWS = 60
SETTINGS = {"train.batch_size": 4, "train.save_steps": 3, "train.save_total_limit": 2}
PROGRAM = "backup_manager.py"


@pytest.mark.timeout(3600 if FULL else 240)
def test_every_backup_of_a_model_in_training_is_whole_and_trains_on(campaign, torch_hand, make_lab, tmp_path):
    lab = make_lab("trained", hand=torch_hand, **SETTINGS)
    dropped: list[str] = []

    def keep_busy():
        """A file in training and others behind it, whatever the backups take."""
        while len(lab.names("inbox") | lab.names("state/jobs")) < 3:
            dropped.append(f"f{len(dropped):04d}")
            lab.drop(f"{dropped[-1]}.jsonl", ROWS)

    keep_busy()
    daemon = lab.start()
    lab.wait_until(lambda: lab.global_step)
    made = []
    for _ in range(BACKUPS if FULL else SMALL):
        keep_busy()
        step = lab.global_step
        outcome = lab.command("backup", str(lab.model), "--json", program=PROGRAM)
        assert outcome.returncode == 0, outcome.stderr
        made.append(json.loads(outcome.stdout))
        lab.wait_until(lambda step=step: lab.global_step > step)
    lab.kill(daemon)
    trained = lab.steps_received()

    def attempt(number, dice):
        backup = made[number]
        home = Lab(tmp_path / f"home-{number}", hand=torch_hand, **SETTINGS)
        words = ("restore", backup["id"], "--store", backup["store"])
        outcome = home.command(*words, program=PROGRAM)
        assert outcome.returncode == 0, outcome.stderr
        lineage = home.lineage
        campaign.note("in the middle of a file", lineage["in_progress"] is not None)
        check_whole(home, backup)
        try:
            go_on(home, lineage)
        finally:
            home.close()

    def go_on(home, lineage):
        """Give it the file that it was in the middle of and those that it has not seen, and count every row."""
        begun = {record["name"] for record in lineage["files"]}
        names = [name for name in dropped if f"{name}.jsonl" not in begun][:2]
        for name in names:
            home.drop(f"{name}.jsonl", ROWS)
        assert home.drain() == 0, home.log
        life = {step: rows for step, rows in trained.items() if step < lineage["global_step"]}
        life |= {step: rows for step, rows in home.steps_received().items() if step >= lineage["global_step"]}
        texts = [text for rows in life.values() for text in rows]
        for name in [*(name.removesuffix(".jsonl") for name in begun), *names]:
            times = collections.Counter(
                sum(f"Say {name}-{row:04d}." in text for text in texts) for row in range(1, ROWS + 1)
            )
            assert times == {1: ROWS}, (name, times)

    campaign.run("backed up in training, a model is whole and trains on", range(len(made)), attempt, small=1)


def check_whole(lab, backup):
    """The newest checkpoint verifies, the root loads as any model, and all say the same step."""
    from transformers import AutoModelForCausalLM

    damaged: list[str] = []
    newest = checkpoint.newest(Home(lab.home), checkpoint.Verifier(), damaged.append)
    assert newest is not None
    assert not damaged
    assert newest.global_step == lab.global_step == lab.lineage["global_step"] == backup["global_step"]
    AutoModelForCausalLM.from_pretrained(lab.model)
