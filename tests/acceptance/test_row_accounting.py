"""Every row of every file trains exactly `epochs` times, and the numbers that are told are true."""

from __future__ import annotations

import hashlib
import json
import math
import re
from contextlib import closing

import pytest

from tests.lab import Lab

FILES = {"a": 37, "b": 60, "c": 63, "d": 100, "e": 1}
WITH_HELD_OUT = FILES | {"f": 250}


def run(hand, home, files, **settings):
    with closing(Lab(home, hand=hand, **{"train.logging_steps": 1, "worker.prepare_ahead": 3, **settings})) as lab:
        lab.hashes = {}
        for name, rows in files.items():
            dropped = lab.drop(f"{name}.jsonl", rows)
            lab.hashes[name] = hashlib.sha256(dropped.read_bytes()).hexdigest()
        lab.exit_code = lab.drain()
        return lab


@pytest.fixture(scope="module")
def simple(tmp_path_factory, torch_hand):
    """Five files dropped at once, four rows a step."""
    settings = {"train.batch_size": 4, "train.save_steps": 7, "train.save_total_limit": 1000}
    return run(torch_hand, tmp_path_factory.mktemp("simple") / "home", FILES, **settings)


@pytest.fixture(scope="module")
def accumulating(tmp_path_factory, torch_hand):
    """Six files, two epochs of each, twelve rows a step in three parts of four."""
    settings = {"train.num_train_epochs": 2, "train.batch_size": 12, "train.per_device_train_batch_size": 4}
    return run(torch_hand, tmp_path_factory.mktemp("accumulating") / "home", WITH_HELD_OUT, **settings)


def planned(files, epochs, batch, held_out=None):
    rows = {name: count - (held_out or {}).get(name, 0) for name, count in files.items()}
    return {name: math.ceil(epochs * count / batch) for name, count in rows.items()}


def test_every_row_of_five_files_dropped_at_once_is_trained_once(simple):
    assert simple.exit_code == 0
    assert {name: simple.times_trained(name, rows) for name, rows in FILES.items()} == {
        name: {1: rows} for name, rows in FILES.items()
    }
    assert simple.global_step == sum(planned(FILES, 1, 4).values())


def test_every_row_is_trained_as_often_as_there_are_epochs_with_accumulated_steps(accumulating):
    assert accumulating.exit_code == 0
    assert {name: accumulating.times_trained(name, rows) for name, rows in FILES.items()} == {
        name: {2: rows} for name, rows in FILES.items()
    }
    assert accumulating.global_step == sum(planned(WITH_HELD_OUT, 2, 12, {"f": 1}).values())


@pytest.mark.parametrize(("which", "batch"), [("simple", 4), ("accumulating", 12)])
def test_each_step_receives_what_the_lineage_says_of_it(request, which, batch):
    lab = request.getfixturevalue(which)
    received = lab.steps_received()
    assert sorted(received) == list(range(lab.global_step))
    for file in lab.lineage["files"]:
        steps = [received[step] for step in range(file["base_step"], file["target_step"])]
        sizes = [len(texts) for texts in steps]
        assert sizes[:-1] == [batch] * (file["planned_steps"] - 1)
        assert sum(sizes) == file["rows"] * file["epochs"]
        name = file["name"].removesuffix(".jsonl")
        assert all(f"Say {name}-" in text for texts in steps for text in texts)


@pytest.mark.parametrize(
    ("which", "files", "epochs", "batch"), [("simple", FILES, 1, 4), ("accumulating", WITH_HELD_OUT, 2, 12)]
)
def test_lineage_and_log_tell_each_file_truly(request, which, files, epochs, batch):
    lab = request.getfixturevalue(which)
    held_out = {"f": 1}
    wanted = planned(files, epochs, batch, held_out)
    records = lab.lineage["files"]
    assert [(r["name"], r["sha256"], r["epochs"]) for r in records] == [
        (f"{name}.jsonl", lab.hashes[name], epochs) for name in files
    ]
    assert [r["job"] for r in records] == sorted({r["job"] for r in records})
    assert lab.lineage["in_progress"] is None
    assert lab.lineage["global_step"] == lab.global_step
    step, sentences = 0, []
    for name, record in zip(files, records, strict=True):
        kept = held_out.get(name, 0)
        assert (record["rows"], record["held_out_rows"]) == (files[name] - kept, kept)
        assert (record["base_step"], record["planned_steps"]) == (step, wanted[name])
        step += wanted[name]
        assert record["target_step"] == step
        assert record["finished_at"] > "2020"
        assert record["final_loss"] > 0
        sentences.append(f"This file will train for {wanted[name]} steps (reaching global step {step})")
    assert re.findall(r"This file will train .*", lab.log) == sentences
    assert lab.names("trained") == {f"{name}.jsonl" for name in files}
    assert lab.names("inbox") == lab.names("rejected") == lab.names("state/jobs") == set()


def test_checkpoint_numbers_only_grow(simple):
    saved = [event["global_step"] for event in simple.events if event["event"] == "saved"]
    assert saved == sorted(set(saved))
    assert saved[-1] == simple.global_step
    ends = {file["target_step"] for file in simple.lineage["files"]}
    assert set(saved) == ends | set(range(7, simple.global_step, 7))
    assert {f"checkpoint-{step}" for step in saved} <= simple.names("current_model")


def test_the_last_file_learns_at_the_rate_of_the_first_and_no_step_at_zero(simple):
    metrics = [json.loads(line) for line in (simple.home / "logs" / "metrics.jsonl").read_text().splitlines()]
    rates = {line["global_step"]: line["learning_rate"] for line in metrics if "learning_rate" in line}
    assert rates == dict.fromkeys(range(1, simple.global_step + 1), 2e-5)


def test_half_a_percent_of_a_large_file_is_evaluated_and_never_trained(accumulating):
    times = accumulating.times_trained("f", 250)
    assert times == {0: 1, 2: 249}
    record = accumulating.lineage["files"][-1]
    assert record["eval_loss"] > 0
    assert [file["eval_loss"] for file in accumulating.lineage["files"][:-1]] == [None] * 5
    assert f"held-out loss {record['eval_loss']:.4f} over 1 row\n" in accumulating.log
    event = [event for event in accumulating.events if event["event"] == "trained"][-1]
    assert event["eval_loss"] == record["eval_loss"]
