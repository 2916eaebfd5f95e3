"""Counts rows where nobody can argue: at the model's forward pass in training, whoever calls it.

    BENCH_PROBE=FILE       append {"pid", "run", "global_step", "learning_rate", "adam_steps", "rows"} for each forward
                           in training
    BENCH_RUN=NAME         what the global step counts in: one number line for each output folder
    BENCH_KILL=NAME:N      once: SIGKILL at the Nth forward with rows of the file NAME, of the process and, if it is
                           Longrun's worker, of its daemon

Rows carry their name in their text, "Row c-0032.", so that whatever tokenises, shuffles, pads or packs them, what
reaches the model tells which they are.
"""

import functools
import importlib.abc
import importlib.machinery
import json
import os
import re
import signal
import sys
from pathlib import Path

ROW = re.compile(r"Row ([\w-]+-\d+)\.")
STEP = {"global_step": None, "learning_rate": None, "adam_steps": None}
KILLING = [0]


def seen(function):
    @functools.wraps(function)
    def forward(model, input_ids=None, *rest, **options):
        import torch

        if model.training and torch.is_grad_enabled() and input_ids is not None:
            rows = [row for ids in input_ids.tolist() for row in ROW.findall(tokenizer().decode(ids))]
            kill_if_due(rows)
            line = {"pid": os.getpid(), "run": os.environ.get("BENCH_RUN", ""), **STEP, "rows": rows}
            with Path(os.environ["BENCH_PROBE"]).open("a") as file:
                file.write(json.dumps(line) + "\n")
        return function(model, input_ids, *rest, **options)

    return forward


@functools.cache
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(os.environ["BENCH_MODEL"])


def kill_if_due(rows):
    name, _, nth = os.environ.get("BENCH_KILL", "").partition(":")
    if not name or not any(row.startswith(f"{name}-") for row in rows):
        return
    KILLING[0] += 1
    if KILLING[0] == int(nth):
        mark = Path(os.environ["BENCH_PROBE"] + ".killed")
        if not mark.exists():
            mark.touch()
            if "--worker" in sys.argv:
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def noted(function):
    @functools.wraps(function)
    def training_step(trainer, *rest, **options):
        optimizer = trainer.optimizer
        remembered = next(iter(optimizer.state.values()), {}).get("step", 0)
        STEP.update(
            global_step=trainer.state.global_step,
            learning_rate=float(optimizer.param_groups[0]["lr"]),
            adam_steps=int(remembered),
        )
        return function(trainer, *rest, **options)

    return training_step


WRAPPED = {
    "transformers.models.llama.modeling_llama": ("LlamaModel", "forward", seen),
    "transformers.trainer": ("Trainer", "training_step", noted),
}


class Finder(importlib.abc.MetaPathFinder):
    """Wraps the functions right after their module was executed."""

    def find_spec(self, name, path, target=None):  # noqa: ARG002
        if name not in WRAPPED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def execute_and_wrap(module):
            execute(module)
            owner, function, wrapper = WRAPPED[name]
            owner = getattr(module, owner)
            setattr(owner, function, wrapper(getattr(owner, function)))

        spec.loader.exec_module = execute_and_wrap
        return spec


if "BENCH_PROBE" in os.environ:
    sys.meta_path.insert(0, Finder())
