from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from longrun import commands, disk, locks, requests, status
from longrun.errors import BadConfig, Locked, LongrunError, NotRunning
from longrun.home import Home
from longrun.job import JobState
from longrun.ledger import Ledger
from longrun.lineage import InProgress, Lineage
from tests.unit.builders import add_checkpoint, job, lineage_at, plan_of

if TYPE_CHECKING:
    from pathlib import Path

    from longrun.plan import Plan


GOOD = b'{"text": "a"}\n' * 16
CURRENT = {
    "file": "evil\n.jsonl",
    "job": 7,
    "base_step": 10,
    "planned_steps": 4,
    "target_step": 14,
    "done_steps": 1,
    "eta_s": 3.2,
}


def note(home: Home, **facts: Any) -> None:
    pid = (locks.holder(home.daemon_lock) or {}).get("pid")
    known = {"state": "idle", "pid": pid, "current": None, "queued": 0, "queue": [], "problems": []}
    status.write(home, known | facts)


def begin(home: Home) -> Plan:
    """A model in the middle of job 4, at global step 7, whose file waits to be gone on with."""
    home.id_file.write_text("this home")
    plan = replace(plan_of(80, base_step=5, job=4, home="this home"), name="begun.jsonl")
    begun = InProgress(plan=plan, done_steps=2, loss_sum=0.0, last_loss=None)
    home.model.mkdir()
    (home.model / "lineage.json").write_text(Lineage(lineage="l", base_model="tiny").at(begun).to_json())
    (home.model / "trainer_state.json").write_text('{"global_step": 7}')
    home.claimed(4).mkdir(parents=True)
    (home.claimed(4) / "begun.jsonl").write_bytes(GOOD)
    return plan


# -- status


