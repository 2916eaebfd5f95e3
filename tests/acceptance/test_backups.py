"""Backups beside a real daemon: made while it trains, on its schedule, and put back under it."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from longrun.store import Store

if TYPE_CHECKING:
    from tests.lab import Lab

SLOWLY = {"at": "transformers.trainer:Trainer.training_step", "role": "worker", "nth": 0, "do": "slow"}


@pytest.fixture
def lab(make_lab, torch_hand):
    return make_lab(hand=torch_hand)


def manager(lab: Lab, *arguments: str):
    return lab.command(*arguments, program="backup_manager.py")


def listed(lab: Lab) -> list[dict]:
    return json.loads(manager(lab, "list", "--json").stdout)["backups"]


def content(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_recovery_steps_of_the_founding_note_work_as_written(lab):
    """Backup, rm -rf, drop both files again: the model is made anew, and the old one can be had back."""
    lab.drop("a.jsonl", 20)
    assert lab.drain() == 0
    before = content(lab.model)
    done = lab.command("backup", "current_model/", "--type", "pre_recovery", program="backup_manager.py")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(lab.model)
    lab.drop("a.jsonl", 20)
    lab.drop("b.jsonl", 12)
    assert lab.drain() == 0
    assert lab.global_step == 3 + 2
    (backup,) = listed(lab)
    assert (backup["type"], backup["global_step"], backup["complete"]) == ("pre_recovery", 3, True)
    assert manager(lab, "restore", backup["id"]).returncode == 0
    assert content(lab.model) == before


def test_scheduled_backups_are_made_between_files_and_thinned_out(make_lab, torch_hand, tmp_path):
    remote = tmp_path / "elsewhere"
    kept = {f"backup.keep_{period}": 0 for period in ("daily", "weekly", "monthly")}
    settings = {"backup.after_files": 1, "backup.keep_last": 1, "backup.target": f"file://{remote}"}
    lab = make_lab(hand=torch_hand, **settings, **kept)
    for number in range(2):
        lab.drop(f"file{number}.jsonl", 9)
        assert lab.drain() == 0
    (backup,) = listed(lab)
    assert (backup["type"], backup["global_step"]) == ("scheduled", 4)
    assert Store(lab.home / "backups").damage() == []
    assert [copied.global_step for copied in Store(remote).all()] == [2, 4]
    assert Store(remote).damage() == []
    assert [event["event"] for event in lab.events].count("backup") == 2


def test_a_failing_backup_is_a_visible_problem_and_training_goes_on(make_lab, torch_hand):
    lab = make_lab(hand=torch_hand, **{"backup.after_files": 1})
    (lab.home / "backups").write_text("in the way")
    lab.start()
    for number in range(2):
        lab.drop(f"file{number}.jsonl", 9)
        lab.wait_until(lambda number=number: f"file{number}.jsonl" in lab.names("trained"))
    lab.wait_until(lambda: lab.note["problems"])
    assert "the scheduled backup failed: cannot keep backups in" in lab.status["problems"][0]
    assert "the scheduled backup failed" in lab.log
    (lab.home / "backups").unlink()
    lab.wait_until(lambda: not lab.note["problems"])
    assert [backup["global_step"] for backup in listed(lab)] == [4]


def test_restore_refuses_while_a_file_is_trained_and_can_wait_for_its_end(lab):
    lab.drop("a.jsonl", 9)
    assert lab.drain() == 0
    assert manager(lab, "backup", "current_model").returncode == 0
    lab.start(faults=[SLOWLY])
    lab.drop("b.jsonl", 400)
    lab.wait_until(lambda: (current := lab.note["current"]) and current["done_steps"] > 1)
    refused = manager(lab, "restore", "latest")
    assert refused.returncode == 75
    assert "--when-idle" in refused.stderr
    assert manager(lab, "backup", "current_model").returncode == 0  # training is no obstacle to a backup
    first = listed(lab)[0]["id"]
    assert lab.names("trained") == {"a.jsonl"}, "b.jsonl is not trained yet"
    assert manager(lab, "restore", first, "--when-idle").returncode == 0
    assert lab.names("trained") == {"a.jsonl", "b.jsonl"}
    assert lab.global_step == 2
    lab.drop("c.jsonl", 9)  # the daemon that was running goes on from what it finds
    lab.wait_until(lambda: "c.jsonl" in lab.names("trained"))
    records = [(record["name"], record["base_step"]) for record in lab.lineage["files"]]
    assert records == [("a.jsonl", 0), ("c.jsonl", 2)]


@pytest.mark.parametrize("running", [False, True])
def test_reset_backs_the_model_up_and_begins_anew(lab, running):
    lab.drop("a.jsonl", 9)
    assert lab.drain() == 0
    before = content(lab.model)
    if running:
        lab.start()
        lab.wait_until_idle()
    asked = lab.command("reset")
    assert asked.returncode == 1
    assert "--yes" in asked.stderr
    assert content(lab.model) == before
    reset = lab.command("reset", "--yes")
    assert reset.returncode == 0
    assert "grew from" not in reset.stdout  # the settings name what it grew from
    assert not lab.model.exists()
    (backup,) = listed(lab)
    assert (backup["type"], backup["reason"]) == ("pre_recovery", "reset")
    lab.drop("b.jsonl", 9)
    if running:
        lab.wait_until(lambda: "b.jsonl" in lab.names("trained"))
    else:
        assert lab.drain() == 0
    assert [record["name"] for record in lab.lineage["files"]] == ["b.jsonl"]
    assert lab.lineage["files"][0]["base_step"] == 0


def test_reset_waits_for_nobody_who_trains(lab):
    lab.start(faults=[SLOWLY])
    lab.drop("a.jsonl", 80)
    lab.drop("b.jsonl", 400)
    lab.wait_until(lambda: (current := lab.note["current"]) and current["file"] == "b.jsonl")
    refused = lab.command("reset", "--yes")
    assert refused.returncode == 75
    assert "daemon.py stop" in refused.stderr
    assert lab.model.exists()
