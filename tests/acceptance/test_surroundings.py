"""What people and systems do around a daemon that runs: folders that go, locks that are removed, disks that are far.

The daemon is real, its children are scripted.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from longrun import locks, requests
from longrun.home import Home
from longrun.replacing import alone_with_model
from tests.drills.daemons import SETTINGS, Watched
from tests.lab import REPOSITORY, numbered

STEPS = 10
NO_WATCHER = {"at": "watchdog.observers.api:BaseObserver.start", "role": "daemon", "do": "EMFILE", "nth": 0}


@pytest.fixture
def lab(tmp_path, hand):
    with closing(Watched(tmp_path / "home", hand=hand)) as made:
        yield made


def test_who_waits_to_replace_the_model_has_it_when_a_file_ends_however_many_wait(lab):
    for name in "abcd":
        lab.drop_rows(name, 8 * STEPS)
    daemon = lab.start("--drain", LONGRUN_STEP_S="0.1")
    lab.wait_until(lambda: started(lab))
    with alone_with_model(Home(lab.home), "restore", wait=True, hint=""):
        assert lab.names("trained") == {"a.jsonl"}
        time.sleep(1)
        assert lab.names("trained") == {"a.jsonl"}
        assert sum(event["event"] == "planned" for event in lab.events) == 1
    assert daemon.wait(60) == 0
    assert "the next file waits: restore (pid" in lab.log
    lab.check()


def test_a_daemon_whose_lock_was_removed_as_stale_keeps_others_out(lab):
    daemon = lab.start()
    lab.wait_until_idle()
    (lab.home / "state" / "daemon.lock").unlink()
    lab.wait_until(lambda: locks.holder(lab.home / "state" / "daemon.lock"))
    second = lab.start()
    assert second.wait(60) == 75
    assert lab.status["pid"] == daemon.pid


def test_a_log_and_curves_that_are_removed_cost_nothing(lab):
    lab.start(LONGRUN_STEP_S="0.05")
    lab.drop_rows("a", 8 * STEPS)
    lab.wait_until(lambda: started(lab))
    shutil.rmtree((lab.home / "logs").rename(lab.home / "former-logs"))  # in one step: the daemon writes into it
    lab.wait_until(lambda: "a.jsonl" in lab.names("trained"))
    lab.wait_until(lambda: "a.jsonl is trained" in lab.log)
    assert "attempt" not in lab.log


@pytest.mark.parametrize("deaf", [False, True], ids=["it rings", "nothing rings"])
def test_a_drain_takes_what_comes_until_it_leaves(lab, deaf):
    """A file that came after the last look is looked for before the daemon leaves."""
    lab.configure(**SETTINGS | {"inbox.scan_s": 30.0})
    lab.drop_rows("a", 8 * STEPS)
    daemon = lab.start("--drain", faults=[NO_WATCHER] if deaf else [], LONGRUN_STEP_S="0.1")
    lab.wait_until(lambda: started(lab))
    lab.drop_rows("b", 8)
    assert daemon.wait(60) == 0
    assert ("cannot watch the inbox" in lab.log) == deaf
    lab.check()


def test_a_drain_leaves_an_inbox_that_cannot_be_taken_from(lab):
    lab.drop_rows("a", 8 * STEPS)
    daemon = lab.start("--drain", LONGRUN_STEP_S="0.1")
    lab.wait_until(lambda: started(lab))
    lab.inbox.rmdir()
    lab.inbox.write_text("no folder")
    assert daemon.wait(60) == 1
    assert "cannot take files from" in lab.log
    assert lab.names("trained") == {"a.jsonl"}


def test_the_file_that_is_next_to_train_does_not_wait_for_others_to_be_examined(lab):
    slow = [{"at": "longrun.examine:examine", "role": "preparer", "about": f"big{n}", "do": "slow"} for n in range(9)]
    lab.drop_rows("a", 8)
    for number in range(9):
        lab.drop_rows(f"big{number}", 8)
    assert lab.drain(faults=slow) == 0
    told = [(event["event"], event.get("file", "")) for event in lab.events if event["event"] in ("queued", "planned")]
    assert told.index(("planned", "a.jsonl")) < told.index(("queued", "big8.jsonl"))
    lab.check()


def test_a_file_that_goes_while_it_is_taken_back_ends_nothing(lab):
    lab.drop_rows("a", 8)
    assert lab.drain() == 0
    shutil.rmtree(lab.model)
    lab.command("retry", "--missing")
    gone = lab.home / "trained" / "a.jsonl"
    vanishing = {"at": "longrun.archive:claim_again", "role": "daemon", "do": "take away"}
    lab.start("--drain", faults=[vanishing], LONGRUN_TAKE_AWAY=str(gone)).wait(60)
    assert "a.jsonl cannot be trained again: trained/ does not have its bytes any more" in lab.log
    assert "cannot go on" not in lab.log


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs another file system to copy from")
def test_a_long_copy_from_a_far_inbox_holds_up_nothing(lab, tmp_path):
    """With pieces that take long, as over a slow network: training goes on, and so does obeying."""
    far = Path("/dev/shm") / f"longrun-test-{os.getpid()}"
    far.mkdir()
    try:
        if far.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("it is the same file system")
        lab.drop_rows("a", 8 * STEPS)
        daemon = lab.start(LONGRUN_STEP_S="0.1", faults=[{"at": "os:pread", "role": "daemon", "do": "slow", "nth": 0}])
        lab.wait_until(lambda: started(lab))
        shutil.rmtree(lab.inbox)
        lab.inbox.symlink_to(far)
        (far / "big.jsonl").write_bytes(b'{"text": "x"}\n' * (1 << 20))  # 56 pieces of 256 kB
        lab.wait_until(lambda: list(lab.home.glob("state/jobs/*/claimed/.big.jsonl.*")))
        lab.wait_until(lambda: "a.jsonl" in lab.names("trained"))
        assert list(lab.home.glob("state/jobs/*/claimed/.big.jsonl.*")), "it is still being copied"
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(10) == 0
        assert (lab.names("state/jobs"), (far / "big.jsonl").exists()) == (set(), True)
    finally:
        shutil.rmtree(far)


def test_a_model_that_may_not_be_written_to_keeps_files_waiting(lab):
    """As after a restore by another user: it is nobody's failed attempt."""
    lab.drop_rows("a", 8)
    assert lab.drain() == 0
    lab.drop_rows("b", 8)
    refused = {
        "at": "longrun.checkpoint:OpenModel.commit",
        "role": "worker",
        "do": errno.errorcode[errno.EACCES],
        "nth": 0,
    }
    daemon = lab.start(faults=[refused])
    lab.wait_until(lambda: lab.log.count("paused: disk") >= 1)
    time.sleep(1)
    assert lab.names("rejected") == set()
    lab.kill(daemon)
    assert lab.drain() == 0
    lab.check()


