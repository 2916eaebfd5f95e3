"""The story that Longrun was founded for: a second file trains past the first."""

from __future__ import annotations

import json
from pathlib import Path

from tests.lab import chat


def test_second_file_trains_past_the_first(lab):
    daemon = lab.start()
    (lab.inbox / "test1.jsonl").write_text(json.dumps(chat("Test 1", "Answer 1")) + "\n")
    lab.wait_until(lambda: "test1.jsonl" in lab.names("trained"))
    assert lab.global_step == 1
    assert "libtorch" not in Path(f"/proc/{daemon.pid}/maps").read_text(), "that is the worker's"
    (lab.inbox / "test2.jsonl").write_text(json.dumps(chat("Test 2", "Answer 2")) + "\n")
    lab.wait_until(lambda: "test2.jsonl" in lab.names("trained"))
    assert lab.global_step == 2
    received = list(lab.steps_received().values())
    assert ["Test 1" in received[0][0], "Test 2" in received[1][0]] == [True, True]
    daemon.terminate()
    assert daemon.wait(30) == 0
    assert "This file will train for 1 steps (reaching global step 1)" in lab.log
    assert "This file will train for 1 steps (reaching global step 2)" in lab.log
