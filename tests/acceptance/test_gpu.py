"""What only a CUDA device can show. Skips itself without one; nothing here depends on how large the device is."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import pytest
import torch

from bench.idle import gpu_memory_mb

CUDA_CONTEXT_MB = 100  # at least, however small the model

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]


@pytest.fixture
def gpu(monkeypatch):
    """Lets what the test starts see the GPU, which is hidden from the tests themselves."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ["GPUS_OF_TESTS"])
    if torch.version.cuda is None or not can_be_seen():
        pytest.skip("no CUDA device")


@functools.cache
def can_be_seen() -> bool:
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() == "True"


def test_a_file_is_trained_in_bf16_and_every_row_once(lab):
    lab.drop("a.jsonl", 37)
    assert lab.drain() == 0
    assert "training on cuda with bf16" in lab.log or "which cannot compute in bf16" in lab.log
    assert lab.times_trained("a", 37) == {1: 37}


def test_a_kill_in_mid_file_costs_no_row(make_lab):
    lab = make_lab(**{"train.save_steps": 2})
    lab.drop("a.jsonl", 60)
    third = {"at": "transformers.trainer:Trainer.training_step", "role": "worker", "nth": 4, "do": "kill", "once": "a"}
    assert lab.drain(faults=[third]) == 0
    assert "struck-a" in lab.names("probe")
    assert lab.times_trained("a", 60) == {1: 60}


def test_out_of_memory_keeps_the_batch_and_every_row(lab):
    lab.drop("a.jsonl", 37)
    too_much = {
        "at": "transformers.trainer:Trainer.training_step",
        "role": "worker",
        "do": "device full",
        "rows_over": 4,
    }
    assert lab.drain(faults=[too_much]) == 0
    assert "for a day 4 rows at once" in lab.log
    assert lab.times_trained("a", 37) == {1: 37}
    assert lab.lineage["files"][0]["planned_steps"] == 5


def test_an_idle_worker_leaves_the_device(make_lab):
    lab = make_lab(**{"worker.idle_release_minutes": 0.25})
    lab.start()
    lab.drop("a.jsonl", 9)
    lab.wait_until(lambda: "a.jsonl" in lab.names("trained"))
    warm_mb = gpu_memory_mb()
    assert "its memory is released" not in lab.log, "measured too late"
    lab.wait_until(lambda: "its memory is released" in lab.log)
    lab.wait_until(lambda: gpu_memory_mb() <= warm_mb - CUDA_CONTEXT_MB)
