"""One worker trains file after file from memory, and nobody can tell from the weights."""

from __future__ import annotations

from contextlib import closing

import pytest

from tests.lab import Lab

FILES = {"a": 80, "b": 37, "c": 41}
STEP = "transformers.trainer:Trainer.training_step"
RECIPE = {"train.learning_rate": 1e-3, "train.batch_size": 4, "train.num_train_epochs": 2}


@pytest.fixture(scope="module")
def warm(tmp_path_factory, torch_hand, dropout_model):
    """Three files through one worker, which is then left idle. Steps are slow enough to prepare a file beside them."""
    settings = {"base_model": dropout_model, **RECIPE, "worker.idle_release_minutes": 2 / 60}
    with closing(Lab(tmp_path_factory.mktemp("warm") / "home", hand=torch_hand, **settings)) as lab:
        live_through(lab)
        return lab


def live_through(lab):
    daemon = lab.start(faults=[{"at": STEP, "role": "worker", "row": "Say a-", "do": "slow", "nth": 0}])
    for name, rows in FILES.items():
        lab.drop(f"{name}.jsonl", rows)
        lab.wait_until(lambda: [e for e in lab.events if e["event"] == "started"])
    lab.wait_until(lambda: lab.names("trained") == {f"{name}.jsonl" for name in FILES})
    lab.released = lab.wait_until(lambda: [e for e in lab.events if e["event"] == "released"])
    lab.idle_status = lab.wait_until(lambda: (note := lab.note)["worker_pid"] is note["preparer_pid"] is None and note)
    lab.kill(daemon)


@pytest.fixture(scope="module")
def cold(tmp_path_factory, torch_hand, dropout_model):
    """The same files, each with a daemon of its own."""
    settings = {"base_model": dropout_model, **RECIPE}
    with closing(Lab(tmp_path_factory.mktemp("cold") / "home", hand=torch_hand, **settings)) as lab:
        for name, rows in FILES.items():
            lab.drop(f"{name}.jsonl", rows)
            assert lab.drain() == 0
        return lab


def happened(lab, event, name):
    """When in the log it was, and the facts of the first such event."""
    jobs = {"a": 1, "b": 2, "c": 3}
    return next((n, e) for n, e in enumerate(lab.events) if e["event"] == event and e.get("job") == jobs[name])


def test_warm_and_cold_workers_make_the_same_weights(warm, cold):
    for lab in (warm, cold):
        assert {name: lab.times_trained(name, rows) for name, rows in FILES.items()} == {
            name: {2: rows} for name, rows in FILES.items()
        }
    assert warm.steps_received() == cold.steps_received()
    assert warm.weights() == cold.weights()


def test_later_files_are_trained_by_the_worker_that_is_warm(warm, cold):
    started = [happened(warm, "started", name)[1] for name in FILES]
    assert [event["warm"] for event in started] == [False, True, True]
    assert len({event["worker_pid"] for event in started}) == 1
    assert len({event["worker_pid"] for event in cold.events if event["event"] == "started"}) == 3


def test_the_next_file_is_prepared_while_one_is_trained(warm):
    begun, ended = happened(warm, "started", "a")[0], happened(warm, "trained", "a")[0]
    assert begun < happened(warm, "prepared", "b")[0] < happened(warm, "prepared", "c")[0] < ended


def test_an_idle_worker_gives_its_memory_back(warm):
    assert warm.released
    assert warm.idle_status["state"] == "idle"
    assert warm.idle_status["queue"] == []
