"""Runs of plans: the rows each step receives, what survives a cut, and the learning rate."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from longrun import disk, wire
from longrun.errors import BadConfig
from longrun.training import base_model, run
from longrun.training.metrics import Diverged
from longrun.training.order import held_out_rows, training_order
from tests.lab import chat, numbered
from tests.training.workshop import RECIPE, Workshop

FILES = {"a": 37, "b": 60, "c": 63, "d": 100, "e": 1}


@pytest.fixture
def make_workshop(tmp_path, dropout_model):
    made = []

    def make(name="home", **options):
        made.append(Workshop(tmp_path / name, **{"base_model": str(dropout_model), **options}))
        return made[-1]

    yield make
    for workshop in made:
        workshop.close()


@pytest.fixture
def workshop(make_workshop):
    return make_workshop()


def train_all(workshop, cuts=()):
    """Every file in order; before each global step in `cuts` the process ends once and another goes on."""
    cuts = sorted(cuts)
    for name, rows in FILES.items():
        job, facts = workshop.prepare(name, rows)
        while workshop.train(job, facts, cut_before=cuts[0] if cuts else None) is None:
            cuts.pop(0)
    assert not cuts, "none was left out"
    return workshop


def check_rows(workshop):
    for record, rows in zip(workshop.newest.lineage.files, FILES.values(), strict=True):
        epochs = workshop.recipe.epochs
        assert record.planned_steps == record.done_steps == math.ceil(epochs * rows / workshop.recipe.batch_size)
        assert workshop.times_trained(record.base_step, record.target_step, rows) == {epochs: rows}


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("per_device", [12, 4], ids=["accumulation 1", "accumulation 3"])
def test_every_row_is_trained_once_an_epoch_and_cuts_change_no_bit(make_workshop, epochs, per_device):
    options = {"recipe": replace(RECIPE, epochs=epochs), "per_device": per_device}
    unbroken = train_all(make_workshop("unbroken", **options))
    check_rows(unbroken)
    broken = train_all(
        make_workshop("broken", **options), cuts=[1, 6, 9, 13, 15, 20]
    )  # between, at, and right after checkpoints
    check_rows(broken)
    assert broken.received == unbroken.received
    assert broken.state() == unbroken.state()
    means = [[record.mean_loss for record in w.newest.lineage.files] for w in (unbroken, broken)]
    assert means[0] == means[1]


def test_in_bf16_too_every_row_is_trained_and_cuts_change_no_bit(make_workshop, monkeypatch):
    full = train_all(make_workshop("full"))
    monkeypatch.setattr(
        base_model, "find_device", lambda *_, **__: base_model.Device("cpu", bf16=True, why="as on a GPU")
    )
    unbroken = train_all(make_workshop("unbroken"))
    broken = train_all(make_workshop("broken"), cuts=[1, 6, 9, 13, 15, 20])
    for workshop in (unbroken, broken):
        check_rows(workshop)
    assert broken.received == unbroken.received == full.received
    assert broken.state() == unbroken.state() != full.state()


def test_a_warm_worker_trains_the_same_bits_as_a_fresh_one_for_every_file(make_workshop):
    warm = train_all(make_workshop("warm"))
    cold = make_workshop("cold")  # only now: two TrainingArguments cannot live in one process
    for name, rows in FILES.items():
        cold.train_file(name, rows)
        cold.restart()
    started = [message.warm for message in warm.said if isinstance(message, wire.Started)]
    assert started == [False, True, True, True, True]
    assert warm.state() == cold.state()


def test_steps_are_parted_as_suits_the_rows_of_each_file_and_cuts_change_no_bit(make_workshop):
    files = {"short": 3, "long": 250, "middle": 20}  # words after the name: tokens are bytes here

    def trained(name, cuts):
        workshop = make_workshop(name, may_be_fewer=True)
        for file, words in files.items():
            rows = [{"text": f"Say {file}-{row:04d}. {'x ' * (words + row % 5)}"} for row in range(1, 38)]
            job, facts = workshop.prepare(file, rows)
            while workshop.train(job, facts, cut_before=cuts[0] if cuts else None) is None:
                cuts.pop(0)
        return workshop

    unbroken, broken = trained("unbroken", []), trained("broken", [2, 6, 9])
    for record in unbroken.newest.lineage.files:
        assert record.done_steps == 4
        assert unbroken.times_trained(record.base_step, record.target_step, 37) == {1: 37}
    at_once = [message.rows_at_once for message in unbroken.said if isinstance(message, wire.Started)]
    assert at_once == [12, 1, 6]
    assert broken.received == unbroken.received
    assert broken.state() == unbroken.state()


def test_each_step_has_randomness_of_its_own(workshop, monkeypatch):
    from transformers import Trainer

    original, seeds = Trainer.training_step, {}

    def watched(trainer, *arguments):
        seeds[trainer.state.global_step] = torch.initial_seed()
        return original(trainer, *arguments)

    monkeypatch.setattr(Trainer, "training_step", watched)
    workshop.train_file("a", 37)
    assert sorted(seeds) == [0, 1, 2, 3]
    assert len(set(seeds.values())) == 4


def first_moments(workshop):
    """Of a model that was trained for one step: a tenth of its gradient."""
    saved = torch.load(workshop.newest.path / "optimizer.pt", weights_only=True)["state"]
    return torch.cat([entry["exp_avg"].flatten() for entry in saved.values()])


def test_each_token_counts_the_same_however_a_step_is_parted(make_workshop):
    moments = []
    for per_device in (12, 4):
        moments.append(make_workshop(f"by {per_device}", base_model="tiny", per_device=per_device))
        moments[-1].train_file("a", 12)  # one step of rows that differ in length
    whole, parted = map(first_moments, moments)
    assert float((whole - parted).norm()) < 1e-4 * float(whole.norm())


def test_gradients_are_clipped_as_the_recipe_says(workshop):
    workshop.with_recipe(max_grad_norm=1e-3)
    workshop.train_file("a", 5)
    assert float(first_moments(workshop).norm()) == pytest.approx(1e-4, rel=1e-3)


def test_steps_train_exactly_the_slices_of_the_order(workshop):
    job, facts = workshop.prepare("a", 37)
    plan = workshop.plan(job, facts)
    workshop.train(job, facts)
    order = training_order(plan)
    for step in range(plan.planned_steps):
        assert workshop.received[step] == [row + 1 for row in order[step * 12 : (step + 1) * 12]]


def test_held_out_rows_are_evaluated_and_never_trained(workshop):
    job, facts = workshop.prepare("a", 450)
    plan = workshop.plan(job, facts)
    workshop.train(job, facts)
    kept = {row + 1 for row in held_out_rows(plan)}
    trained = {row for rows in workshop.received.values() for row in rows}
    assert len(kept) == 2
    assert trained == set(range(1, 451)) - kept
    assert workshop.newest.lineage.files[0].eval_loss == pytest.approx(loss_of(workshop, kept), rel=1e-5)


def loss_of(workshop, rows):
    """Mean loss per trained token of these rows, computed row by row from the published model."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(workshop.home.model).eval()
    total = count = 0
    for row in Dataset.from_file(str(workshop.home.prepared(1) / "rows.arrow")):
        if row["row"] + 1 in rows:
            labels = torch.tensor([row["labels"]])
            tokens = int((labels[:, 1:] != -100).sum())
            total += float(model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss.detach()) * tokens
            count += tokens
    return total / count


