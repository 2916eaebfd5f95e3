"""A base model by its hub name, from a cache made here: what a reachable hub leaves behind."""

from __future__ import annotations

import pytest

from tests.training.templates import random_weights_folder

COMMIT = "a" * 40


@pytest.fixture
def hub(tmp_path):
    """The folder of HF_HOME, with me/qwen at one commit."""
    repository = tmp_path / "hf" / "hub" / "models--me--qwen"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    random_weights_folder(repository / "snapshots" / COMMIT, "qwen3")
    return str(tmp_path / "hf")


def test_a_hub_name_is_trained_and_pinned_to_the_commit_that_was_loaded(lab, hub, torch_hand):
    lab.drop("a.jsonl", 9)
    assert lab.drain("--base-model", "me/qwen", HF_HOME=hub) == 0
    assert lab.lineage["base_model"] == f"me/qwen@{COMMIT}"
    # The second start names the commit itself, and needs no hub any more: HF_HOME is read when hub code is imported.
    lab.hand = torch_hand
    lab.drop("b.jsonl", 5)
    assert lab.drain("--base-model", f"me/qwen@{COMMIT}") == 0
    assert lab.lineage["base_model"] == f"me/qwen@{COMMIT}"
    assert (lab.times_trained("a", 9), lab.times_trained("b", 5)) == ({1: 9}, {1: 5})
