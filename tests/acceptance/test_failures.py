"""A file that crashes, hangs, diverges or does not fit never stops the queue, and no damage is trained on."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing
from datetime import datetime, timedelta

import pytest

from tests.drills.daemons import SETTINGS as DRILLED
from tests.drills.daemons import Watched
from tests.lab import Lab, numbered

STEP = "transformers.trainer:Trainer.training_step"
ROWS = 24  # three steps of eight

FAULTS = [
    *({"at": "longrun.wire:connect", "role": "worker", "do": "kill", "once": f"start-{n}"} for n in range(4)),
    {"at": STEP, "role": "worker", "row": "Say crashing-0012.", "do": "kill", "nth": 0},
    {"at": STEP, "role": "worker", "row": "Say diverging-0012.", "do": "nan", "nth": 0},
    {"at": STEP, "role": "worker", "row": "Say large-", "do": "oom", "nth": 0, "rows_over": 2},
    {"at": STEP, "role": "worker", "row": "Say huge-", "do": "oom", "nth": 0},
    {"at": STEP, "role": "worker", "row": "Say hanging-0012.", "do": "hang", "nth": 0},
    {"at": "longrun.training.prepare:prepare", "role": "preparer", "about": "unlucky", "do": "kill", "once": "unlucky"},
    {"at": "longrun.examine:examine", "role": "preparer", "about": "unreadable", "do": "kill", "nth": 0},
]


@pytest.fixture(scope="module")
def story(tmp_path_factory, torch_hand):
    """Bad files between good ones, all through one daemon."""
    settings = {"train.save_steps": 1, "train.learning_rate": 1e-3, "worker.max_attempts": 3,
                "train.per_device_train_batch_size": 8}  # fmt: skip
    with closing(Lab(tmp_path_factory.mktemp("failures") / "home", hand=torch_hand, **settings)) as lab:
        for name in ("first", "crashing", "diverging", "unlucky", "unreadable", "large", "huge", "last"):
            lab.drop(f"{name}.jsonl", ROWS)
        lab.exit_code = lab.drain(faults=FAULTS)
        yield lab


@pytest.fixture
def scripted(tmp_path, hand):
    """A home whose children have no torch: they begin at once."""
    with closing(Watched(tmp_path / "home", hand=hand)) as lab:
        yield lab


def reason(lab, name):
    return json.loads((lab.home / "rejected" / f"{name}.jsonl.reason.json").read_text())


def retries(lab, name):
    return [e["message"] for e in lab.events if e["event"] == "retry" and e["message"].startswith(f"{name}.jsonl")]


def test_bad_files_are_rejected_and_all_others_train_each_row_once(story):
    assert story.exit_code == 1
    trained = ["first", "unlucky", "large", "last"]
    assert story.names("trained") == {f"{name}.jsonl" for name in trained}
    assert {name: story.times_trained(name, ROWS) for name in trained} == {name: {1: ROWS} for name in trained}
    rejected = {f"{name}.jsonl" for name in ("crashing", "diverging", "unreadable", "huge")}
    assert story.names("rejected") == rejected | {f"{name}.reason.json" for name in rejected}
    assert story.names("inbox") == story.names("state/jobs") == set()


def test_a_file_that_kills_the_worker_gets_three_attempts(story):
    told = reason(story, "crashing")
    assert told["kind"] == "crash"
    assert "SIGKILL" in told["why"]
    assert told["why"].endswith("given up after 3 attempts")
    started = [e for e in story.events if e["event"] == "started" and e["message"].startswith("crashing")]
    assert 3 <= len(started) <= 4  # one more when a first attempt got as far as a checkpoint


def test_a_step_whose_loss_is_no_number_names_its_rows_and_is_not_in_the_model(story):
    told = reason(story, "diverging")
    assert told["kind"] == "diverged"
    assert 12 in told["rows"]
    assert len(told["rows"]) == 8
    assert f"global step {told['step']}" in told["why"]
    record = next((file for file in story.lineage["files"] if file["name"] == "diverging.jsonl"), None)
    done = record["done_steps"] if record else 0
    # What was saved before that step stays; its rows, and those after them, were never trained.
    assert story.times_trained("diverging", ROWS) == {n: c for n, c in {1: 8 * done, 0: ROWS - 8 * done}.items() if c}
    assert story.times_trained("diverging", ROWS)[0] >= 8
    assert record is None or record["outcome"] == "ended early"


def test_out_of_memory_makes_batches_smaller_and_steps_not(story):
    record = next(file for file in story.lineage["files"] if file["name"] == "large.jsonl")
    assert (record["planned_steps"], record["batch_size"]) == (3, 8)
    received = story.steps_received()
    assert [len(received[step]) for step in range(record["base_step"], record["target_step"])] == [8, 8, 8]
    told = retries(story, "large")
    assert len(told) == 2  # 8 rows and 4 did not fit
    assert not [message for message in told if "attempt" in message]
    assert "for a day 4 rows at once on a device, then more are tried again; a step still trains 8 rows" in story.log


def test_a_file_of_which_not_one_row_fits_is_given_up_and_the_next_is_not_held_to_it(story):
    told = reason(story, "huge")
    assert told["kind"] == "out of memory"
    assert told["why"].endswith("given up after 3 attempts")  # of one row at once
    assert [("attempt" in message) for message in retries(story, "huge")] == [False, True, True]
    assert re.search(r"last\.jsonl: training on [^\n]*\b8 rows at once", story.log)


def test_a_preparer_that_dies_costs_one_attempt_and_a_file_that_kills_it_three(story):
    assert len(retries(story, "unlucky")) == 1
    assert len(retries(story, "unreadable")) == 2
    assert "the preparer died over it" in reason(story, "unreadable")["why"]


def test_the_sentence_before_each_file_stays_true_among_failures(story):
    for file in story.lineage["files"]:
        planned, base = file["planned_steps"], file["base_step"]
        assert f"This file will train for {planned} steps (reaching global step {base + planned})" in story.log
    assert story.global_step == sum(file["done_steps"] for file in story.lineage["files"])


def test_a_worker_that_cannot_start_costs_no_file_an_attempt(story):
    problems = [event["message"] for event in story.events if event["event"] == "problem"]
    assert len(problems) == 1
    assert "the worker cannot start (SIGKILL" in problems[0]
    assert not [told for told in retries(story, "first") if "attempt" in told]


def test_a_file_that_hangs_is_given_up_and_the_next_one_trains(make_lab, torch_hand):
    settings = {"worker.step_timeout_s": 3, "worker.start_timeout_s": 60, "worker.max_attempts": 2}
    lab = make_lab(hand=torch_hand, **settings)
    lab.drop("hanging.jsonl", ROWS)
    lab.drop("next.jsonl", ROWS)
    assert lab.drain(faults=FAULTS[4:]) == 1
    assert reason(lab, "hanging")["kind"] == "hang"
    assert "no progress for 3 s; given up after 2 attempts" in reason(lab, "hanging")["why"]
    assert lab.times_trained("next", ROWS) == {1: ROWS}
    assert [file["name"] for file in lab.lineage["files"]] == ["next.jsonl"]


def test_what_takes_long_and_gets_on_is_no_hang(make_lab, torch_hand):
    """A step of many micro-batches, and a checkpoint whose writing says nothing: each longer than may be silent."""
    settings = {"worker.step_timeout_s": 2.0, "worker.max_attempts": 1, "train.per_device_train_batch_size": 1}
    lab = make_lab(hand=torch_hand, **settings)
    lab.drop("patient.jsonl", 8)  # one step
    slow = {"role": "worker", "nth": 0}
    steps = [{**slow, "at": STEP, "do": "slow"} for _ in range(6)]  # 8 times 0.6 s a step
    assert lab.drain(faults=[*steps, {**slow, "at": "longrun.checkpoint:seal", "do": "write slowly"}]) == 0
    assert lab.times_trained("patient", 8) == {1: 8}
    started, saved = (next(e for e in lab.events if e["event"] == event) for event in ("started", "saved"))
    assert saved["seconds"] > 2.0
    assert datetime.fromisoformat(saved["time"]) - datetime.fromisoformat(started["time"]) > timedelta(seconds=6)


@pytest.mark.parametrize("by_hand", [False, True])
def test_who_waits_for_the_end_hears_of_a_model_that_was_damaged_after_its_last_commit(scripted, by_hand):
    lab = scripted
    faults = [{"at": "longrun.checkpoint:retire", "role": "worker", "when": "after", "do": "damage", "nth": 0}]
    lab.drop("only.jsonl", ROWS)
    if by_hand:
        file = (lab.inbox / "only.jsonl").rename(lab.home / "only.jsonl")
        done = lab.command(str(file), program="train.py", faults=faults)
        assert done.returncode == 1
    else:
        assert lab.drain(faults=faults) == 1
    assert "no checkpoint in it verifies" in lab.log
    assert lab.names("trained") == set()


def test_what_fails_with_every_file_does_not_empty_the_queue_into_rejected(scripted):
    """As of a model that cannot be saved: until something has trained, a second failure tells of what both share."""
    lab = scripted
    lab.configure(**DRILLED | {"worker.max_attempts": 2})
    for name in ("first", "second", "third"):
        lab.drop_rows(name, ROWS)
    assert lab.drain(faults=[{"at": "longrun.checkpoint:seal", "role": "worker", "nth": 0, "do": "kill"}]) == 1
    assert lab.names("rejected") == {"first.jsonl", "first.jsonl.reason.json"}
    assert reason(lab, "first")["fix"] == "the end of logs/worker.log tells more"
    problem = next(event["message"] for event in lab.events if event["event"] == "problem")
    assert "second.jsonl: the worker died (SIGKILL" in problem
    assert (
        "as first.jsonl before it, and nothing was ever trained with this model, these settings and libraries"
        in problem
    )
    assert lab.drain() == 0
    assert lab.names("trained") == {"second.jsonl", "third.jsonl"}
    del lab.dropped[0]
    lab.refused = 1
    lab.check()


def test_a_gpu_that_is_gone_is_waited_for_unless_the_cpu_is_asked_for(scripted):
    lab = scripted
    lab.drop_rows("first", ROWS)
    assert lab.drain() == 0
    with closing(sqlite3.connect(lab.home / "state" / "ledger.sqlite3")) as ledger, ledger:
        ledger.execute("insert into fact values ('device', 'cuda')")
    lab.drop_rows("second", ROWS)
    assert lab.drain() == 1
    assert "paused: worker. this home was trained on a GPU, and now the worker has none" in lab.log
    assert lab.names("rejected") == set()
    lab.configure(**DRILLED | {"train.use_cpu": True})
    assert lab.drain() == 0
    lab.check()


def test_an_optimizer_that_cannot_go_on_from_the_state_of_another_changes_nothing(make_lab, torch_hand):
    lab = make_lab(hand=torch_hand)
    lab.start()
    drop_and_wait(lab, "first")
    lab.configure(**{"train.optim": "adafactor", "inbox.settle_s": 0.3})
    lab.wait_until(lambda: "The former settings stay in force" in lab.log)
    drop_and_wait(lab, "second")
    assert lab.times_trained("second", ROWS) == {1: ROWS}
    assert lab.lineage["optim"] == "adamw_torch_fused"
    assert 'to go on: optim = "adamw_torch_fused" below [train]' in " ".join(lab.status["problems"])


def test_each_worker_that_a_file_kills_counts_until_the_file_is_given_up(tmp_path, hand):
    kill = {"at": "longrun.wire:Channel.send", "role": "worker", "about": "Progress(job=1,", "do": "kill"}
    with closing(Watched(tmp_path / "home", hand=hand, **{"worker.max_attempts": 3})) as lab:
        lab.drop_rows("deadly", ROWS)
        lab.drop_rows("next", ROWS)
        assert lab.drain(faults=[{**kill, "once": f"kill-{number}"} for number in range(5)]) == 1
        assert reason(lab, "deadly")["why"].endswith("given up after 3 attempts")
        assert len(retries(lab, "deadly")) == 2
        assert lab.names("trained") == {"next.jsonl"}


def flip_a_bit(folder):
    path = folder / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_a_bit_of_the_weights(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def remove_a_file(folder):
    (folder / "trainer_state.json").unlink()


def cut_the_manifest(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:100])


DAMAGES = [flip_a_bit, flip_a_bit_of_the_weights, truncate, remove_a_file, cut_the_manifest]


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_gone_on_from(make_lab, torch_hand):
    settings = {"train.save_steps": 1, "train.learning_rate": 1e-3, "train.save_total_limit": 3}
    lab = make_lab(hand=torch_hand, **settings)
    lab.start()
    drop_and_wait(lab, "start")
    for number, damage in enumerate(DAMAGES):
        newest = lab.global_step
        damage(lab.model / f"checkpoint-{newest}")
        name = damage.__name__.replace("_", "")
        drop_and_wait(lab, name)
        # The step of the damaged checkpoint is undone; the next file goes on from the one before it.
        record = lab.lineage["files"][-1]
        assert (record["name"], record["base_step"]) == (f"{name}.jsonl", newest - 1)
        assert lab.times_trained(name, ROWS) == {1: ROWS}
        assert len(lab.names("state/set_aside")) == number + 1
        assert re.search(rf"checkpoint-{newest} is damaged \(.*\); set aside as ", lab.log)
        assert lab.global_step == newest - 1 + 3
        undone = "start" if number == 0 else DAMAGES[number - 1].__name__.replace("_", "")
        assert f"trained here, but not in the model: {undone}.jsonl (1 file, {ROWS} rows)" in lab.log


def drop_and_wait(lab, name):
    lab.drop(f"{name}.jsonl", numbered(name, ROWS))
    lab.wait_until(lambda: f"{name}.jsonl" in lab.names("trained"))