def rates(workshop):
    lines = (workshop.home.logs / "metrics.jsonl").read_text().splitlines()
    return {entry["global_step"]: entry["learning_rate"] for entry in map(json.loads, lines) if "loss" in entry}


def test_the_last_of_twenty_files_trains_at_the_rate_of_the_first(workshop):
    for number in range(20):
        workshop.train_file(f"f{number}", 5)
    assert set(rates(workshop).values()) == {1e-3}
    assert len(rates(workshop)) == 20


def test_warming_up_begins_above_zero_and_happens_once_in_a_models_life(workshop):
    workshop.with_recipe(warmup_steps=4)
    for number in range(6):
        workshop.train_file(f"f{number}", 5)
    assert list(rates(workshop).values()) == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


@pytest.mark.parametrize("restart", [False, True], ids=["warm", "cold"])
def test_a_changed_rate_decay_or_beta_takes_effect_at_the_next_file(workshop, restart):
    workshop.train_file("a", 5)
    workshop.with_recipe(learning_rate=5e-4, weight_decay=0.3, adam_beta1=0.8)
    if restart:
        workshop.restart()
    workshop.train_file("b", 5)
    groups = torch.load(workshop.newest.path / "optimizer.pt", weights_only=True)["param_groups"]
    assert list(rates(workshop).values()) == [1e-3, 5e-4]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert {group["betas"] for group in groups} == {(0.8, 0.999)}