def test_a_model_whose_optimizer_the_settings_in_force_do_not_have_keeps_files_waiting(lab):
    lab.drop_rows("a", 8)
    assert lab.drain() == 0
    kept = shutil.copytree(lab.model, lab.home / "kept")
    shutil.rmtree(lab.model)
    lab.configure(**SETTINGS | {"train.optim": "adafactor"})
    daemon = lab.start()
    lab.drop_rows("b", 8)
    lab.wait_until(lambda: "b.jsonl" in lab.names("trained"))
    shutil.rmtree(lab.model)
    kept.rename(lab.model)
    lab.drop_rows("c", 8)
    lab.wait_until(lambda: "paused: worker. optim is adafactor (longrun.toml), but the current model was" in lab.log)
    assert "Until then no file is trained" in lab.log
    lab.configure(**SETTINGS)
    lab.wait_until(lambda: "c.jsonl" in lab.names("trained"))
    assert [record["name"] for record in lab.lineage["files"]] == ["a.jsonl", "c.jsonl"]
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(60) == 0


def test_a_pause_frees_what_the_worker_holds_though_files_wait(lab):
    lab.configure(**SETTINGS | {"worker.idle_release_minutes": 0.02})
    lab.drop_rows("a", 8 * 5 * STEPS)
    lab.start(LONGRUN_STEP_S="0.1")
    lab.wait_until(lambda: started(lab))
    lab.command("pause")
    lab.wait_until(lambda: "the worker was idle; its memory is released" in lab.log)
    assert lab.status["queue"] == ["a.jsonl"]
    assert lab.status["worker_pid"] is None


