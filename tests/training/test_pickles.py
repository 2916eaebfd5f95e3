"""Weights and moments come in files that may be pickles, from anywhere: one that would run something never does."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch

from longrun import disk
from longrun.errors import BadConfig
from longrun.training import base_model
from tests.training.workshop import Workshop


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, tripwire):
        self.tripwire = str(tripwire)

    def __reduce__(self):
        return os.mkdir, (self.tripwire,)


def cut(folder, tripwire):
    os.truncate(folder / "model.safetensors", 1000)


def pickled(folder, tripwire):
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Trap(tripwire)}, folder / "pytorch_model.bin")


def scrambled(folder, tripwire):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 no zip")


@pytest.mark.parametrize("spoil", [cut, pickled, scrambled])
def test_a_base_model_that_cannot_be_loaded_is_at_fault_itself_and_runs_nothing(tmp_path, spoil):
    options = {"dtype": torch.float32, "attn_implementation": "auto", "trust_remote_code": False}
    base_model.load_model("tiny", **options).save_pretrained(tmp_path / "base")
    spoil(tmp_path / "base", tmp_path / "tripwire")
    with pytest.raises(BadConfig, match="cannot load the base model"):
        base_model.load_model(str(tmp_path / "base"), **options)
    assert not (tmp_path / "tripwire").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_checkpoint_that_would_run_something_does_not(tmp_path, name):
    """Even one whose manifest names the trap, as a hostile backup's may."""
    workshop = Workshop(tmp_path / "home")
    workshop.train_file("a", 12)
    newest = workshop.newest
    torch.save(Trap(tmp_path / "tripwire"), newest.path / name)
    manifest = json.loads((newest.path / "manifest.json").read_text())
    trap = newest.path / name
    manifest["files"][name] = {"size": trap.stat().st_size, "sha256": disk.hash_file(trap)}
    (newest.path / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    assert workshop.newest is not None
    workshop.restart()
    try:
        workshop.train_file("b", 12)
    except pickle.UnpicklingError:
        assert name in ("optimizer.pt", "scheduler.pt")  # what the Trainer reads, it reads guarded
    finally:
        workshop.close()
    assert not (tmp_path / "tripwire").exists()