def test_a_plan_in_progress_keeps_its_recipe_when_the_settings_change(workshop):
    job, facts = workshop.prepare("a", 100)
    assert workshop.train(job, facts, cut_before=6) is None
    workshop.with_recipe(learning_rate=7.0)
    workshop.train(job, facts)
    assert set(rates(workshop).values()) == {1e-3}


def test_a_loss_that_is_no_number_names_step_and_rows(workshop, monkeypatch):
    from transformers import Trainer

    workshop.train_file("a", 37)
    original = Trainer.training_step

    def poisoned(trainer, *arguments):
        loss = original(trainer, *arguments)
        return loss * float("nan") if trainer.state.global_step == 6 else loss

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    with pytest.raises(Diverged, match="the loss became nan at global step 7") as caught:
        workshop.train_file("b", 60)
    assert [row + 1 for row in caught.value.rows] == workshop.received[6]
    assert workshop.newest.global_step == 4


def test_a_checkpoint_never_holds_a_weight_that_is_no_number_and_the_rows_before_it_are_named(workshop, monkeypatch):
    from transformers import Trainer

    original = Trainer.training_step

    def ruined(trainer, model, *rest):
        loss = original(trainer, model, *rest)
        next(iter(model.parameters())).data[0] = float("inf")
        return loss

    monkeypatch.setattr(Trainer, "training_step", ruined)
    job, facts = workshop.prepare("a", [chat("its answer is cut " * 99, "off"), *numbered("a", 5)])
    assert facts["untrainable_rows"] == 1
    with pytest.raises(Diverged, match="a weight became nan or inf") as told:
        workshop.train(job, facts)
    assert sorted(told.value.rows) == [1, 2, 3, 4, 5]  # as rows are counted in the file, from 0
    assert workshop.newest is None


def test_without_room_for_a_checkpoint_training_waits_and_goes_on_by_itself(workshop, monkeypatch):
    answers = iter([0, 0])
    true_answer = disk.free_bytes
    monkeypatch.setattr(disk, "free_bytes", lambda folder: next(answers, true_answer(folder)))
    monkeypatch.setattr("longrun.training.run.LOOK_FOR_ROOM_S", 0.01)
    workshop.train_file("a", 37)
    assert [type(message).__name__ for message in workshop.said].count("Waiting") == 2
    assert workshop.times_trained(0, 4, 37) == {1: 37}