def started(lab):
    return any(event["event"] == "started" for event in lab.events)


def requested(lab, name, **facts):
    requests.make(Home(lab.home), name, **facts)


# -- what operators ask


def test_a_skip_for_a_job_that_is_over_does_not_meet_the_next(lab):
    lab.drop_rows("a", 8 * STEPS)
    daemon = lab.start("--drain", LONGRUN_STEP_S="0.1")
    lab.wait_until(lambda: started(lab))
    requested(lab, requests.SKIP, job=7)
    assert daemon.wait(60) == 0
    lab.check()


def test_a_pause_does_not_take_back_a_skip(lab):
    lab.drop_rows("a", 8 * STEPS)
    lab.start(LONGRUN_STEP_S="0.3")
    lab.wait_until(lambda: started(lab))
    requested(lab, requests.SKIP, job=1)
    lab.wait_until(lambda: "skip: the training of a.jsonl ends" in lab.log)
    requested(lab, requests.PAUSE)
    lab.wait_until(lambda: "a.jsonl" in lab.names("rejected"))


def test_a_skip_is_not_forgotten_when_the_disk_refuses_the_checkpoint_that_it_asks_for(lab):
    lab.drop_rows("a", 8 * STEPS)
    lab.start(LONGRUN_STEP_S="0.3", faults=[{"at": "longrun.checkpoint:seal", "role": "worker", "do": "ENOSPC"}])
    lab.wait_until(lambda: started(lab))
    requested(lab, requests.SKIP, job=1)
    lab.wait_until(lambda: "a.jsonl is rejected: skipped by the operator while it failed" in lab.log)
    lab.wait_until(lambda: "paused: disk" in lab.log)
    assert "a.jsonl" in lab.names("rejected")


def test_a_skip_is_not_forgotten_when_it_cannot_be_booked_at_first(lab):
    lab.drop_rows("a", 8 * STEPS)
    refused = {"at": "longrun.ledger:Ledger.move", "role": "daemon", "about": "REJECTED", "do": "ENOSPC"}
    lab.start(LONGRUN_STEP_S="0.3", faults=[refused])
    lab.wait_until(lambda: started(lab))
    requested(lab, requests.SKIP, job=1)
    lab.wait_until(lambda: "a.jsonl is rejected: skipped by the operator" in lab.log)
    assert "paused: disk" in lab.log


def test_a_skip_is_not_forgotten_when_the_worker_of_a_begun_file_does_not_get_ready(lab):
    lab.configure(**SETTINGS | {"worker.start_timeout_s": 2.0})
    lab.drop_rows("a", 8 * STEPS)
    daemon = lab.start(LONGRUN_STEP_S="0.1")
    lab.wait_until(lambda: any(event["event"] == "saved" for event in lab.events))
    lab.kill(daemon)
    lab.start(faults=[{"at": "longrun.wire:connect", "role": "worker", "do": "hang", "once": "hang"}])
    lab.wait_until(lambda: sum(event["event"] == "planned" for event in lab.events) == 2)
    requested(lab, requests.SKIP, job=1)
    lab.wait_until(lambda: "a.jsonl is rejected: skipped by the operator while it failed" in lab.log)
    assert "struck-hang" in lab.names("probe")
    assert "the model has its first " in lab.log


