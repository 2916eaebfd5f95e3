"""Several processes share each step; the batch, the plan and the rows stay what they are."""

from __future__ import annotations

import collections
import json

STEP = "transformers.trainer:Trainer.training_step"
SLOW = {"at": STEP, "role": "worker", "row": "Say b-", "do": "slow", "nth": 0}  # so that the kill comes in its middle


FULL = {"at": STEP, "role": "worker", "rank": "1", "rows_over": 2, "do": "oom", "nth": 0}  # the second's device


def test_two_processes_train_each_row_once_and_a_kill_changes_no_row(make_lab, dropout_model, torch_hand):
    settings = {"train.batch_size": 8, "train.save_steps": 3, "train.per_device_train_batch_size": 4}
    lab = make_lab(base_model=dropout_model, **settings, **{"worker.processes": 2})
    lab.drop("a.jsonl", 37)
    lab.drop("b.jsonl", 63)
    daemon = lab.start(faults=[FULL, SLOW])
    lab.wait_until(lambda: lab.global_step >= 6)
    lab.kill(daemon)
    assert lab.global_step < 13
    assert "a.jsonl: out of memory: CUDA out of memory (as a test); going on from the newest" in lab.log
    assert "for a day 2 rows at once on a device" in lab.log
    assert all(sorted(shares.values()) == [4, 4] for shares in shares_by_step(lab)[:-1])  # the last was cut off
    lab.hand = torch_hand
    lab.configure(**{"train.batch_size": 8, "model.base_model": str(dropout_model), "worker.processes": 1,
                     "train.per_device_train_batch_size": 4, "inbox.settle_s": 0.3})  # fmt: skip
    assert lab.drain() == 0
    assert lab.global_step == 5 + 8  # ceil(37 / 8), ceil(63 / 8)
    assert lab.names("trained") == {"a.jsonl", "b.jsonl"}
    rows = rows_by_step(lab)
    assert [len(rows[step]) for step in sorted(rows)] == [8, 8, 8, 8, 5, 8, 8, 8, 8, 8, 8, 8, 7]
    for name, base, target, count in (("a", 0, 5, 37), ("b", 5, 13, 63)):
        texts = [text for step in range(base, target) for text in rows[step]]
        seen = sorted(row for row in range(1, count + 1) for text in texts if f"Say {name}-{row:04d}." in text)
        assert seen == list(range(1, count + 1))


def shares_by_step(lab):
    """Of each step so far, how many rows each process of the last launch received, with those that only fill it up."""
    shares: dict[int, dict[str, collections.Counter[int]]] = {}
    for line in (lab.probe / "batches.jsonl").read_text().splitlines():
        batch = json.loads(line)
        launches = shares.setdefault(batch["global_step"], {})
        launches.setdefault(batch["launch"], collections.Counter())[batch["pid"]] += len(batch["texts"])
    assert len(shares) >= 6
    return [list(shares[step].values())[-1] for step in sorted(shares)]


def rows_by_step(lab):
    """What both processes received, put together; of a step done again, the launch that did it last counts."""
    received: dict[int, dict[int, list[str]]] = {}
    for line in (lab.probe / "batches.jsonl").read_text().splitlines():
        batch = json.loads(line)
        received.setdefault(batch["global_step"], {}).setdefault(batch["launch"], [])
        received[batch["global_step"]][batch["launch"]] += batch["texts"]
    steps = {step: launches[list(launches)[-1]] for step, launches in received.items() if step < lab.global_step}
    # A row that only fills a step up is one padding token, in which nothing is trained.
    return {step: [text for text in texts if "Say" in text] for step, texts in steps.items()}
