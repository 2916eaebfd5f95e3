"""Watches and breaks Longrun's processes from outside: put this folder on PYTHONPATH and every child loads it.

    LONGRUN_PROBE=FOLDER   append what each training step really received to FOLDER/batches.jsonl
    LONGRUN_FAULTS=JSON    a list of {"at": "module:function", "role": "daemon|worker|preparer", "nth": 1,
                           "when": "before|after", "do": "kill|oom|hang|nan|ENOSPC", "row": "text", "rows_over": 0}

The product has no test hooks: functions are wrapped here when their module has been imported. A fault at
`transformers.trainer:Trainer.training_step` may ask for a batch that contains a row (`row`) or is larger than
`rows_over`. Each fault strikes once a process, at its nth call, or every time with "nth": 0.
"""

from __future__ import annotations

import errno
import functools
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
from pathlib import Path

TRAINING_STEP = "transformers.trainer:Trainer.training_step"


def role() -> str:
    arguments = " ".join(sys.argv)
    return "worker" if "--worker" in arguments else "preparer" if "--preparer" in arguments else "daemon"


def texts(trainer, inputs) -> list[str]:
    """The rows of a batch as the model receives them, padding left out."""
    masks = inputs["attention_mask"].bool()
    return [
        trainer.processing_class.decode(ids[mask].tolist())
        for ids, mask in zip(inputs["input_ids"], masks, strict=True)
    ]


def record(function):
    @functools.wraps(function)
    def recorded(trainer, model, inputs, *rest, **options):
        line = {"pid": os.getpid(), "global_step": trainer.state.global_step, "texts": texts(trainer, inputs)}
        with (Path(os.environ["LONGRUN_PROBE"]) / "batches.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return function(trainer, model, inputs, *rest, **options)

    return recorded


def broken(function, fault):
    calls = 0

    @functools.wraps(function)
    def faulty(*arguments, **options):
        nonlocal calls
        if "row" in fault and not any(fault["row"] in text for text in texts(arguments[0], arguments[2])):
            return function(*arguments, **options)
        if "rows_over" in fault and len(arguments[2]["input_ids"]) <= fault["rows_over"]:
            return function(*arguments, **options)
        calls += 1
        strikes = fault.get("nth", 1) in (0, calls)
        if strikes and fault.get("when", "before") == "before":
            strike(fault["do"])
        result = function(*arguments, **options)
        if strikes and fault["do"] == "nan":
            return result * float("nan")
        if strikes and fault.get("when") == "after":
            strike(fault["do"])
        return result

    return faulty


def strike(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "hang":
        time.sleep(3600)
    elif how == "oom":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory (as a test)")
    elif how != "nan":
        raise OSError(getattr(errno, how), os.strerror(getattr(errno, how)))


def wrap(module, target: str, wrapper) -> None:
    owner = module
    *path, name = target.split(".")
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, name, wrapper(getattr(owner, name)))


class Finder(importlib.abc.MetaPathFinder):
    """Wraps functions right after their module was executed."""

    def __init__(self, wrappers: dict[str, list]) -> None:
        self.wrappers = wrappers

    def find_spec(self, name, path, target=None):
        if name not in self.wrappers:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def execute_and_wrap(module):
            execute(module)
            for function, wrapper in self.wrappers[name]:
                wrap(module, function, wrapper)

        spec.loader.exec_module = execute_and_wrap
        return spec


def main() -> None:
    wrappers: dict[str, list] = {}
    for fault in json.loads(os.environ.get("LONGRUN_FAULTS", "[]")):
        if fault.get("role", role()) == role():
            module, _, function = fault["at"].partition(":")
            wrappers.setdefault(module, []).append((function, functools.partial(broken, fault=fault)))
    if "LONGRUN_PROBE" in os.environ:
        module, _, function = TRAINING_STEP.partition(":")
        # Innermost, so that a batch is recorded only if a fault let it through.
        wrappers.setdefault(module, []).insert(0, (function, record))
    if wrappers:
        sys.meta_path.insert(0, Finder(wrappers))


main()