@pytest.mark.parametrize("removed", [False, True])
def test_the_same_files_by_hand_after_a_kill_go_on_where_they_stopped(lab, removed):
    files = [lab.home / f"{name}.jsonl" for name in ("one", "two")]
    for file in files:
        file.write_text("".join(json.dumps(row) + "\n" for row in numbered(file.stem, 8 * STEPS)))
    kill = {"at": "longrun.wire:Channel.send", "role": "worker", "about": f"Progress(job=2, global_step={STEPS + 5},",
            "do": "kill both", "once": "second"}  # fmt: skip
    command = [str(file) for file in files]
    assert lab.command(*command, program="train.py", faults=[kill]).returncode == -signal.SIGKILL
    if removed:
        shutil.rmtree(lab.model)
    assert lab.command(*command, program="train.py").returncode == 0
    twice = "one.jsonl was trained by this command before it was cut off, and is not trained again"
    assert (twice in lab.log) is not removed
    assert sorted(record["name"] for record in lab.lineage["files"]) == ["one.jsonl", "two.jsonl"]
    assert lab.global_step == 2 * STEPS
    assert lab.command(*command, program="train.py").returncode == 0  # that one was at its end: this is another
    assert lab.global_step == 4 * STEPS


def test_a_command_that_a_daemon_has_finished_is_another_when_it_is_typed_again(lab):
    file = lab.home / "one.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in numbered("one", 8 * STEPS)))
    kill = {"at": "longrun.wire:Channel.send", "role": "worker", "about": "Progress(job=1, global_step=5,",
            "do": "kill both", "once": "middle"}  # fmt: skip
    assert lab.command(str(file), program="train.py", faults=[kill]).returncode == -signal.SIGKILL
    assert lab.drain() == 0
    assert lab.global_step == STEPS
    assert lab.command(str(file), program="train.py").returncode == 0
    assert lab.global_step == 2 * STEPS


def test_a_file_that_was_skipped_by_hand_is_not_trained_from_its_first_row_when_the_command_goes_on(lab):
    files = [lab.home / f"{name}.jsonl" for name in ("one", "two")]
    for file in files:
        file.write_text("".join(json.dumps(row) + "\n" for row in numbered(file.stem, 8 * STEPS)))
    command = [sys.executable, str(REPOSITORY / "train.py"), *map(str, files), "--home", str(lab.home)]
    kill = {"at": "longrun.wire:Channel.send", "role": "worker", "about": "Progress(job=2,", "do": "kill both"}
    by_hand = subprocess.Popen(command, env=lab.environment([kill], LONGRUN_STEP_S="0.3"), stderr=subprocess.DEVNULL)
    lab.wait_until(lambda: started(lab))
    requested(lab, requests.SKIP, job=1)
    assert by_hand.wait(60) == -signal.SIGKILL
    assert lab.names("rejected") == {"one.jsonl", "one.jsonl.reason.json"}
    assert lab.command(*map(str, files), program="train.py").returncode == 1
    assert "one.jsonl was skipped in this command before it was cut off, and is not trained again" in lab.log
    assert [record["name"] for record in lab.lineage["files"] if record["outcome"] == "trained"] == ["two.jsonl"]


def test_who_leaves_at_once_says_what_is_lost_and_what_is_gone_on_with(lab):
    lab.drop_rows("a", 8 * 2 * STEPS)
    daemon = lab.start(LONGRUN_STEP_S="0.1")
    lab.wait_until(lambda: any(event["event"] == "saved" for event in lab.events))
    lab.command("stop", "--now")
    assert daemon.wait(60) == 0
    assert "leaving without a checkpoint: the steps of a.jsonl since global step " in lab.log
    assert "at the next step boundary" not in lab.log
    assert (lab.status["queued"], lab.status["queue"]) == (1, ["a.jsonl"])
    assert lab.drain() == 0
    lab.check()


def test_train_py_that_was_told_to_leave_says_that_the_file_is_not_trained(lab):
    file = lab.home / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in numbered("a", 8 * STEPS)))
    command = [sys.executable, str(REPOSITORY / "train.py"), str(file), "--home", str(lab.home)]
    by_hand = subprocess.Popen(command, env=lab.environment(LONGRUN_STEP_S="0.1"), stderr=subprocess.DEVNULL)
    lab.wait_until(lambda: started(lab))
    by_hand.send_signal(signal.SIGTERM)
    assert by_hand.wait(60) == 1
    assert lab.command(str(file), program="train.py").returncode == 0
    lab.dropped.append(8 * STEPS)
    lab.check()


