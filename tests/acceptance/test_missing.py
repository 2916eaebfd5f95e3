"""A model that was restored, copied or deleted: what it lost is told, and trained again it is the model it was."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import closing

import pytest

from tests.lab import Lab

FILES = {"a": 37, "b": 60, "c": 21, "d": 5}
STEP = "transformers.trainer:Trainer.training_step"
MIDDLE = {"at": STEP, "role": "worker", "nth": 8, "do": "kill both", "once": "middle"}
CUT_OFF = {"at": "longrun.archive:claim_again", "role": "daemon", "when": "after", "do": "kill", "once": "taken back"}


@pytest.fixture(scope="module")
def settings(dropout_model):
    return {
        "model.base_model": str(dropout_model),
        "train.learning_rate": 1e-3,
        "train.batch_size": 4,
        "train.save_steps": 3,
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, torch_hand, settings):
    with closing(Lab(tmp_path_factory.mktemp("undisturbed") / "home", hand=torch_hand, **settings)) as lab:
        for name, rows in FILES.items():
            lab.drop(f"{name}.jsonl", rows)
        assert lab.drain() == 0
        yield lab


@pytest.fixture(scope="module")
def moments(tmp_path_factory, torch_hand, settings):
    """Copies of one home: after a, in the middle of b, after c."""
    folder = tmp_path_factory.mktemp("moments")
    with closing(Lab(folder / "home", hand=torch_hand, **settings)) as lab:
        lab.drop("a.jsonl", FILES["a"])
        assert lab.drain() == 0
        copy(lab.home, folder / "after a")
        lab.drop("b.jsonl", FILES["b"])
        assert lab.drain(faults=[MIDDLE]) < 0
        copy(lab.home, folder / "middle of b")
        lab.drop("c.jsonl", FILES["c"])
        assert lab.drain() == 0
    lab.home.rename(folder / "after c")
    return folder


@pytest.fixture
def lab(moments, tmp_path, torch_hand):
    """The home after c."""
    copy(moments / "after c", tmp_path / "home")
    with closing(Lab(tmp_path / "home", hand=torch_hand, fresh=False)) as lab:
        lab.probe = lab.home / "probe"
        yield lab


@pytest.fixture
def elsewhere(make_lab, torch_hand, settings):
    return make_lab("elsewhere", hand=torch_hand, **settings)


def copy(home, target):
    shutil.copytree(home, target, ignore=shutil.ignore_patterns("*.sock"))


def restore(lab, moment):
    shutil.rmtree(lab.model)
    shutil.copytree(moment / "current_model", lab.model)


def assert_as_if_nothing_had_happened(lab, undisturbed):
    assert {name: lab.times_trained(name, rows) for name, rows in FILES.items()} == {
        name: {1: rows} for name, rows in FILES.items()
    }
    assert lab.steps_received() == undisturbed.steps_received()
    assert lab.weights() == undisturbed.weights()
    assert lab.status["missing_files"] == 0
    assert lab.names("trained") == {f"{name}.jsonl" for name in FILES}
    assert lab.names("state/jobs") == lab.names("state/requests") == set()


@pytest.mark.parametrize("moment", ["after a", "middle of b"])
def test_what_a_restored_model_lost_is_told_and_trained_again_to_the_same_bits(lab, moments, undisturbed, moment):
    assert lab.status["missing"] == []
    restore(lab, moments / moment)
    done = (lab.lineage["in_progress"] or {"done_steps": 0})["done_steps"]
    assert (done > 0) == (moment == "middle of b")
    told = lab.status
    assert (told["state"], told["missing"], told["missing_files"]) == ("stopped", ["b.jsonl", "c.jsonl"], 2)
    assert "missing      2: b.jsonl, c.jsonl (trained here, but not in the model" in lab.command("status").stdout
    missing = json.loads(lab.command("missing", "--json").stdout)
    assert [[lost[key] for key in ("name", "rows", "base_step", "target_step", "done_steps")] for lost in missing] == [
        ["b.jsonl", 60, 10, 25, done],
        ["c.jsonl", 21, 25, 31, 0],
    ]
    assert re.search(r"2 +b\.jsonl +60 +11-25 .* trained/b\.jsonl", lab.command("missing").stdout)

    lab.drop("d.jsonl", FILES["d"])
    asked = lab.command("retry", "--missing")
    assert asked.returncode == 0
    assert re.findall(r"(\w)\.jsonl", asked.stdout) == ["b", "c"]
    assert lab.drain(faults=[CUT_OFF]) < 0
    assert lab.drain(faults=[CUT_OFF]) == 0
    assert lab.log.count("trained here, but not in the model: b.jsonl, c.jsonl (2 files, 81 rows)") == 2
    assert_as_if_nothing_had_happened(lab, undisturbed)
    assert [(file["job"], file["name"]) for file in lab.lineage["files"]] == [
        (number, f"{name}.jsonl") for number, name in enumerate(FILES, start=1)
    ]
    assert "nothing is missing" in lab.command("missing").stdout


def test_an_idle_daemon_notices_that_its_model_is_gone_and_makes_it_again(lab, undisturbed):
    lab.start()
    lab.wait_until_idle()
    shutil.rmtree(lab.model)
    lab.wait_until(lambda: lab.note["missing"] == ["a.jsonl", "b.jsonl", "c.jsonl"], limit_s=15)
    assert lab.status["missing"] == lab.note["missing"]
    assert "trained here, but not in the model: a.jsonl, b.jsonl, c.jsonl (3 files, 118 rows)" in lab.log
    assert lab.command("retry", "--missing").returncode == 0
    lab.drop("d.jsonl", FILES["d"])
    lab.wait_until(lambda: len(lab.names("trained")) == 4)
    lab.wait_until(lambda: lab.note["missing_files"] == 0)
    assert_as_if_nothing_had_happened(lab, undisturbed)


def test_an_idle_daemon_notices_a_model_that_was_put_in_the_place_of_its_own(lab, moments):
    lab.start()
    lab.wait_until_idle()
    restore(lab, moments / "after a")
    lab.wait_until(lambda: lab.note["missing"] == ["b.jsonl", "c.jsonl"], limit_s=15)
    restore(lab, moments / "after c")
    lab.wait_until(lambda: lab.note["missing"] == [], limit_s=15)
    assert lab.names("state/set_aside") == set()


def test_a_file_whose_bytes_are_gone_is_named_and_the_others_train(lab, moments):
    restore(lab, moments / "after a")
    (lab.home / "trained" / "b.jsonl").unlink()
    asked = lab.command("retry", "--missing")
    assert asked.returncode == 1
    assert "b.jsonl cannot be trained again: it is gone from trained/" in asked.stdout
    assert lab.drain() == 0
    assert [file["name"] for file in lab.lineage["files"]] == ["a.jsonl", "c.jsonl"]
    assert lab.status["missing"] == ["b.jsonl"]


def test_a_new_file_on_top_of_a_file_that_is_missing_its_rest_is_warned_of(lab, moments):
    restore(lab, moments / "middle of b")
    done = lab.lineage["in_progress"]["done_steps"]
    lab.drop("d.jsonl", FILES["d"])
    assert lab.drain() == 0
    (warning,) = [event for event in lab.events if event["event"] == "left in the middle"]
    assert (warning["file"], warning["done_steps"]) == ("b.jsonl", done)
    assert f"the model is in the middle of b.jsonl: it has {done} of its 15 steps" in warning["message"]
    assert "retry --missing" in warning["message"]
    assert [file["outcome"] for file in lab.lineage["files"]] == ["trained", "ended early", "trained"]
    assert lab.status["missing"] == ["b.jsonl", "c.jsonl"]


def test_whoever_heeds_the_warning_before_the_next_checkpoint_loses_nothing(lab, moments, undisturbed):
    restore(lab, moments / "middle of b")
    lab.drop("d.jsonl", FILES["d"])
    assert lab.drain(faults=[{"at": STEP, "role": "worker", "do": "kill both", "once": "too early"}]) < 0
    assert "the model is in the middle of b.jsonl" in lab.log
    assert lab.command("retry", "--missing").returncode == 0
    assert lab.drain() == 0
    assert_as_if_nothing_had_happened(lab, undisturbed)


def test_a_ledger_that_was_lost_learns_from_the_model_what_a_restore_would_lose(lab, moments):
    (lab.home / "state" / "ledger.sqlite3").unlink()
    assert lab.drain() == 0
    restore(lab, moments / "after a")
    missing = json.loads(lab.command("missing", "--json").stdout)
    assert [(lost["job"], lost["name"], lost["rows"], lost["target_step"]) for lost in missing] == [
        (2, "b.jsonl", 60, 25),
        (3, "c.jsonl", 21, 31),
    ]


def test_a_model_copied_to_another_home_in_the_middle_of_a_file_goes_on_there(elsewhere, moments, undisturbed):
    lab = elsewhere
    shutil.copytree(moments / "middle of b" / "current_model", lab.model)
    shutil.copy(moments / "middle of b" / "probe" / "batches.jsonl", lab.probe)
    lab.drop("b.jsonl", FILES["b"]).rename(lab.inbox / "the same.jsonl")
    assert lab.drain() == 0
    assert "going on where the model is in the middle of these bytes, begun in another home as b.jsonl" in lab.log
    for name in ("c", "d"):
        lab.drop(f"{name}.jsonl", FILES[name])
    assert lab.drain() == 0
    assert {name: lab.times_trained(name, rows) for name, rows in FILES.items()} == {
        name: {1: rows} for name, rows in FILES.items()
    }
    assert lab.weights() == undisturbed.weights()
    files = lab.lineage["files"]
    assert [(file["name"], file["outcome"]) for file in files] == [
        (name, "trained") for name in ("a.jsonl", "the same.jsonl", "c.jsonl", "d.jsonl")
    ]
    assert len({file["home"] for file in files}) == 2
    assert lab.status["missing_files"] == 0


def test_another_home_that_trained_the_same_bytes_under_the_same_number_did_not_train_ours(elsewhere, moments):
    lab = elsewhere
    lab.drop("a.jsonl", FILES["a"])
    assert lab.drain() == 0
    restore(lab, moments / "after a")
    assert lab.status["missing"] == ["a.jsonl"]
    assert lab.command("retry", "--missing").returncode == 0
    assert lab.drain() == 0
    assert lab.global_step == 20
    first, second = lab.lineage["files"]
    assert (first["job"], first["sha256"]) == (second["job"], second["sha256"])
    assert first["home"] != second["home"]
    assert lab.status["missing"] == []
