"""What is on disk counts, not what a process managed to say before it died."""

from __future__ import annotations

from contextlib import closing

from tests.drills.daemons import Watched
from tests.lab import numbered


def test_a_file_whose_last_commit_was_never_told_is_trained_and_not_given_up(make_lab, torch_hand):
    lab = make_lab(hand=torch_hand, **{"train.batch_size": 4, "worker.max_attempts": 1})
    lab.drop("a.jsonl", 10)
    commit = {"at": "longrun.checkpoint:OpenModel.commit", "role": "worker", "when": "after"}
    assert lab.drain(faults=[{**commit, "do": "kill", "once": "untold"}]) == 0
    assert "struck-untold" in lab.names("probe")
    assert lab.names("trained") == {"a.jsonl"}
    assert lab.times_trained("a", 10) == {1: 10}
    assert lab.global_step == 3


def test_a_file_whose_last_step_was_told_and_not_committed_is_gone_on_with(tmp_path, hand):
    last = {"at": "longrun.checkpoint:seal", "role": "worker", "about": "outcome='trained'"}
    # Slow first: the daemon has heard of the step when both die before its checkpoint.
    faults = [{**last, "do": "kill both", "once": "last"}, *[{**last, "do": "slow", "nth": 0}] * 5]
    with closing(Watched(tmp_path / "home", hand=hand)) as lab:
        lab.drop_rows("a", 20)
        assert lab.drain(faults=faults) < 0
        assert lab.drain() == 0
        lab.check()


def test_a_begun_file_keeps_the_rows_it_was_examined_with_when_bad_rows_become_forbidden(make_lab, torch_hand):
    settings = {"train.batch_size": 4, "train.save_steps": 2}
    lab = make_lab(hand=torch_hand, **settings, **{"inbox.on_bad_row": "skip"})
    rows = numbered("a", 24)
    lab.drop("a.jsonl", [*rows[:9], {"messages": []}, *rows[9:]])
    # Dies when the second checkpoint is committed; the next start finds the file in its middle.
    killed = {"at": "longrun.runs:Runs._saved", "role": "daemon", "nth": 2, "do": "kill"}
    assert lab.drain(faults=[killed]) == -9
    lab.configure(**settings, **{"inbox.on_bad_row": "reject", "inbox.settle_s": 0.3})
    assert lab.drain() == 0
    assert lab.times_trained("a", 24) == {1: 24}
    assert lab.names("rejected") == set()


def test_a_file_trained_by_hand_and_cut_off_before_its_first_look_is_trained_once(make_lab, torch_hand, tmp_path):
    lab = make_lab(hand=torch_hand)
    file = tmp_path / "mine.jsonl"
    lab.drop("mine.jsonl", 8).rename(file)
    killed = {"at": "longrun.preparation:Preparation.next", "role": "daemon", "do": "kill"}
    assert lab.train(file, faults=[killed]) == -9
    assert lab.train(file) == 0
    assert lab.drain() == 0
    assert lab.times_trained("mine", 8) == {1: 8}
    assert lab.names("trained") == {"mine.jsonl"}