def test_what_is_kept_for_a_while_goes_and_only_by_when_it_was_put_away(lab):
    lab.drop_rows("a", 8)
    assert lab.drain() == 0
    time.sleep(1)
    lab.configure(**SETTINGS | {"inbox.keep_days": 0.9 / 86_400})
    lab.drop_rows("b", 8)
    os.utime(lab.inbox / "b.jsonl", (0, 0))  # as mv and rsync leave it
    assert lab.drain() == 0
    assert lab.names("trained") == {"b.jsonl"}


# -- children


def test_a_file_that_gets_further_with_each_attempt_is_not_given_up(lab):
    lab.configure(**SETTINGS | {"worker.max_attempts": 2})
    lab.drop_rows("a", 8 * 2 * STEPS)
    kills = [
        {"at": "longrun.wire:Channel.send", "role": "worker", "do": "kill", "once": f"at-{step}",
         "about": f"Progress(job=1, global_step={step},"}
        for step in (5, 9, 13, 17)
    ]  # fmt: skip
    assert lab.drain(faults=kills) == 0
    assert lab.names("probe") >= {f"struck-{kill['once']}" for kill in kills}
    lab.check()


def test_attempts_before_something_new_was_saved_do_not_count_when_the_daemon_has_started_again(lab):
    lab.configure(**SETTINGS | {"worker.max_attempts": 2})
    lab.drop_rows("a", 8 * 2 * STEPS)
    kills = [
        {"at": "longrun.wire:Channel.send", "role": "worker", "do": do, "once": f"{do} {step}",
         "about": f"Progress(job=1, global_step={step},"}
        for step, do in ((2, "kill"), (8, "kill both"), (7, "kill"))
    ]  # fmt: skip
    assert lab.drain(faults=kills[:2]) == -signal.SIGKILL
    assert lab.drain(faults=kills[2:]) == 0
    assert lab.names("probe") >= {f"struck-{kill['once']}" for kill in kills}
    lab.check()


def test_settings_that_nothing_was_trained_with_yet_are_not_trusted_for_what_an_earlier_file_saves(lab):
    lab.configure(**SETTINGS | {"worker.max_attempts": 2})
    lab.drop_rows("a", 8 * STEPS)
    kill = {"at": "longrun.wire:Channel.send", "role": "worker", "do": "kill", "nth": 0}
    daemon = lab.start(
        "--drain", LONGRUN_STEP_S="0.3", faults=[{**kill, "about": f"Progress(job={job},"} for job in (2, 3)]
    )
    lab.wait_until(lambda: started(lab))
    lab.configure(**SETTINGS | {"worker.max_attempts": 2, "train.gradient_checkpointing": True})
    lab.wait_until(lambda: "from the next file on: train.gradient_checkpointing False -> True" in lab.log)
    for name in ("b", "c"):
        lab.drop_rows(name, 8)
    assert daemon.wait(60) == 1
    assert lab.names("trained") == {"a.jsonl"}
    assert lab.names("rejected") == {"b.jsonl", "b.jsonl.reason.json"}
    assert "as b.jsonl before it, and nothing was ever trained with this model, these settings" in lab.log


@pytest.mark.parametrize("role", ["worker", "preparer"])
def test_a_child_that_hangs_before_its_first_word_is_noticed(lab, role):
    lab.configure(**SETTINGS | {"worker.start_timeout_s": 2.0, "worker.step_timeout_s": 2.0})
    lab.drop_rows("a", 8)
    assert lab.drain(faults=[{"at": "longrun.wire:connect", "role": role, "do": "hang", "once": "hang"}]) == 0
    assert "struck-hang" in lab.names("probe")
    lab.check()


def test_a_preparer_that_hangs_over_a_file_costs_it_an_attempt(lab):
    lab.configure(**SETTINGS | {"worker.start_timeout_s": 2.0, "worker.step_timeout_s": 2.0})
    lab.drop_rows("a", 8)
    assert lab.drain(faults=[{"at": "longrun.examine:examine", "role": "preparer", "do": "hang", "once": "hang"}]) == 0
    assert "the preparer died over it (no progress for 2 s); attempt 1 failed" in lab.log
    lab.check()


