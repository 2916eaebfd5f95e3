"""Shared by all tests: homes to experiment in, and a base model with dropout."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# Tests run side by side: threads of one that wait by spinning would keep the others from the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is promised of bits is promised on a CPU: a GPU is hidden from all tests but those that ask for it.
os.environ.setdefault("GPUS_OF_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.drills.hand import Hand
from tests.lab import Lab

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# How long an example takes says something of the machine only.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture
def make_lab(tmp_path: Path) -> Iterator[Callable[..., Lab]]:
    labs: list[Lab] = []

    def make(name: str = "home", **settings: object) -> Lab:
        labs.append(Lab(tmp_path / name, **settings))  # type: ignore[arg-type]
        return labs[-1]

    yield make
    for lab in labs:
        lab.close()


@pytest.fixture(scope="session")
def torch_hand() -> Iterator[Hand]:
    """For daemons whose real children have torch from the start: many lives, with nothing imported in any."""
    with Hand("real") as found:
        yield found


@pytest.fixture(scope="module")
def hand() -> Iterator[Hand]:
    """For daemons whose children are scripted, and for backup_manager.py: nothing is imported in any life."""
    with Hand() as found:
        yield found


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab()


@pytest.fixture(scope="session")
def dropout_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with dropout on, as a base model folder: resuming must repeat its randomness exactly."""
    from longrun.training.tiny import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("base") / "tiny-dropout"
    model = make_model()
    model.config.attention_dropout = 0.1
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
