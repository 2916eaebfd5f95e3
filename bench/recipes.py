"""What people do today to go on with a model file after file, each as short as its documentation has it.

    python -m bench.recipes NAME FILE HOME [STEPS]

trains this file now; a second call goes on from a kill, as far as it can.

HOME holds `base/`, the model to begin with, and what the recipe keeps.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.running import lines_of
from longrun.training.serve import keep_to_one_gpu

BATCH, RATE, SAVE_STEPS = 8, 2e-5, 2
STEPS = {"save_steps": SAVE_STEPS, "logging_steps": 1, "learning_rate": RATE, "report_to": "none"}

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import Trainer


def num_train_epochs(file: Path, home: Path) -> None:
    """One output folder, gone on with: the first thing that people try."""
    _resumed(_trainer(home / "base", file, home / "out", num_train_epochs=1), home / "out")


def cumulative_max_steps(file: Path, home: Path, **more: Any) -> None:
    """The step count is put right: what was trained before plus what this file needs."""
    target = _global_step(home / "out") + math.ceil(_rows(file) / BATCH)
    _resumed(_trainer(home / "base", file, home / "out", max_steps=target, **more), home / "out")


def ignore_data_skip(file: Path, home: Path) -> None:
    """And no batches are skipped."""
    cumulative_max_steps(file, home, ignore_data_skip=True)


def new_run_each_file(file: Path, home: Path) -> None:
    """A fresh Trainer for each file, from the model that the last one left; a cut-off run is resumed."""
    out = home / file.stem
    trainer = _trainer(_last_model(home, file), file, out, num_train_epochs=1)
    _resumed(trainer, out)
    trainer.save_model(str(out / "model"))


def sft_trainer(file: Path, home: Path) -> None:
    """TRL's trainer on the rows as they are, one output folder."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(str(home / "out"), per_device_train_batch_size=BATCH, num_train_epochs=1, **_on_cpu())
    rows = load_dataset("json", data_files=str(file), split="train")
    _resumed(SFTTrainer(str(home / "base"), args=arguments, train_dataset=rows), home / "out")


def trl_cli(file: Path, home: Path) -> None:
    """`trl sft` for each file, from the model that the last one left."""
    data = home / "data" / file.stem  # it takes a folder
    data.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, data / "train.jsonl")
    out = home / file.stem / "model"
    settings = _on_cpu() | {"per_device_train_batch_size": BATCH, "num_train_epochs": 1, "output_dir": out}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    command = ["trl", "sft", f"--model_name_or_path={_last_model(home, file)}", f"--dataset_name={data}", *flags]
    os.execvp("trl", command)


def axolotl(file: Path, home: Path) -> None:
    """`axolotl train` for each file, from the model that the last one left; it resumes by itself."""
    rows = {"path": str(file), "ds_type": "json", "type": "chat_template", "field_messages": "messages"}
    settings = {
        "base_model": str(_last_model(home, file)),
        "datasets": [rows],
        "output_dir": str(home / file.stem / "model"),
        "auto_resume_from_checkpoints": True,
        "sequence_len": 2048,
        "micro_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "val_set_size": 0,
        "optimizer": "adamw_torch",
        "learning_rate": RATE,
        "save_steps": SAVE_STEPS,
        "logging_steps": 1,
    }
    settings |= {"bf16": "auto"} if _has_gpu() else {"bf16": False, "fp16": False, "tf32": False}
    config = home / f"{file.stem}.yaml"
    config.write_text(json.dumps(settings))  # JSON is YAML, too
    os.execvp("axolotl", ["axolotl", "train", str(config)])


