"""What operators can do to a running Longrun, and what it answers; whatever they do, each row trains once."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest

from longrun import locks
from longrun.home import Home
from tests.drills.daemons import Watched
from tests.lab import LIMIT_S, Lab

STEP = "transformers.trainer:Trainer.training_step"
SETTINGS = {"train.learning_rate": 1e-3, "train.save_steps": 5, "train.logging_steps": 1}
SLOW = [{"at": STEP, "role": "worker", "row": "Say slow", "do": "slow", "nth": 0}]  # a tenth of a second a step


class Operated(Lab):
    """A home whose daemon is started when it does not run."""

    @property
    def free_bytes(self) -> Path:
        return self.probe / "free_bytes"

    def ensure_running(self):
        if not self.daemons or self.daemons[-1].poll() is not None:
            self.start(faults=SLOW, LONGRUN_FREE_BYTES=str(self.free_bytes))
            self.wait_until(lambda: self.note["pid"] == self.daemons[-1].pid)
        return self.daemons[-1]

    def wait_for_steps(self, name, steps):
        """Until that many steps of the file are done."""
        self.wait_until(lambda: (c := self.note["current"]) and c["file"] == name and c["done_steps"] >= steps)

    def wait_trained(self, name):
        self.wait_until(lambda: name in self.names("trained"))

    def rows_received(self, name):
        texts = [text for texts in self.steps_received().values() for text in texts]
        return sorted(int(m[1]) for text in texts if (m := re.search(rf"Say {name}-(\d+)\.", text)))


@pytest.fixture(scope="module")
def lab(tmp_path_factory, torch_hand):
    with closing(Operated(tmp_path_factory.mktemp("operated") / "home", hand=torch_hand, **SETTINGS)) as lab:
        yield lab


def test_a_file_cut_off_by_a_signal_a_pause_and_stops_trains_each_row_once(lab):
    daemon = lab.ensure_running()
    base = lab.global_step
    lab.drop("slow-cut.jsonl", 320)  # forty steps
    lab.wait_for_steps("slow-cut.jsonl", 3)
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(30) == 0
    after_signal = lab.global_step - base
    assert 3 <= after_signal < 40
    assert lab.lineage["in_progress"]["done_steps"] == after_signal == max(lab.steps_received()) + 1 - base

    daemon = lab.ensure_running()
    lab.wait_for_steps("slow-cut.jsonl", after_signal + 2)
    assert lab.command("pause").returncode == 0
    lab.wait_until(lambda: lab.note["state"] == "paused")
    after_pause = lab.global_step - base
    assert after_signal < after_pause < 40
    assert lab.lineage["in_progress"]["done_steps"] == after_pause
    assert lab.command("stop").stdout.endswith("stopped\n")
    assert daemon.wait(30) == 0

    daemon = lab.ensure_running()
    lab.wait_until(lambda: lab.note["state"] == "paused" and lab.note["queue"] == ["slow-cut.jsonl"])
    time.sleep(1)
    assert lab.global_step - base == after_pause
    assert lab.command("resume").returncode == 0
    lab.wait_for_steps("slow-cut.jsonl", after_pause + 2)
    assert lab.command("stop", "--now").returncode == 0
    assert daemon.wait(30) == 0
    assert after_pause <= lab.global_step - base < 40

    lab.ensure_running()
    lab.wait_trained("slow-cut.jsonl")
    assert lab.times_trained("slow-cut", 320) == {0: 1, 1: 319}
    record = lab.lineage["files"][-1]
    assert (record["name"], record["planned_steps"], record["done_steps"]) == ("slow-cut.jsonl", 40, 40)
    assert record["held_out_rows"] == 1


def test_status_answers_while_a_file_trains_and_while_the_daemon_hangs(lab):
    daemon = lab.ensure_running()
    base = lab.global_step
    lab.drop("slow-seen.jsonl", 320)
    lab.drop("waiting.jsonl", 8)
    lab.wait_for_steps("slow-seen.jsonl", 1)
    lab.wait_until(lambda: lab.note["queue"] == ["waiting.jsonl"])
    daemon.send_signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        answer = lab.command("status", "--json")
        assert time.monotonic() - began < 5
        told = json.loads(answer.stdout)
    finally:
        daemon.send_signal(signal.SIGCONT)
    assert answer.returncode == 0
    assert {key: told[key] for key in ("state", "pid", "queue", "problems")} == {
        "state": "training", "pid": daemon.pid, "queue": ["waiting.jsonl"], "problems": [],
    }  # fmt: skip
    for outcome in ("trained", "rejected"):
        assert told[outcome] == len([event for event in lab.events if event["event"] == outcome])
    current = told["current"]
    assert (current["file"], current["base_step"], current["planned_steps"], current["target_step"]) == (
        "slow-seen.jsonl", base, 40, base + 40,
    )  # fmt: skip
    assert 1 <= current["done_steps"] <= 40
    assert told["global_step"] == base + current["done_steps"]
    assert current["eta_s"] >= 0
    assert re.search(r"training +slow-seen\.jsonl: \d+ of 40 steps", lab.command("status").stdout)
    lab.wait_trained("waiting.jsonl")
    assert lab.times_trained("slow-seen", 320) == {0: 1, 1: 319}
    assert lab.times_trained("waiting", 8) == {1: 8}


def test_a_second_program_on_the_same_home_is_refused_naming_the_first(lab, tmp_path):
    daemon = lab.ensure_running()
    before = lab.global_step
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"text": "hello"}) + "\n")
    second = lab.command("run", "--drain")
    by_hand = lab.command(str(file), program="train.py")
    for answer in (second, by_hand):
        assert answer.returncode == 75
        assert f"pid {daemon.pid}" in answer.stderr
    assert lab.global_step == before


def test_the_worker_holds_the_lock_of_the_model_that_it_trains(lab):
    lab.ensure_running()
    lab.drop("slow-held.jsonl", 40)
    lab.wait_for_steps("slow-held.jsonl", 1)
    held = locks.holder(lab.home / "state" / "model.lock")
    assert held is not None
    assert held["pid"] == lab.note["worker_pid"]
    lab.wait_trained("slow-held.jsonl")


def test_a_daemon_waits_until_the_worker_of_the_one_before_is_gone(tmp_path):
    with closing(Watched(tmp_path / "home")) as lab:
        home = Home(lab.home)
        home.make()
        lab.drop_rows("a", 8)
        with locks.Lock.take(home.model_lock, what="former worker"):
            daemon = lab.start("--drain")
            lab.wait_until(lambda: locks.holder(home.daemon_lock))
            time.sleep(1)
            assert (lab.log, daemon.poll()) == ("", None)
        assert daemon.wait(LIMIT_S) == 0
        lab.check()


def test_skip_ends_the_running_file_only_and_retry_trains_it_from_its_first_row(lab):
    lab.ensure_running()
    lab.drop("slow-skipped.jsonl", 160)
    lab.drop("after.jsonl", 24)
    lab.wait_for_steps("slow-skipped.jsonl", 2)
    assert lab.command("skip").returncode == 0
    lab.wait_trained("after.jsonl")
    reason = json.loads((lab.home / "rejected" / "slow-skipped.jsonl.reason.json").read_text())
    assert reason["kind"] == "skipped"
    assert 16 <= len(reason["rows_trained"]) < 160
    assert reason["rows_trained"] == lab.rows_received("slow-skipped")
    assert lab.times_trained("after", 24) == {1: 24}
    skipped, after = lab.lineage["files"][-2:]
    assert (skipped["name"], skipped["outcome"]) == ("slow-skipped.jsonl", "ended early")
    assert after["base_step"] == skipped["base_step"] + skipped["done_steps"]

    assert lab.command("retry", "slow-skipped.jsonl").returncode == 0
    lab.wait_trained("slow-skipped.jsonl")
    assert "slow-skipped.jsonl" not in lab.names("rejected")
    done = len(reason["rows_trained"])
    assert lab.times_trained("slow-skipped", 160) == {1: 160 - done, 2: done}
    assert lab.command("retry", "never-there.jsonl").returncode == 1


def test_a_skip_while_the_worker_starts_again_still_names_the_rows_in_the_model(lab):
    lab.ensure_running()
    lab.drop("slow-again.jsonl", 160)
    lab.wait_for_steps("slow-again.jsonl", 11)  # so that a checkpoint beyond its fifth step is committed
    former = lab.note["worker_pid"]
    os.kill(former, signal.SIGKILL)
    lab.wait_until(lambda: lab.note["worker_pid"] not in (None, former) and lab.note["current"])
    starting = lab.note["worker_pid"]
    os.kill(starting, signal.SIGSTOP)
    assert lab.command("skip").returncode == 0
    lab.wait_until(lambda: lab.names("state/requests") == set())
    os.kill(starting, signal.SIGCONT)
    lab.wait_until(lambda: "slow-again.jsonl" in lab.names("rejected"))
    assert "skip: the training of slow-again.jsonl ends" not in lab.log, "it was started when it was asked"
    lab.drop("and-on.jsonl", 160)
    lab.wait_trained("and-on.jsonl")
    reason = json.loads((lab.home / "rejected" / "slow-again.jsonl.reason.json").read_text())
    assert len(reason["rows_trained"]) >= 40
    assert reason["rows_trained"] == lab.rows_received("slow-again")
    assert lab.times_trained("and-on", 160) == {1: 160}


def test_put_check_and_logs_do_as_they_say(lab, tmp_path):
    lab.ensure_running()
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text("".join(json.dumps({"text": f"Say good-{row:04d}."}) + "\n" for row in range(1, 10)))
    bad.write_text('{"text": "fine"}\n{"text": 7}\n')
    checked = lab.command("check", str(good))
    assert checked.returncode == 0
    target = lab.global_step + 2
    assert f"This file will train for 2 steps (reaching global step {target})" in checked.stdout
    refused = lab.command("check", str(bad))
    assert refused.returncode == 1
    assert "line 2" in refused.stdout
    assert lab.command("put", str(good)).stdout == f"{lab.inbox / 'good.jsonl'}\n"
    lab.wait_trained("good.jsonl")
    assert lab.times_trained("good", 9) == {1: 9}
    assert lab.global_step == target
    assert "good.jsonl is trained: 2 of 2 steps" in lab.command("logs").stdout
    assert good.exists()


@pytest.mark.parametrize("damage", ["cut", "short", "gone"])
def test_rows_that_were_damaged_after_they_were_prepared_are_prepared_again(lab, damage):
    lab.ensure_running()
    lab.command("pause")
    name = f"damaged-{damage}.jsonl"
    lab.drop(name, 24)
    job = lab.wait_until(lambda: [e["job"] for e in lab.events if e["event"] == "prepared" and name in e["message"]])[
        -1
    ]
    rows = lab.home / "state" / "jobs" / f"{job:06}" / "prepared" / "rows.arrow"
    if damage == "cut":
        rows.write_bytes(rows.read_bytes()[:-2000])
    elif damage == "short":
        with pa.OSFile(str(rows), "rb") as file, pa.ipc.open_stream(file) as stream:
            table = stream.read_all()
        with pa.OSFile(str(rows), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table.slice(0, 20))
    else:
        rows.unlink()
    lab.command("resume")
    lab.wait_trained(name)
    assert lab.times_trained(f"damaged-{damage}", 24) == {1: 24}
    assert re.search(rf"{name}: {rows}.*it is prepared again; attempt 1 of 3 failed", lab.log)


def test_a_full_disk_pauses_training_which_goes_on_by_itself(lab):
    lab.ensure_running()
    lab.free_bytes.write_text("1000")
    lab.drop("kept-waiting.jsonl", 24)
    lab.wait_until(lambda: lab.note["state"] == "paused: disk")
    assert lab.note["problems"]
    assert lab.names("trained").isdisjoint({"kept-waiting.jsonl"})
    lab.free_bytes.unlink()
    lab.wait_trained("kept-waiting.jsonl")
    assert lab.times_trained("kept-waiting", 24) == {1: 24}

    told = len(lab.log)
    lab.drop("slow-full.jsonl", 120)
    lab.wait_for_steps("slow-full.jsonl", 1)
    lab.free_bytes.write_text("1000")
    lab.wait_until(lambda: lab.note["state"] == "paused: disk")
    stands = lab.note["global_step"]
    time.sleep(1)
    assert lab.note["global_step"] == stands
    assert "paused: disk" in lab.log[told:]
    lab.free_bytes.unlink()
    lab.wait_trained("slow-full.jsonl")
    lab.wait_until(lambda: lab.note["state"] == "idle")
    assert lab.note["problems"] == []
    assert lab.times_trained("slow-full", 120) == {1: 120}
    assert lab.names("rejected").isdisjoint({"kept-waiting.jsonl", "slow-full.jsonl"})


def test_an_edited_setting_holds_from_the_next_file_on_and_a_broken_one_never(lab):
    lab.ensure_running()
    settings = lab.home / "longrun.toml"
    before = settings.read_text()
    lab.drop("slow-edited.jsonl", 160)
    lab.wait_for_steps("slow-edited.jsonl", 1)
    settings.write_text(before.replace("learning_rate = 0.001", "learning_rate = 0.0005"))
    lab.wait_until(lambda: "from the next file on: train.learning_rate 0.001 -> 0.0005" in lab.log)
    assert "slow-edited.jsonl" not in lab.names("trained")
    lab.drop("edited.jsonl", 24)
    lab.wait_trained("edited.jsonl")
    settings.write_text(before.replace("learning_rate = 0.001", "learning_rat = 0.1"))
    lab.drop("broken.jsonl", 24)
    lab.wait_trained("broken.jsonl")
    lab.wait_until(lambda: any("did you mean learning_rate?" in problem for problem in lab.note["problems"]))
    settings.write_text(before)
    lab.drop("mended.jsonl", 24)
    lab.wait_trained("mended.jsonl")
    lab.wait_until(lambda: lab.note["problems"] == [])

    rates = {}
    for line in (lab.home / "logs" / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        rates.setdefault(entry["global_step"], set()).add(entry.get("learning_rate"))
    files = {file["name"]: file for file in lab.lineage["files"]}
    wanted = {"slow-edited": (160, 1e-3), "edited": (24, 5e-4), "broken": (24, 5e-4), "mended": (24, 1e-3)}
    for name, (rows, rate) in wanted.items():
        file = files[f"{name}.jsonl"]
        assert [rates[step + 1] for step in range(file["base_step"], file["target_step"])] == [{rate}] * (rows // 8)
        assert lab.times_trained(name, rows) == {1: rows}


def test_the_log_is_written_as_edited_settings_say(lab):
    lab.ensure_running()
    settings = lab.home / "longrun.toml"
    before = settings.read_text()
    for form in ("json", "text"):
        settings.write_text(before.replace("[log]", f'[log]\nformat = "{form}"'))
        lab.drop(f"{form}.jsonl", 8)
        lab.wait_trained(f"{form}.jsonl")
        assert lab.log.splitlines()[-1].startswith("{") == (form == "json")
    settings.write_text(before)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"train.learning_rte": 1e-3}, "did you mean learning_rate?"),
        ({"train.max_steps": 100}, "max_steps (longrun.toml) is not a setting: it is computed for every file"),
        ({"model.base_model": "/nowhere/model"}, "cannot load the base model /nowhere/model"),
    ],
)
def test_a_setting_that_cannot_work_ends_the_start_with_the_reason(make_lab, settings, told):
    lab = make_lab(**settings)
    lab.drop("untouched.jsonl", 3)
    began = time.monotonic()
    answer = lab.command("run")
    assert answer.returncode == 78
    assert time.monotonic() - began < 15
    assert told in answer.stderr
    assert "Traceback" not in answer.stderr
    assert lab.names("inbox") == {"untouched.jsonl"}
    assert lab.command("status").returncode == 3


def test_files_trained_by_hand_survive_a_kill_and_leave_the_inbox_alone(make_lab, torch_hand, tmp_path):
    lab = make_lab(hand=torch_hand, **SETTINGS)
    lab.drop("not-mine.jsonl", 8)
    first, second = (lab.drop(f"{name}.jsonl", 96).rename(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
    said = lab.command("--plan", str(first), str(second), program="train.py").stdout
    assert "This file will train for 12 steps (reaching global step 12)" in said
    assert "This file will train for 12 steps (reaching global step 24)" in said
    assert not lab.model.exists()

    faults = [{"at": STEP, "role": "worker", "nth": 8, "do": "kill both", "once": "middle"}]
    assert lab.train(first, second, faults=faults) == -signal.SIGKILL
    said = lab.command("--plan", str(first), str(second), program="train.py").stdout
    left = 12 - lab.lineage["in_progress"]["done_steps"]
    assert f"{first}: the model is in the middle of it, {left} of its steps are left" in said
    assert "This file will train for 12 steps (reaching global step 12)" in said
    assert "This file will train for 12 steps (reaching global step 24)" in said
    assert "after one.jsonl, which is begun and comes first\n" in lab.command("check", str(second)).stdout
    again = [*faults, {"at": STEP, "role": "worker", "row": "Say two-", "nth": 6, "do": "kill both", "once": "second"}]
    assert lab.train(first, second, faults=again) == -signal.SIGKILL
    said = lab.command("--plan", str(first), str(second), program="train.py").stdout
    assert f"{first}: it was trained by this command before it was cut off, and is not trained again" in said
    assert "This file will train for 12 steps (reaching global step 12)" not in said
    assert "This file will train for 12 steps (reaching global step 24)" in said
    assert lab.train(first, second, faults=again) == 0
    assert lab.global_step == 24
    assert lab.times_trained("one", 96) == lab.times_trained("two", 96) == {1: 96}
    assert lab.times_trained("not-mine", 8) == {0: 8}
    assert lab.names("inbox") == {"not-mine.jsonl"}
    assert lab.names("trained") == {"one.jsonl", "two.jsonl"}
    assert first.exists()
    assert second.exists()
    sentences = re.findall(r"This file will train .*", lab.log)
    assert sentences[-3:] == [
        "This file will train for 12 steps (reaching global step 12)",
        "This file will train for 12 steps (reaching global step 24)",
        "This file will train for 12 steps (reaching global step 24)",
    ]