@pytest.mark.parametrize("at", ["longrun.examine:examine", "longrun.disk:sync_tree"])
def test_a_preparer_that_dies_over_every_file_costs_the_queue_one_of_them(lab, at):
    for name in "abc":
        lab.drop_rows(name, 8)
    assert lab.drain(faults=[{"at": at, "role": "preparer", "do": "kill", "nth": 0}]) == 1
    assert lab.names("rejected") == {"a.jsonl", "a.jsonl.reason.json"}
    assert "paused: worker. b.jsonl: the preparer died over it (SIGKILL" in lab.log
    assert "3 times, as a.jsonl before it, and nothing was ever prepared with this model and these libraries" in lab.log
    assert lab.drain() == 0
    assert lab.names("trained") == {"b.jsonl", "c.jsonl"}
    lab.check_published_rows()


def test_a_file_that_the_preparer_dies_over_is_at_fault_itself_where_others_were_prepared(lab):
    lab.drop_rows("before", 8)
    assert lab.drain() == 0
    for name in ("poison", "poison-too", "after"):
        lab.drop_rows(name, 8)
    kill = {"at": "longrun.examine:examine", "role": "preparer", "do": "kill", "about": "poison", "nth": 0}
    assert lab.drain(faults=[kill]) == 1
    assert {name for name in lab.names("rejected") if name.endswith("jsonl")} == {"poison.jsonl", "poison-too.jsonl"}
    assert "after.jsonl" in lab.names("trained")


def test_tokens_that_the_model_has_not_cost_the_queue_one_file(lab):
    for name in "ab":
        lab.drop_rows(f"beyond-{name}", 8)
    lab.drop_rows("c", 8)
    assert lab.drain() == 1
    assert lab.names("rejected") == {"beyond-a.jsonl", "beyond-a.jsonl.reason.json"}
    assert "paused: worker. beyond-b.jsonl: its rows have the token '<extra>' (9)" in lab.log
    assert "as beyond-a.jsonl before it, and nothing was ever trained" in lab.log


def test_a_model_whose_losses_of_micro_batches_do_not_add_up_is_told_of(lab):
    lab.drop_rows("uneven", 8)
    lab.drop_rows("a", 8)
    assert lab.drain() == 0
    assert "uneven.jsonl: micro-batches of 1 row count the same in a step" in lab.log
    assert "a.jsonl: micro-batches" not in lab.log
    lab.check()


def test_a_preparer_that_cannot_start_is_a_problem_and_no_files_fault(lab):
    lab.drop_rows("a", 8)
    kills = [{"at": "longrun.wire:connect", "role": "preparer", "do": "kill", "once": f"kill-{n}"} for n in range(3)]
    assert lab.drain(faults=kills) == 0
    assert "paused: worker. the preparer cannot start (SIGKILL" in lab.log
    lab.check()


# -- what is waited with


def test_a_waiting_file_that_somebody_deleted_is_over_and_the_next_trains(lab):
    lab.command("pause")
    daemon = lab.start()
    for name in "ab":
        lab.drop_rows(name, 8)
    lab.wait_until(lambda: len(lab.names("state/jobs")) == 2 and lab.note["queued"] == 2)
    (claimed,) = lab.home.glob("state/jobs/*/claimed/a.jsonl")
    claimed.unlink()
    lab.command("resume")
    lab.wait_until(lambda: "b.jsonl" in lab.names("trained"))
    assert "a.jsonl is rejected: its file is gone from state/jobs/. Fix: drop it again\n" in lab.log
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(60) == 0


def test_a_begun_file_that_would_mean_other_rows_now_is_not_gone_on_with(lab):
    lab.drop_rows("a", 8 * STEPS)
    daemon = lab.start(LONGRUN_STEP_S="0.1")
    lab.wait_until(lambda: any(event["event"] == "saved" for event in lab.events))
    lab.kill(daemon)
    (facts,) = lab.home.glob("state/jobs/*/prepared/facts.json")
    told = json.loads(facts.read_text())
    facts.write_text(json.dumps({**told, "trainable_rows": told["trainable_rows"] + 1}))
    assert lab.drain() == 1
    assert "it was begun with 80 trainable rows, and prepared again it has 81" in lab.log