def llamafactory(file: Path, home: Path) -> None:
    """`llamafactory-cli train` for each file, from the model that the last one left; it resumes by itself."""
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    rows = {"file_name": str(file), "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (home / "dataset_info.json").write_text(json.dumps({file.stem: rows}))
    settings = {
        "model_name_or_path": str(_last_model(home, file)),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": str(home),
        "dataset": file.stem,
        "template": "default",
        "output_dir": str(home / file.stem / "model"),
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        **STEPS,
    }
    config = home / f"{file.stem}.yaml"
    config.write_text(json.dumps(settings))
    os.execvp("llamafactory-cli", ["llamafactory-cli", "train", str(config)])


def plain(file: Path, home: Path) -> None:
    """One run over one file at a constant rate, with a checkpoint every so many steps, the last argument.

    The loss is on what the assistant says.
    """
    settings = {"num_train_epochs": 1, "lr_scheduler_type": "constant", "save_total_limit": 2}
    settings |= {"save_steps": int(sys.argv[4]), "logging_steps": 10, "bf16": _has_gpu()}
    trainer = _trainer(_last_model(home, file), file, home / file.stem, answers=True, **settings)
    trainer.train()
    trainer.save_model(str(home / file.stem / "model"))


def answers_only(file: Path, home: Path, **more: Any) -> None:
    """The Trainer as it is set up without a word, but for the loss: on what the assistant says."""
    _trainer(home / "base", file, home / "out", answers=True, num_train_epochs=1, **(_seldom() | more)).train()


def answers_by_length(file: Path, home: Path) -> None:
    """And rows of similar length in a batch, the Trainer's own way: it gives up the random order."""
    answers_only(file, home, train_sampling_strategy="group_by_length")


def sft_defaults(file: Path, home: Path, **more: Any) -> None:
    """TRL's trainer as it is set up without a word, but for the loss: on what the assistant says."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    settings = _on_cpu() | _seldom() | {"bf16": True, "num_train_epochs": 1, "assistant_only_loss": True, **more}
    arguments = SFTConfig(str(home / "out"), per_device_train_batch_size=BATCH, **settings)
    rows = load_dataset("json", data_files=str(file), split="train")
    SFTTrainer(str(home / "base"), args=arguments, train_dataset=rows).train()


def sft_in_full(file: Path, home: Path) -> None:
    """In the precision of the device, and with nothing computed twice to save memory."""
    sft_defaults(file, home, bf16=_has_gpu(), gradient_checkpointing=False)


# -- shared


def _trainer(model: Path, file: Path, out: Path, *, answers: bool = False, **arguments: Any) -> Trainer:
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [row["messages"] for row in lines_of(file)]
    encoded = [
        tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=answers)
        for messages in rows
    ]
    return Trainer(
        AutoModelForCausalLM.from_pretrained(model),
        TrainingArguments(str(out), per_device_train_batch_size=BATCH, **(_on_cpu() | arguments)),
        DataCollatorForSeq2Seq(tokenizer),
        Dataset.from_list([{"input_ids": row["input_ids"], "labels": _labels(row)} for row in encoded]),
        processing_class=tokenizer,
    )


def _labels(row: Mapping[str, list[int]]) -> list[int]:
    """All tokens, or the assistant's where they are marked."""
    marks = row.get("assistant_masks", [1] * len(row["input_ids"]))
    return [token if mark else -100 for token, mark in zip(row["input_ids"], marks, strict=True)]


def _seldom() -> dict[str, Any]:
    """The Trainer's defaults where STEPS has others; on a GPU in bf16, as everybody trains there."""
    return {"save_steps": 500, "logging_steps": 500, "bf16": _has_gpu()}


def _on_cpu() -> dict[str, Any]:
    return STEPS | {"use_cpu": not _has_gpu()}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _resumed(trainer: Trainer, out: Path) -> None:
    from transformers.trainer_utils import get_last_checkpoint

    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.is_dir() else None)


def _global_step(out: Path) -> int:
    from transformers.trainer_utils import get_last_checkpoint

    last = get_last_checkpoint(str(out)) if out.is_dir() else None
    return int(json.loads((Path(last) / "trainer_state.json").read_text())["global_step"]) if last else 0


def _rows(file: Path) -> int:
    return len(lines_of(file))


def _last_model(home: Path, file: Path) -> Path:
    """What the file before this one left; files have their order in their names' list."""
    names: list[str] = json.loads((home / "files.json").read_text())
    before = names[: names.index(file.stem)] if file.stem in names else []
    return home / before[-1] / "model" if before else home / "base"


RECIPES: tuple[Callable[[Path, Path], None], ...] = (
    num_train_epochs,
    cumulative_max_steps,
    ignore_data_skip,
    new_run_each_file,
    sft_trainer,
    trl_cli,
    axolotl,
    llamafactory,
    plain,
    answers_only,
    answers_by_length,
    sft_defaults,
    sft_in_full,
)

if __name__ == "__main__":
    keep_to_one_gpu()  # as Longrun does; over several a Trainer trains more rows a step
    {recipe.__name__: recipe for recipe in RECIPES}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