def test_status_of_a_stopped_daemon_has_its_exit_code(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.show_status(home, as_json=False) == 3
    assert capsys.readouterr().out.split("\n", 1)[1].startswith("state        stopped\nglobal step  0\n")
    assert commands.show_status(home, as_json=True) == 3
    assert json.loads(capsys.readouterr().out)["state"] == "stopped"


@pytest.mark.usefixtures("daemon")
def test_status_tells_what_is_being_trained(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{number}.jsonl" for number in range(6)]
    told: dict[str, Any] = {
        "being_written": ["w.jsonl"],
        "settling": ["s.jsonl", "w.jsonl", *names],
        "left": ["notes.txt"],
        "problems": ["paused: disk"],
        "rejected": 2,
    }
    note(home, state="training", global_step=11, current=CURRENT, queue=names, queued=6, **told)
    (home.rejected / "x.jsonl.reason.json").write_bytes(b"{}")  # the other one was dropped again
    assert commands.show_status(home, as_json=False) == 0
    shown = capsys.readouterr().out
    for line in (
        "global step  11\n",
        r"training     evil\n.jsonl: 1 of 4 steps, 3 s left" + "\n             from global step 10 to 14\n",
        "queue        6: 0.jsonl, 1.jsonl, 2.jsonl, 3.jsonl, 4.jsonl, ...\n",
        "             inbox/w.jsonl is still being written\n",
        "             inbox/2.jsonl arrives\n             and more of these\n             inbox/notes.txt",
        "rejected     1  (rejected/*.reason.json say why)\n",
        "problem      paused: disk\n",
    ):
        assert line in shown


@pytest.mark.usefixtures("daemon")
def test_status_says_when_the_daemon_may_hang(
    home: Home, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    note(home)
    later = status.time.time() + 99
    monkeypatch.setattr(status.time, "time", lambda: later)
    commands.show_status(home, as_json=False)
    assert "has not answered for 99 s: it may hang" in capsys.readouterr().out


def test_the_step_of_a_stopped_daemon_is_that_of_the_model(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    note(home, state="training", global_step=99, current=CURRENT)
    home.model.mkdir()
    (home.model / "trainer_state.json").write_text('{"global_step": 50}')
    commands.show_status(home, as_json=True)
    assert json.loads(capsys.readouterr().out)["global_step"] == 50


def test_status_names_the_base_model_of_the_model_that_is_there(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    commands.show_status(home, as_json=True)
    assert json.loads(capsys.readouterr().out)["base_model"] is None
    add_checkpoint(home, 5)
    commands.show_status(home, as_json=False)
    assert "global step  5\nbase model   tiny\n" in capsys.readouterr().out
    (home.model / "lineage.json").write_text("[")
    commands.show_status(home, as_json=True)
    assert json.loads(capsys.readouterr().out)["base_model"] is None


def test_status_says_how_much_of_a_file_that_was_cut_off_is_in_the_model(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(home)
    commands.show_status(home, as_json=False)
    assert "begun        begun.jsonl: 2 of 10 steps are in the model, and the rest" in capsys.readouterr().out
    commands.show_status(home, as_json=True)
    begun = json.loads(capsys.readouterr().out)["begun"]
    assert begun == {"file": "begun.jsonl", "done_steps": 2, "planned_steps": 10}
    home.id_file.write_text("another home")
    commands.show_status(home, as_json=True)
    assert json.loads(capsys.readouterr().out)["begun"] is None
    home.id_file.write_text("this home")
    disk.remove_tree(home.job(4), home.staging)
    commands.show_status(home, as_json=True)
    assert json.loads(capsys.readouterr().out)["begun"] is None


@pytest.mark.usefixtures("daemon")
def test_status_says_what_to_do_about_a_pause_and_what_the_first_minute_is_for(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    note(home, state="paused")
    commands.show_status(home, as_json=False)
    assert f"state        paused (pid {os.getpid()}): by the operator; `daemon.py resume`" in capsys.readouterr().out
    note(home, state="training", current=CURRENT | {"started": False})
    commands.show_status(home, as_json=False)
    assert "1 of 4 steps, 3 s left, the model is being loaded\n" in capsys.readouterr().out


def test_status_of_no_daemon_says_what_may_not_be_expected(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    commands.pause(home)
    commands.show_status(home, as_json=False)
    assert "stopped: the next daemon will start paused, until `daemon.py resume`" in capsys.readouterr().out
    disk.remove_tree(home.state, home.root / "trash")
    commands.show_status(home, as_json=False)
    assert "stopped: no daemon has ever run here; --home or LONGRUN_HOME names" in capsys.readouterr().out
    with pytest.raises(BadConfig, match="there is no such folder"):
        commands.show_status(Home(home.root / "mistyped"), as_json=False)


# -- requests


def test_pause_works_before_any_daemon_has_run(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    disk.remove_tree(home.state, home.root / "trash")
    assert commands.pause(home) == 0
    assert "the next one will start paused" in capsys.readouterr().out
    assert requests.pending(home, requests.PAUSE) is not None


@pytest.mark.usefixtures("daemon")
def test_pause_and_resume_are_told_apart(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    commands.pause(home)
    assert "pausing at the next step boundary" in capsys.readouterr().out
    assert [commands.resume(home), commands.resume(home)] == [0, 0]
    assert capsys.readouterr().out == "training goes on\nit was not paused\n"


def test_resume_without_a_daemon_promises_no_training_now(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    commands.pause(home)
    commands.resume(home)
    assert capsys.readouterr().out.endswith("the next daemon will train\n")


@pytest.mark.parametrize("now", [False, True])
def test_stop_waits_until_the_daemon_has_left(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], now: bool
) -> None:
    lock = locks.Lock.take(home.daemon_lock, what="x")
    monkeypatch.setattr(time, "sleep", lambda _: lock.release())
    assert commands.stop(home, now=now) == 0
    assert (requests.pending(home, requests.STOP) or {})["now"] is now
    assert capsys.readouterr().out.endswith("stopped\n")


def test_what_needs_a_daemon_says_that_there_is_none(home: Home) -> None:
    for command in (lambda: commands.stop(home, now=False), lambda: commands.skip(home)):
        with pytest.raises(NotRunning, match=r"no daemon runs on .* start it with"):
            command()


@pytest.mark.usefixtures("daemon")
def test_skip_names_the_job_it_is_for(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    note(home)
    with pytest.raises(LongrunError, match="no file is being trained"):
        commands.skip(home)
    note(home, current=CURRENT)
    assert commands.skip(home) == 0
    assert (requests.pending(home, requests.SKIP) or {})["job"] == 7
    assert r"skipping evil\n.jsonl" in capsys.readouterr().out


# -- what is missing

NOW = "2026-01-02T03:04:05.678+00:00"


@pytest.fixture
def model_lost(home: Home) -> Home:
    """Two files were trained here, then the model was deleted; the second one's bytes have changed since."""
    home.id_file.write_text("1" * 32)
    lineage, jobs = lineage_at(0), []
    for number, name in enumerate(("evil\n.jsonl", "b.jsonl"), start=1):
        (home.trained / name).write_bytes(GOOD)
        sha256 = disk.hash_file(home.trained / name) if number == 1 else "b"
        plan = replace(plan_of(16, base_step=lineage.global_step, job=number, home=home.id), sha256=sha256)
        progress = InProgress(plan=plan, done_steps=2, loss_sum=1.0, last_loss=1.0)
        lineage = lineage.ended(progress, outcome="trained", finished_at=NOW, eval_loss=None)
        facts: dict[str, Any] = {"name": name, "sha256": sha256, "rows": 16}
        jobs.append(job(number, JobState.TRAINED, record=lineage.files[-1].to_json(), **facts))
    with contextlib.closing(Ledger.open(home.ledger)) as ledger:
        ledger.claim(jobs)
    return home


def test_status_of_a_stopped_daemon_sees_what_the_model_lost_since(
    model_lost: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    note(model_lost, missing=[], missing_files=0)
    commands.show_status(model_lost, as_json=False)
    line = r"missing      2: evil\n.jsonl, b.jsonl (trained here, but not in the model; `daemon.py missing` tells more)"
    assert line in capsys.readouterr().out.splitlines()
    commands.show_status(model_lost, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["missing"], told["missing_files"]) == (["evil\n.jsonl", "b.jsonl"], 2)


@pytest.mark.usefixtures("daemon")
def test_a_running_daemon_is_believed_about_what_is_missing(
    model_lost: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{number}.jsonl" for number in range(6)]
    note(model_lost, missing=names, missing_files=6)
    commands.show_status(model_lost, as_json=False)
    assert "missing      6: 0.jsonl, 1.jsonl, 2.jsonl, 3.jsonl, 4.jsonl, ... (" in capsys.readouterr().out


def test_a_ledger_that_cannot_be_read_leaves_status_with_its_note(
    model_lost: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    note(model_lost, missing=["x.jsonl"], missing_files=1)
    model_lost.ledger.write_bytes(b"no database" * 99)
    assert commands.show_status(model_lost, as_json=True) == 3
    assert json.loads(capsys.readouterr().out)["missing"] == ["x.jsonl"]
    with pytest.raises(LongrunError, match="cannot read the ledger"):
        commands.show_missing(model_lost, as_json=False)


def test_missing_files_are_listed_with_rows_steps_and_place(
    model_lost: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.show_missing(model_lost, as_json=False) == 0
    gone = "nowhere: trained/b.jsonl has other bytes by now"
    assert capsys.readouterr().out.splitlines() == [
        "  job  file             rows          steps  trained (UTC)        where it is now",
        r"    1  evil\n.jsonl       16            1-2  2026-01-02 03:04:05  trained/evil\n.jsonl",
        f"    2  b.jsonl            16            3-4  2026-01-02 03:04:05  {gone}",
        "`daemon.py retry --missing` trains them again, in this order",
        "`backup_manager.py list` shows what can be restored",
    ]
    assert commands.show_missing(model_lost, as_json=True) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["job"], first["name"], first["rows"], first["file"]) == (
        1, "evil\n.jsonl", 16, "trained/evil\n.jsonl",
    )  # fmt: skip
    assert (second["base_step"], second["target_step"], second["finished_at"], second["file"]) == (2, 4, NOW, None)


def test_a_file_in_the_middle_of_which_the_model_is_says_how_far(
    model_lost: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    sha256 = disk.hash_file(model_lost.trained / "b.jsonl")
    plan = replace(plan_of(16, job=1, home=model_lost.id), sha256=sha256)
    middle = lineage_at(0).at(InProgress(plan=plan, done_steps=1, loss_sum=1.0, last_loss=1.0))
    model_lost.model.mkdir()
    (model_lost.model / "lineage.json").write_text(middle.to_json())
    commands.show_missing(model_lost, as_json=False)
    assert r"trained/evil\n.jsonl; the model has its first 1 of 2 steps" in capsys.readouterr().out
    commands.retry_missing(model_lost)
    assert r"    evil\n.jsonl (16 rows, from step 2 of it)" in capsys.readouterr().out


def test_nothing_missing_is_said_and_asks_for_nothing(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    assert [commands.show_missing(home, as_json=False), commands.retry_missing(home)] == [0, 0]
    assert capsys.readouterr().out == f"{commands.NOTHING_MISSING}\n" * 2
    assert requests.pending(home, requests.RETRY) is None


def test_retrying_what_is_missing_asks_for_the_jobs_whose_bytes_are_there(
    model_lost: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.retry_missing(model_lost) == 1
    assert capsys.readouterr().out.splitlines() == [
        "1 will train again, by the next daemon, in this order:",
        r"    evil\n.jsonl (16 rows)",
        "b.jsonl cannot be trained again: trained/b.jsonl has other bytes by now",
    ]
    assert (requests.pending(model_lost, requests.RETRY) or {})["jobs"] == [1]


@pytest.mark.usefixtures("daemon")
def test_only_files_that_are_gone_ask_for_nothing(model_lost: Home, capsys: pytest.CaptureFixture[str]) -> None:
    (model_lost.trained / "b.jsonl").unlink()
    assert commands.retry_missing(model_lost) == 1
    assert "1 will train again, in this order:" in capsys.readouterr().out
    requests.clear(model_lost, requests.RETRY)
    (model_lost.trained / "evil\n.jsonl").unlink()
    assert commands.retry_missing(model_lost) == 1
    assert capsys.readouterr().out.splitlines() == [
        r"evil\n.jsonl cannot be trained again: it is gone from trained/",
        "b.jsonl cannot be trained again: it is gone from trained/",
    ]
    assert requests.pending(model_lost, requests.RETRY) is None


# -- files


def test_retry_tells_the_names_there_are(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LongrunError, match="rejected: nothing"):
        commands.retry(home, ["x.jsonl"])
    (home.rejected / "y.jsonl").write_bytes(GOOD)
    (home.rejected / "y.jsonl.reason.json").write_bytes(b"{}")
    with pytest.raises(LongrunError, match=r"cannot retry x.jsonl: .* rejected: y.jsonl$"):
        commands.retry(home, ["x.jsonl"])
    assert commands.retry(home, ["y.jsonl"]) == 0
    assert capsys.readouterr().out == "inbox/y.jsonl will train from its first row\n"


def test_retry_takes_many_names_and_those_of_their_reasons(home: Home) -> None:
    for name in ("x", "y"):
        (home.rejected / f"{name}.jsonl").write_bytes(GOOD)
        (home.rejected / f"{name}.jsonl.reason.json").write_bytes(b"{}")
    assert commands.retry(home, ["rejected/x.jsonl", "rejected/y.jsonl.reason.json"]) == 0
    assert sorted(path.name for path in home.inbox.iterdir()) == ["x.jsonl", "y.jsonl"]
    assert list(home.rejected.iterdir()) == []


def test_a_reset_keeps_a_backup_and_says_how_to_have_the_model_back(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    add_checkpoint(home, 3)
    assert commands.reset(home, {}, yes=True) == 0
    told = capsys.readouterr().out
    assert not home.model.exists()
    (kept,) = (home.root / "backups" / "backups").iterdir()
    assert f"backup {kept.name} is verified; the model is removed" in told
    assert f"restore {kept.name} --home {home.root}" in told
    assert "grew from" not in told


def test_a_reset_says_when_the_next_model_would_begin_from_another_base_model(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    add_checkpoint(home, 3)
    assert commands.reset(home, {"model.base_model": "some/other"}, yes=True) == 0
    told = capsys.readouterr().out
    assert "it grew from tiny, and the settings name some/other: to begin from tiny again, set base_model" in told


def test_a_model_that_does_not_tell_what_it_grew_from_is_reset_all_the_same(
    home: Home, capsys: pytest.CaptureFixture[str]
) -> None:
    add_checkpoint(home, 3)
    (home.model / "lineage.json").unlink()
    (home.model / "lineage.json").write_bytes(b"{")
    assert commands.reset(home, {}, yes=True) == 0
    told = capsys.readouterr().out
    assert "the model was INCOMPLETE, and is stored as it was" in told
    assert not home.model.exists()


def test_a_reset_in_the_first_file_before_its_first_checkpoint_is_refused_as_in_any_other(home: Home) -> None:
    training = locks.Lock.take(home.training_lock, what="training")
    with training, pytest.raises(Locked, match=r"current_model is held by training .*`daemon.py stop`"):
        commands.reset(home, {}, yes=True)


def test_a_reset_without_a_yes_or_without_a_model_changes_nothing(home: Home) -> None:
    with pytest.raises(LongrunError, match="there is no current_model/"):
        commands.reset(home, {}, yes=True)
    add_checkpoint(home, 3)
    with pytest.raises(LongrunError, match="cannot ask: there is no terminal"):
        commands.reset(home, {}, yes=False)
    assert home.model.exists()


def test_put_copies_all_files_or_none(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.inbox.rmdir()
    (tmp_path / "x.jsonl").write_bytes(GOOD)
    with pytest.raises(LongrunError, match="there is no such file"):
        commands.put(home, [tmp_path / "x.jsonl", tmp_path / "absent.jsonl"])
    assert not home.inbox.exists()
    assert commands.put(home, [tmp_path / "x.jsonl"]) == 0
    place, hint = capsys.readouterr().out.splitlines()
    assert place == str(home.inbox / "x.jsonl"), "whole, because it may be another folder than was meant"
    assert hint == f"no daemon is running in {home.root}: `daemon.py run` there trains what is in its inbox"
    assert (home.inbox / "x.jsonl").read_bytes() == GOOD


@pytest.mark.parametrize("command", ["put", "pause"])
def test_a_home_that_was_mistyped_is_not_made(tmp_path: Path, command: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD)
    mistyped = Home(tmp_path / "mistyped")
    with pytest.raises(BadConfig, match="there is no such folder; mkdir -p"):
        commands.put(mistyped, [tmp_path / "x.jsonl"]) if command == "put" else commands.pause(mistyped)
    assert not mistyped.root.exists()


def test_check_tells_the_plan_without_training(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD)
    assert commands.check(home, tmp_path / "x.jsonl", {}) == 0
    told = capsys.readouterr().out
    assert f"x.jsonl: good. 16 rows (text), {len(GOOD)} bytes\n" in told
    assert "This file will train for 2 steps (reaching global step 2) unless" in told


@pytest.mark.parametrize("command", ["put", "check"])
@pytest.mark.parametrize("name", ["notes.txt", "x.json", ".x.jsonl", "x.jsonl.part"])
def test_what_the_inbox_would_leave_alone_is_neither_put_nor_good(
    home: Home, tmp_path: Path, command: str, name: str
) -> None:
    (tmp_path / name).write_bytes(GOOD)
    with pytest.raises(LongrunError, match=rf"cannot {command} .*{name}: .*; copy it to another name first"):
        commands.check(home, tmp_path / name, {}) if command == "check" else commands.put(home, [tmp_path / name])


def test_check_counts_from_where_the_files_before_it_end(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD)
    plan = begin(home)
    note(home, queued=2, queue=["begun.jsonl", "other.jsonl"])
    commands.check(home, tmp_path / "x.jsonl", {})
    told = capsys.readouterr().out
    assert f"(reaching global step {plan.target_step + 2})" in told
    assert "    after begun.jsonl, which is begun and comes first\n" in told
    assert "    1 file waits before it: their steps come on top\n" in told
    disk.remove_tree(home.job(4), home.staging)
    commands.check(home, tmp_path / "x.jsonl", {})
    assert "(reaching global step 9)" in capsys.readouterr().out, "whose file is gone is not gone on with"


def test_check_tells_why_a_file_would_be_rejected(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jsonl").write_bytes(GOOD + b'{"text": "\x1b[2J\n')
    assert commands.check(home, tmp_path / "x.jsonl", {}) == 1
    told = capsys.readouterr().out
    assert "would be rejected: line 17" in told
    assert "\x1b" not in told
    with pytest.raises(LongrunError, match="there is no such file"):
        commands.check(home, tmp_path / "absent", {})


def test_check_names_the_rows_that_would_be_skipped(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b'{"text": 5}\n')
    assert commands.check(home, tmp_path / "x.jsonl", {"inbox.on_bad_row": "skip"}) == 0
    assert "    skipped: line 17: " in capsys.readouterr().out


@pytest.mark.parametrize(("follow", "how"), [(False, []), (True, ["-F"])])
def test_logs_shows_the_end_of_the_log(
    home: Home, monkeypatch: pytest.MonkeyPatch, follow: bool, how: list[str]
) -> None:
    with pytest.raises(LongrunError, match="there is no log yet"):
        commands.logs(home, follow=follow)
    home.log.write_text("x\n")
    ran: list[list[str]] = []

    def run(command: list[str], **_: object) -> None:
        ran.append(command)
        raise KeyboardInterrupt  # how people leave `logs -f`

    monkeypatch.setattr(subprocess, "run", run)
    assert commands.logs(home, follow=follow) == 0
    assert ran == [["tail", "-n", "40", *how, str(home.log)]]


def test_only_files_that_would_be_trained_can_be_put(home: Home, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("hello")
    with pytest.raises(LongrunError, match=r"does not end in \.jsonl"):
        commands.put(home, [tmp_path / "README.md"])
    (tmp_path / ".x.jsonl").write_text("{}")
    with pytest.raises(LongrunError, match="the inbox ignores names like this"):
        commands.put(home, [tmp_path / ".x.jsonl"])
    assert list(home.inbox.iterdir()) == []


def test_a_folder_is_told_from_a_file_that_is_not_there(home: Home, tmp_path: Path) -> None:
    with pytest.raises(LongrunError, match="it is not a file"):
        commands.check(home, tmp_path, {})
    with pytest.raises(LongrunError, match="there is no such file"):
        commands.check(home, tmp_path / "x.jsonl", {})
