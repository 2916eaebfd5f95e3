"""`rm -rf current_model/` at any moment: the next file begins a new model, and the old one never comes back."""

from __future__ import annotations

import re
import shutil
import time
from contextlib import closing

import pytest

from tests.lab import Lab

STEP = "transformers.trainer:Trainer.training_step"
ROWS = 24  # three steps of eight; a commit in the middle, another at the end

# Each file finds a model at global step 3 and loses it at this moment.
MOMENTS = {
    "training": {"at": STEP, "role": "worker", "row": "Say training-0012."},
    "committing": {"at": "longrun.disk:rename_into", "role": "worker", "about": "checkpoint-4"},
    "committed": {"at": "longrun.disk:rename_into", "role": "worker", "about": "checkpoint-6", "when": "after"},
    "publishing": {"at": "longrun.checkpoint:_place", "role": "worker", "about": "checkpoint-6/model.safetensors"},
}


@pytest.fixture(scope="module")
def story(tmp_path_factory, torch_hand):
    """One daemon that loses its model again and again; after each file, what the model has seen."""
    settings = {"train.save_steps": 2, "train.learning_rate": 1e-3}
    with closing(Lab(tmp_path_factory.mktemp("removed") / "home", hand=torch_hand, **settings)) as lab:
        live_through(lab)
        yield lab


def live_through(lab):
    lab.seen = {}
    faults = [{"do": "remove model", "once": name, **fault} for name, fault in MOMENTS.items()]
    for name in MOMENTS:
        (lab.probe / f"struck-{name}").touch()
    daemon = lab.start(faults=faults)
    train(lab, "first")
    shutil.rmtree(lab.model)
    train(lab, "idle")
    train(lab, "settling", after_drop=lambda: remove_while_settling(lab))
    for name in MOMENTS:
        (lab.probe / f"struck-{name}").unlink()  # from now on it may strike
        train(lab, name)
        assert (lab.probe / f"struck-{name}").exists(), lab.log
    lab.kill(daemon)
    shutil.rmtree(lab.model)
    lab.drop("first.jsonl", ROWS)
    assert lab.drain() == 0
    look(lab, "first again", "first")


def train(lab, name, after_drop=None):
    lab.drop(f"{name}.jsonl", ROWS)
    if after_drop:
        after_drop()
    lab.wait_until(lambda: f"{name}.jsonl" in lab.names("trained"))
    look(lab, name, name)


def remove_while_settling(lab):
    time.sleep(0.1)
    shutil.rmtree(lab.model)
    assert "settling.jsonl" in lab.names("inbox"), "it was claimed too soon"


def look(lab, key, name):
    lab.seen[key] = {
        "lineage": lab.lineage["lineage"],
        "files": [file["name"] for file in lab.lineage["files"]],
        "times": lab.times_trained(name, ROWS),
        "step": lab.global_step,
        "checkpoints": {path for path in lab.names("current_model") if path.startswith("checkpoint-")},
    }


@pytest.mark.parametrize("moment", ["first", "idle", "settling", *MOMENTS, "first again"])
def test_the_model_after_a_removal_has_seen_the_next_file_once_and_nothing_else(story, moment):
    seen = story.seen[moment]
    assert seen["files"] == [f"{moment.split()[0]}.jsonl"]
    assert seen["times"] == {1: ROWS}
    assert seen["step"] == 3
    assert seen["checkpoints"] == {"checkpoint-2", "checkpoint-3"}


def test_the_old_model_never_comes_back(story):
    assert len({seen["lineage"] for seen in story.seen.values()}) == len(story.seen)


def test_a_removal_is_told_and_the_new_plan_reaches_its_own_steps(story):
    sentences = re.findall(r"This file will train .*", story.log)
    assert set(sentences) == {
        "This file will train for 3 steps (reaching global step 3)",
        "This file will train for 3 steps (reaching global step 6)",
    }
    assert sentences[-1].endswith("step 3)")
    told = [event for event in story.events if event["event"] == "model removed"]
    assert len(told) == len(story.seen) - 2, story.log  # neither before the first file nor while no daemon ran


def test_a_removal_costs_a_file_no_attempt(story):
    assert [event["message"] for event in story.events if event["event"] == "retry"] == []


def test_the_same_file_dropped_again_is_trained_again_and_said_to_be_the_same(story):
    assert "first.jsonl: 24 rows (messages); same content as first.jsonl before it, trained again" in story.log
    assert {"first.jsonl", "first.2.jsonl"} <= story.names("trained")
