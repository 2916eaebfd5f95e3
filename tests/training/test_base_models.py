"""Real architectures with real chat templates, tiny and random, from the base model to a published one."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from longrun.errors import BadConfig, BadFile
from longrun.training import base_model
from longrun.training.ask import ask
from longrun.training.tiny import make_model, make_tokenizer
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_built_in_model_is_as_wide_as_was_asked_for(dtype):
    asked = {"dtype": dtype, "attn_implementation": "auto", "trust_remote_code": False}
    assert base_model.load_model("tiny", **asked).dtype == dtype


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


@pytest.fixture
def base(tmp_path):
    """The tiny model as a folder, to be spoilt."""
    folder = tmp_path / "base"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def workshop(tmp_path, base):
    made = Workshop(tmp_path / "home", base_model=str(base))
    yield made
    made.close()


def test_a_model_outlives_the_folder_that_it_grew_from(workshop, base):
    first, second = (workshop.prepare(name, 12) for name in "ab")
    workshop.train(*first)
    shutil.rmtree(base)
    workshop.restart()
    workshop.train(*second)
    assert workshop.newest.global_step == 2
    assert workshop.newest.lineage.base_model == str(base)


def test_settings_of_generation_that_transformers_only_warns_of_keep_no_checkpoint_from_being_written(workshop, base):
    """It refuses to save them as soon as a token of them is changed to the tokenizer's, which training begins with."""
    path = base / "generation_config.json"
    settings = {key: value for key, value in json.loads(path.read_text()).items() if key != "pad_token_id"}
    path.write_text(json.dumps({**settings, "temperature": 0.9, "top_p": 0.8}))
    workshop.train_file("a", 12)
    told = json.loads((workshop.home.model / "generation_config.json").read_text())
    assert "temperature" not in told
    assert told["pad_token_id"] == make_tokenizer().pad_token_id


def test_settings_of_generation_that_are_in_force_stay(workshop, base):
    path = base / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": True, "temperature": 0.9}))
    workshop.train_file("a", 12)
    assert json.loads((workshop.home.model / "generation_config.json").read_text())["temperature"] == 0.9


def test_rows_are_filled_up_with_a_token_that_the_model_has(workshop, base):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<filler>"})  # and the model was not resized
    tokenizer.save_pretrained(base)
    workshop.train_file("a", 37)
    assert workshop.times_trained(0, 4, 37) == {1: 37}


def test_a_row_with_a_token_that_the_model_has_not_rejects_its_file_with_the_word(workshop, base):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<strange>"])
    tokenizer.save_pretrained(base)
    with pytest.raises(BadFile, match=r"its rows have the token '<strange>' \(\d+\), and the model has tokens up to"):
        workshop.train_file("a", [chat("hello", "a <strange> answer")])


def test_rows_longer_than_the_learnt_positions_of_a_model_are_told_before_they_are_trained(workshop, base):
    tokenizer = make_tokenizer()
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2)
    shutil.rmtree(base)
    GPT2LMHeadModel(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    with pytest.raises(BadConfig, match="this model has learnt 32 positions") as caught:
        workshop.train_file("a", [chat("x", "y" * 100)])
    assert caught.value.hint == "set max_length = 32 below [train]"
    workshop.with_recipe(max_length=32)
    workshop.train_file("b", [chat("x", "y" * 100)])
    assert workshop.newest.global_step == 1


def test_a_base_model_whose_files_lack_weights_is_not_trained_from_random_ones(workshop, base):
    weights = load_file(base / "model.safetensors")
    save_file(
        {f"module.{name}": tensor for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(BadConfig, match=r"of its weights are not in its files \(.*, and would be random numbers"):
        workshop.train_file("a", 12)


def test_dynamic_rope_lets_no_step_know_of_the_rows_before_it(tmp_path, base):
    config = json.loads((base / "config.json").read_text())
    config |= {
        "max_position_embeddings": 48,
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    }
    (base / "config.json").write_text(json.dumps(config))
    states = []
    for restarts in (False, True):
        made = Workshop(tmp_path / f"home-{restarts}", base_model=str(base))
        made.train_file("a", [chat("x", "y" * 200)] * 12)
        if restarts:
            made.restart()
        made.train_file("b", [chat("x", "y" * length) for length in range(50, 98)])
        states.append(made.state())
        made.close()
    assert states[0] == states[1]


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


def test_the_cpu_trains_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(base_model.find_device(use_cpu=True)) == "cpu (use_cpu is set)"


def test_without_a_gpu_the_cpu_trains_in_full_precision(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = base_model.find_device()
    assert (found.name, found.bf16) == ("cpu", False)
    assert found.why in ("torch sees no CUDA device", "this torch is built for the CPU only")