def test_a_save_that_fails_for_want_of_room_is_tried_again(workshop, monkeypatch):
    import errno

    from longrun import checkpoint

    original, calls = checkpoint.seal, []

    def full_at_first(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(checkpoint, "seal", full_at_first)
    workshop.train_file("a", 10)
    assert len(calls) == 2
    assert workshop.newest.global_step == 1


def test_the_curves_of_all_files_are_one_tensorboard_run(make_workshop):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    workshop = make_workshop(report_to=("tensorboard",))
    workshop.train_file("a", 100)
    job, facts = workshop.prepare("b", 200)
    assert workshop.train(job, facts, cut_before=20) is None
    workshop.train(job, facts)
    curves = EventAccumulator(str(workshop.home.logs / "tensorboard")).Reload()
    steps = [event.step for event in curves.Scalars("train/loss")]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (1, 26)  # ceil(100/12) = 9, ceil(199/12) = 17
    assert [event.step for event in curves.Scalars("eval/eval_loss")] == [26]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
@pytest.mark.parametrize("gone", ["logs", "logs/tensorboard"])
def test_curves_that_somebody_removes_cost_no_run_and_the_next_file_draws_new_ones(make_workshop, gone, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    workshop = make_workshop(report_to=("tensorboard",))
    workshop.train_file("a", 13)
    write = workshop.runner.metrics.write

    def removed_before(*rest, **values):
        shutil.rmtree(workshop.root / gone, ignore_errors=True)
        write(*rest, **values)

    with monkeypatch.context() as patched:
        patched.setattr(workshop.runner.metrics, "write", removed_before)
        workshop.train_file("b", 37)
    assert workshop.times_trained(2, 6, 37) == {1: 37}
    workshop.train_file("c", 13)
    curves = EventAccumulator(str(workshop.home.logs / "tensorboard")).Reload()
    assert curves.Scalars("train/loss")[-1].step == 8
    assert (workshop.home.logs / "metrics.jsonl").exists()


def test_a_stop_ends_the_run_at_a_step_boundary_in_a_checkpoint(workshop):
    job, facts = workshop.prepare("a", 100)
    workshop.channel.send(wire.Stop(why="pause"))
    ended = workshop.train(job, facts)
    assert (ended.stopped, ended.global_step) == ("pause", workshop.newest.global_step)
    workshop.train(job, facts)
    assert workshop.times_trained(0, 9, 100) == {1: 100}


def test_a_skip_that_comes_with_a_pause_is_the_one_that_counts(workshop):
    job, facts = workshop.prepare("a", 100)
    for why in ("pause", "skip"):
        workshop.channel.send(wire.Stop(why=why))
    assert workshop.train(job, facts).stopped == "skip"


@pytest.mark.parametrize(
    ("save_s", "waited_s", "due"),
    [(None, 59, False), (None, 61, True), (1.0, 61, True), (2.0, 99, False), (2.0, 101, True), (99.0, 1799, False),
     (99.0, 1801, True)],
)  # fmt: skip
def test_by_default_checkpoints_take_two_percent_of_the_time_and_a_kill_half_an_hour_at_most(
    monkeypatch, save_s, waited_s, due
):
    session = SimpleNamespace(
        _task=SimpleNamespace(save_steps=0), _trainer=SimpleNamespace(save_s=save_s), _saved=1000.0
    )
    monkeypatch.setattr(run.time, "monotonic", lambda: 1000.0 + waited_s)
    assert run.Session._is_time_to_save(session, 7) is due


@pytest.mark.filterwarnings("ignore::FutureWarning")  # gradient_checkpointing gets another name in transformers 6
def test_a_worker_trains_with_the_options_that_it_was_started_with(workshop):
    options = replace(workshop.runner._options, dtype="bfloat16", attn_implementation="eager", optim="sgd",
                      gradient_checkpointing=True)  # fmt: skip
    workshop.runner = run.Runner(workshop.home, options, workshop.runner._channel)
    workshop.train_file("a", 24)
    model = workshop.runner._trainer.model
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert model.is_gradient_checkpointing
    assert type(workshop.runner._trainer.optimizer.optimizer) is torch.optim.SGD
    assert workshop.newest.lineage.optim == "sgd"


def test_losses_that_are_logged_are_means_since_the_last_time(workshop):
    workshop.train_file("a", 100)
    lines = [json.loads(line) for line in (workshop.home.logs / "metrics.jsonl").read_text().splitlines()]
    logged = {line["global_step"]: line["loss"] for line in lines if "loss" in line}
    steps = [0, *sorted(logged)]
    total = sum(logged[after] * (after - before) for before, after in itertools.pairwise(steps))
    (record,) = workshop.newest.lineage.files
    assert steps == [0, 1, 5, 9]
    assert total == pytest.approx(record.mean_loss * 9)


def test_room_is_asked_for_all_that_a_checkpoint_takes(workshop):
    workshop.train_file("a", 12)
    trainer = workshop.runner._trainer
    need = run.Session._need_bytes(SimpleNamespace(_trainer=trainer)) - run.ROOM_MARGIN_BYTES
    written = sum((workshop.newest.path / name).stat().st_size for name in ("model.safetensors", "optimizer.pt"))
    assert 0.9 * written < need < 1.1 * written


def test_every_number_of_the_recipe_reaches_the_optimizer(workshop):
    workshop.train_file("a", 12)
    workshop.with_recipe(learning_rate=2e-3, adam_beta1=0.8, adam_beta2=0.99, adam_epsilon=1e-6, weight_decay=0.1)
    workshop.train_file("b", 12)
    groups = workshop.runner._trainer.optimizer.param_groups
    assert {(group["lr"], group["betas"], group["eps"]) for group in groups} == {(2e-3, (0.8, 0.99), 1e-6)}
    assert {group["weight_decay"] for group in groups} == {0.1, 0.0}


@pytest.mark.parametrize("late", [False, True], ids=["at once", "while a pause saves"])
def test_a_skipped_file_tells_which_rows_were_trained(workshop, monkeypatch, late):
    from longrun import checkpoint

    original = checkpoint.seal

    def skipped_and_sealed(*arguments):
        workshop.channel.send(wire.Stop(why="skip"))
        return original(*arguments)

    if late:
        monkeypatch.setattr(checkpoint, "seal", skipped_and_sealed)
    job, facts = workshop.prepare("a", 100)
    workshop.channel.send(wire.Stop(why="pause" if late else "skip"))
    ended = workshop.train(job, facts)
    assert ended.stopped == "skip"
    assert ended.rows_trained == sorted(row for rows in workshop.received.values() for row in rows)


def test_a_job_left_in_the_middle_is_closed_in_the_lineage_by_the_next(workshop):
    job, facts = workshop.prepare("a", 100)
    workshop.channel.send(wire.Stop(why="skip"))
    workshop.train(job, facts)
    workshop.train_file("b", 5)
    outcomes = [(f.job, f.outcome, f.done_steps) for f in workshop.newest.lineage.files]
    assert outcomes == [(1, "ended early", 1), (2, "trained", 1)]


@pytest.mark.parametrize("restart", [False, True], ids=["warm", "cold"])
def test_a_model_that_was_exchanged_is_gone_on_from_as_it_is(make_workshop, restart):
    reference = make_workshop("reference")
    for name in "abd":
        reference.train_file(name, FILES[name])
    workshop = make_workshop("exchanged")
    for name in "ab":
        workshop.train_file(name, FILES[name])
    former = workshop.root / "former"
    shutil.copytree(workshop.home.model, former)
    workshop.train_file("c", FILES["c"])
    shutil.rmtree(workshop.home.model)
    former.rename(workshop.home.model)  # as after restoring a backup: the worker holds other weights
    if restart:
        workshop.restart()
    workshop.train_file("d", FILES["d"])
    assert workshop.state() == reference.state()
    assert [record.name for record in workshop.newest.lineage.files] == ["job 1", "job 2", "job 4"]


def test_a_model_with_several_chat_templates_keeps_them_in_a_flat_checkpoint(make_workshop, dropout_model, tmp_path):
    base = shutil.copytree(dropout_model, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{# tools #}" + tokenizer.chat_template}
    tokenizer.save_pretrained(base)
    workshop = make_workshop(base_model=str(base))
    for name in ("a", "b"):  # the second from a checkpoint
        workshop.restart()
        workshop.train_file(name, 13)
    assert not [path for path in workshop.newest.path.iterdir() if path.is_dir()]
    published = AutoTokenizer.from_pretrained(workshop.home.model)
    assert published.chat_template == tokenizer.chat_template


def test_a_step_is_the_same_in_parts_whatever_a_model_says_of_its_loss(make_workshop, monkeypatch):
    told = make_workshop("told", per_device=4)
    told.train_file("a", 24)
    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)  # as Gemma 4's do
    modest = make_workshop("modest", per_device=4)
    modest.train_file("a", 24)
    wanted, found = told.state(), modest.state()
    assert [name for name in wanted if found[name] != wanted[name]] == []


def test_what_torch_and_safetensors_say_of_a_refused_write_is_no_fault_of_a_file(tmp_path):
    said = []
    for write in (
        lambda: torch.save({}, tmp_path / "absent" / "x.pt"),
        lambda: save_file({"w": torch.zeros(1)}, tmp_path / "absent" / "x.safetensors"),
        lambda: torch.save({"w": torch.zeros(1 << 20)}, "/dev/full"),
    ):
        with pytest.raises((OSError, RuntimeError, SafetensorError)) as refused:
            write()
        said.append(refused.value)
    assert [run._tells_of_a_file(error) or isinstance(error, OSError) for error in said] == [True] * 3
    assert not run._tells_of_a_file(RuntimeError("CUDA error: device-side assert triggered"))


def test_processes_do_not_share_the_steps_of_a_model_whose_loss_does_not_add_up(workshop, monkeypatch):
    monkeypatch.setattr(run, "adds_up", lambda _: False)
    workshop.runner.world.size = 2
    with pytest.raises(BadConfig, match=r"worker\.processes = 2 cannot share the steps"):
        workshop.train_file("a", 24)


@pytest.mark.parametrize(("per_device", "adds_up"), [(4, False), (12, True)])
def test_a_model_whose_loss_does_not_add_up_is_told_of_where_a_step_is_computed_in_parts(
    make_workshop, monkeypatch, per_device, adds_up
):
    monkeypatch.setattr(run, "adds_up", lambda _: False)
    workshop = make_workshop("uneven", per_device=per_device)
    workshop.train_file("a", 24)
    (started,) = [message for message in workshop.said if isinstance(message, wire.Started)]
    assert started.adds_up is adds_up
