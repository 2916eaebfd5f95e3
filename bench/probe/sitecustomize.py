"""Counts rows where nobody can argue: at the model's forward pass in training, whoever calls it.

    BENCH_PROBE=FILE       append {"pid", "time", "run", "global_step", "learning_rate", "adam_steps", "tokens", "rows"}
                           for each forward in training; padding is no token
    BENCH_MODEL=FOLDER     whose tokenizer reads the rows; without it they are not looked for
    BENCH_RUN=NAME         what the global step counts in: one number line for each output folder
    BENCH_KILL=NAME:N      once: SIGKILL in the Nth step with rows of the file NAME, of the process and, if it is
                           Longrun's worker, of its daemon
    BENCH_PARTS=FILE       append {"pid", "time", "part", "seconds"} for each part of a file's way that is in PARTS,
                           when it ends

Rows carry their name in their text, "Row c-0032.", so that whatever tokenises, shuffles, pads or packs them, what
reaches the model tells which they are.
"""

import atexit
import functools
import importlib.abc
import importlib.machinery
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

ROW = re.compile(r"Row ([\w-]+-\d+)\.")
STEP = {"global_step": None, "learning_rate": None, "adam_steps": None}
OF_FILE = set()  # steps with rows of the file to kill at
# Counts that are on a GPU are read later, many at once: reading one waits until the GPU has done all before it.
HELD, HELD_MAX = [], 100


def seen(function):
    @functools.wraps(function)
    def forward(model, input_ids=None, *rest, **options):
        import torch

        if model.training and torch.is_grad_enabled() and input_ids is not None:
            rows = rows_in(input_ids) if "BENCH_MODEL" in os.environ else []
            kill_if_due(rows)
            mask = options.get("attention_mask")
            line = {
                "pid": os.getpid(),
                "time": time.time(),
                "run": os.environ.get("BENCH_RUN", ""),
                **STEP,
                "tokens": input_ids.numel() if mask is None else mask.sum(),
                "rows": rows,
            }
            HELD.append(line)
            if len(HELD) == HELD_MAX or "BENCH_MODEL" in os.environ or not input_ids.is_cuda:  # a kill may come
                write_held()
        return function(model, input_ids, *rest, **options)

    return forward


def written(function):
    @functools.wraps(function)
    def train(*arguments, **options):
        try:
            return function(*arguments, **options)
        finally:
            write_held()  # Longrun's worker lives on after its last file, and is killed when the daemon leaves

    return train


def write_held():
    if HELD:
        with Path(os.environ["BENCH_PROBE"]).open("a") as file:
            file.writelines(json.dumps(line, default=int) + "\n" for line in HELD)
        HELD.clear()


def rows_in(input_ids):
    return [row for ids in input_ids.tolist() for row in ROW.findall(tokenizer().decode(ids))]


@functools.cache
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(os.environ["BENCH_MODEL"])


def kill_if_due(rows):
    name, _, nth = os.environ.get("BENCH_KILL", "").partition(":")
    if not name or not any(row.startswith(f"{name}-") for row in rows):
        return
    OF_FILE.add(STEP["global_step"])
    if len(OF_FILE) == int(nth):
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
            adam_steps=remembered + 0,  # it is counted up in place
        )
        return function(trainer, *rest, **options)

    return training_step


def timed(part):
    def wrapper(function):
        @functools.wraps(function)
        def timing(*arguments, **options):
            began = time.time()
            try:
                return function(*arguments, **options)
            finally:
                now = time.time()
                with Path(os.environ["BENCH_PARTS"]).open("a") as file:
                    line = {"pid": os.getpid(), "time": now, "part": part, "seconds": now - began}
                    file.write(json.dumps(line) + "\n")

        return timing

    return wrapper


FORWARDS = [
    ("transformers.models.llama.modeling_llama", "LlamaModel.forward", seen),
    ("transformers.trainer", "Trainer.training_step", noted),
    ("transformers.trainer", "Trainer.train", written),
]
PARTS = [
    ("longrun.examine", "examine", timed("examined")),
    ("longrun.training.prepare", "prepare", timed("prepared")),
    ("longrun.training.run", "Session._evaluate", timed("evaluated")),
    ("transformers.trainer", "Trainer._save_checkpoint", timed("written")),
    ("longrun.checkpoint", "seal", timed("sealed")),
    ("longrun.disk", "hash_file", timed("hashed")),
    ("longrun.checkpoint", "publish", timed("published")),
    ("longrun.checkpoint", "retire", timed("old ones removed")),
]
WRAPPED = (FORWARDS if "BENCH_PROBE" in os.environ else []) + (PARTS if "BENCH_PARTS" in os.environ else [])


class Finder(importlib.abc.MetaPathFinder):
    """Wraps the functions right after their module was executed."""

    def find_spec(self, name, path, target=None):  # noqa: ARG002
        wanted = [(function, wrapper) for module, function, wrapper in WRAPPED if module == name]
        if not wanted:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def execute_and_wrap(module):
            execute(module)
            for function, wrapper in wanted:
                *owners, function = function.split(".")
                owner = functools.reduce(getattr, owners, module)
                setattr(owner, function, wrapper(getattr(owner, function)))

        spec.loader.exec_module = execute_and_wrap
        return spec


if "BENCH_PROBE" in os.environ:
    atexit.register(write_held)
if WRAPPED:
    sys.meta_path.insert(0, Finder())
