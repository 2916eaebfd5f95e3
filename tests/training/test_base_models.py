"""Real architectures with real chat templates, tiny and random, from the base model to a published one."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longrun.errors import BadConfig, BadFile
from longrun.training import base_model
from longrun.training.ask import ask
from tests.lab import chat
from tests.training.templates import random_weights_folder
from tests.training.workshop import Workshop


@pytest.mark.parametrize("family", ["qwen3", "llama3", "gemma3", "smollm2", "phi3"])
def test_a_model_folder_trains_and_its_successor_loads_by_itself(tmp_path, family):
    folder = tmp_path / family
    random_weights_folder(folder, family)
    workshop = Workshop(tmp_path / "home", base_model=str(folder))
    workshop.with_recipe(batch_size=4)
    workshop.per_device = 4
    workshop.restart()
    for name in ("a", "b"):
        workshop.train_file(name, 6)
    workshop.close()
    model = workshop.home.model
    assert workshop.newest.lineage.base_model == str(folder)
    assert workshop.newest.global_step == 4
    assert type(AutoModelForCausalLM.from_pretrained(model)) is type(AutoModelForCausalLM.from_pretrained(folder))
    # What the model will be asked with is its own template, whatever the masks were made with.
    assert AutoTokenizer.from_pretrained(model).chat_template == AutoTokenizer.from_pretrained(folder).chat_template
    assert isinstance(ask(str(model), "Say hello."), str)


def test_every_checkpoint_carries_tokenizer_template_state_and_lineage(tmp_path):
    workshop = Workshop(tmp_path / "home")
    workshop.train_file("a", 100)
    workshop.close()
    for number in (8, 9):
        folder = workshop.home.model / f"checkpoint-{number}"
        names = {path.name for path in folder.iterdir()}
        wanted = {"model.safetensors", "optimizer.pt", "tokenizer.json", "chat_template.jinja", "lineage.json"}
        assert wanted <= names
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == number
        assert "training_args.bin" not in names


def test_the_history_of_losses_does_not_make_checkpoints_grow(tmp_path):
    workshop = Workshop(tmp_path / "home")
    workshop.train_file("a", 100)
    workshop.close()
    assert json.loads((workshop.home.model / "trainer_state.json").read_text())["log_history"] == []
    assert len((workshop.home.logs / "metrics.jsonl").read_text().splitlines()) >= 2


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("/nowhere/at/all", "there is no such folder"),
        ("./missing", "there is no such folder"),
        ("somebody/some-model", "."),  # offline: whatever the hub library says
    ],
)
def test_a_base_model_that_cannot_be_reached_says_what_to_do(source, why):
    with pytest.raises(BadConfig, match=why) as caught:
        base_model.check(source)
    assert "daemon.py demo" in caught.value.hint


def test_a_folder_without_a_config_is_no_base_model(tmp_path):
    with pytest.raises(BadConfig, match=r"no config\.json"):
        base_model.check(str(tmp_path))


def test_a_cut_row_is_counted_and_one_without_a_trained_token_is_left_out(tmp_path):
    workshop = Workshop(tmp_path / "home")
    workshop.with_recipe(max_length=64)
    rows = [chat("short", "answer"), chat("short", "long " * 40), chat("long " * 40, "never reached")]
    _, facts = workshop.prepare("a", rows)
    workshop.close()
    counted = {key: facts[key] for key in ("rows", "trainable_rows", "truncated_rows", "untrainable_rows")}
    assert counted == {"rows": 3, "trainable_rows": 2, "truncated_rows": 2, "untrainable_rows": 1}
    assert facts["untrainable_first"] == 3


def test_a_conversation_that_the_template_refuses_is_skipped_where_bad_rows_are(tmp_path):
    workshop = Workshop(tmp_path / "home", base_model=str(random_weights_folder(tmp_path / "gemma", "gemma")))
    with_system = {"messages": [{"role": "system", "content": "Be short."}, *chat("short", "answer")["messages"]]}
    rows = [chat("one", "answer"), with_system, chat("three", "answer"), with_system]
    with pytest.raises(BadFile, match="does not take this conversation"):
        workshop.prepare("a", rows)
    job, facts = workshop.prepare("b", rows, on_bad_row="skip")
    workshop.train(job, facts)
    workshop.close()
    assert (facts["trainable_rows"], facts["refused_rows"]) == (2, 2)
    assert facts["refused_first"].startswith("row 2, messages: this model's chat template does not take")
    assert workshop.received == {0: [1, 3]} or workshop.received == {0: [3, 1]}


def test_rows_are_cut_where_the_model_takes_no_more_whatever_the_settings_say(tmp_path):
    workshop = Workshop(tmp_path / "home", base_model=str(tmp_path / "short"))
    model, tokenizer = base_model.load_model, base_model.load_tokenizer
    tiny = tokenizer("tiny", trust_remote_code=False)
    tiny.model_max_length = 32
    tiny.save_pretrained(tmp_path / "short")
    model("tiny", dtype=None, attn_implementation="auto", trust_remote_code=False).save_pretrained(tmp_path / "short")
    _, facts = workshop.prepare("a", [chat("x", "y" * 100)])
    workshop.close()
    assert (facts["cut_at"], facts["longest"], facts["truncated_rows"]) == (32, 32, 1)


AMPERE, TURING = SimpleNamespace(major=8), SimpleNamespace(major=7)


@pytest.mark.parametrize(
    ("dtype", "generation", "told"),
    [
        ("auto", AMPERE, "cuda with bf16 (Some GPU, which computes in bf16)"),
        ("bfloat16", AMPERE, "cuda with bf16 (Some GPU, which computes in bf16)"),
        ("auto", TURING, "cuda (Some GPU, which cannot compute in bf16)"),
        ("float32", AMPERE, "cuda (Some GPU, dtype is set to float32)"),
    ],
)
def test_a_gpu_trains_in_bf16_where_it_can_and_may(monkeypatch, dtype, generation, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: generation)
    # A Turing holds bf16 numbers and computes with them, by emulation.
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)
    assert str(base_model.find_device(dtype)) == told


def test_without_a_gpu_the_cpu_trains_in_full_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = base_model.find_device()
    assert (found.name, found.bf16) == ("cpu", False)
    assert found.why in ("torch sees no CUDA device", "this torch is built for the CPU only")
