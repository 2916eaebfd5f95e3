"""SIGKILL in every phase of a file's life: no row lost, none twice, and the weights of a run that was never broken."""

from __future__ import annotations

import time
from contextlib import closing

import pytest

from tests.lab import Lab

FILES = {"a": 37, "b": 60, "c": 63, "d": 100, "e": 1}
STEP = "transformers.trainer:Trainer.training_step"

# Where each file's run is hit, in about the order of its life. "kill both" takes the worker and its daemon.
KILLS = {
    "between two claims": {"at": "longrun.inbox:Inbox._take", "role": "daemon", "nth": 2},
    "claimed, not synced": {"at": "longrun.inbox:_make_durable", "role": "daemon", "about": "claimed"},
    "claimed, not recorded": {"at": "longrun.ledger:Ledger.claim", "role": "daemon", "about": "claimed"},
    "examined": {"at": "longrun.examine:examine", "role": "preparer", "when": "after"},
    "preparing": {"at": "longrun.training.prepare:_to_batch", "role": "preparer"},
    "prepared, not renamed": {"at": "longrun.disk:rename", "role": "preparer", "do": "kill both"},
    "planned, not sent": {"at": "longrun.runs:Runs._message", "role": "daemon", "when": "after"},
    "first commit": {"at": "longrun.checkpoint:OpenModel._found", "role": "worker"},
    "first commit, half done": {"at": "longrun.disk:rename", "role": "worker", "about": "staging/model"},
    "mid-file, worker": {"at": STEP, "role": "worker", "row": "Say a-0030."},
    "mid-file, daemon": {"at": STEP, "role": "worker", "row": "Say b-0010.", "do": "kill daemon"},
    "mid-file, both": {"at": STEP, "role": "worker", "row": "Say b-0050.", "do": "kill both"},
    "sealing": {"at": "longrun.checkpoint:seal", "role": "worker", "about": "global_step=39"},
    "sealed": {"at": "longrun.checkpoint:seal", "role": "worker", "about": "global_step=42", "when": "after"},
    "sealed, both": {
        "at": "longrun.checkpoint:seal", "role": "worker", "about": "global_step=45",
        "when": "after", "do": "kill both",
    },
    "committing": {"at": "longrun.disk:rename_into", "role": "worker", "about": "checkpoint-48"},
    "publishing, both": {
        "at": "longrun.checkpoint:publish", "role": "worker", "about": "checkpoint-51", "do": "kill both",
    },
    "publishing": {"at": "longrun.checkpoint:_place", "role": "worker", "about": "checkpoint-54/trainer_state.json"},
    "retiring": {"at": "longrun.checkpoint:retire", "role": "worker", "nth": 2},
    "committed, not booked": {"at": "longrun.context:Context._finish", "role": "daemon", "about": "c.jsonl"},
    "booked, not archived": {"at": "longrun.archive:put_away", "role": "daemon", "about": "e.jsonl"},
    "archived, not told": {
        "at": "longrun.archive:put_away", "role": "daemon", "about": "e.jsonl", "when": "after",
    },
    "being archived": {"at": "longrun.disk:rename", "role": "daemon", "about": "trained/d.jsonl"},
}  # fmt: skip


@pytest.fixture(scope="module")
def settings(dropout_model):
    return {
        "base_model": dropout_model,
        "train.learning_rate": 1e-3,
        "train.batch_size": 4,
        "train.save_steps": 3,
        "worker.max_attempts": 100,
    }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, torch_hand, settings):
    with closing(Lab(tmp_path_factory.mktemp("unbroken") / "home", hand=torch_hand, **settings)) as lab:
        for name, rows in FILES.items():
            lab.drop(f"{name}.jsonl", rows)
        assert lab.drain() == 0
        yield lab


def test_a_kill_in_every_phase_loses_no_row_and_changes_no_bit(unbroken, make_lab, torch_hand, settings):
    lab = make_lab("killed", hand=torch_hand, **settings)
    killed_while_settling(lab)
    faults = [{"do": "kill", "once": name.replace(" ", "-"), **fault} for name, fault in KILLS.items()]
    starts = 1
    while (code := lab.drain(faults=faults)) < 0:
        starts += 1
        assert starts < 3 * len(KILLS), lab.log
    assert code == 0

    struck = {path.name.removeprefix("struck-") for path in lab.probe.glob("struck-*")}
    assert struck == {fault["once"] for fault in faults}
    assert {name: lab.times_trained(name, rows) for name, rows in FILES.items()} == {
        name: {1: rows} for name, rows in FILES.items()
    }
    assert lab.names("trained") == {f"{name}.jsonl" for name in FILES}
    assert lab.names("inbox") == lab.names("rejected") == lab.names("state/jobs") == set()
    assert lab.steps_received() == unbroken.steps_received()
    assert lab.weights() == unbroken.weights()
    assert not lab.names("state/set_aside")


def killed_while_settling(lab):
    settings = lab.home / "longrun.toml"
    before = settings.read_text()
    settings.write_text(before.replace("settle_s = 0.3", "settle_s = 60"))
    daemon = lab.start()
    lab.wait_until(lambda: "Longrun watches" in lab.log)
    for name, rows in FILES.items():
        lab.drop(f"{name}.jsonl", rows)
    time.sleep(0.1)
    lab.kill(daemon)
    assert lab.names("inbox") == {f"{name}.jsonl" for name in FILES}
    settings.write_text(before)
