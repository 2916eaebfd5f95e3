"""Watches and breaks Longrun's processes from outside: put this folder on PYTHONPATH and every child loads it.

    LONGRUN_PROBE=FOLDER   append what each training step really received to FOLDER/batches.jsonl
    LONGRUN_FAULTS=JSON    a list of {"at": "module:function", "role": "daemon|worker|preparer", "nth": 1,
                           "when": "before|after", "do": "kill|oom|hang|nan|ENOSPC|...", "row": "text", "rows_over": 0,
                           "about": "text", "rank": "1", "once": "name"}
    LONGRUN_CHILDREN=FILE    the program that the daemon starts as worker and preparer instead of train.py
    LONGRUN_CALL=JSON        {"role": "daemon", "nth": 5, "how": "SIGKILL", "trace": FILE}: what tests/drills/faults.py
                             does at the nth call that changes the disk, in the first process of this role only;
                             FILE lists the calls
    LONGRUN_CLOCK_JUMPS=S    the time of day jumps by so many seconds, back or forth, whenever it is asked for
    LONGRUN_RECORD=JSON      {"log": FILE, "ledger": FILE, "clones": false}: tests/drills/recorder.py writes down what
                             every process does to the disk
    LONGRUN_FREE_BYTES=FILE  while FILE exists, the number in it is what is free on the disk

The product has no test hooks: functions are wrapped here when their module is imported, or was. A fault at
`transformers.trainer:Trainer.training_step` may ask for a batch that contains a row (`row`) or is larger than
`rows_over`; any fault may ask for arguments that mention a text (`about`) and,
of several processes, for one (`rank`). Each fault strikes once a process, at
its nth call, or every time with "nth": 0; with "once" it strikes once in all, unless its mark is there already.

    kill         this process           kill daemon   its parent           kill both   its parent, then itself
    hang         for an hour            slow          for a tenth of a second
    oom          as if a device had no memory left     device full   really (needs CUDA)
    eat          all memory that the system gives       segfault
    remove model `rm -rf current_model/`
    damage       a byte more in a file of each checkpoint
    take away    the file that LONGRUN_TAKE_AWAY names
    write slowly 10 MB a second into the staging folder, for three seconds
"""

from __future__ import annotations

import errno
import functools
import importlib.abc
import importlib.machinery
import json
import os
import random
import signal
import subprocess
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
        launch = os.environ.get("TORCHELASTIC_RUN_ID", str(os.getpid()))  # one for all processes of a worker
        step = trainer.state.global_step
        line = {"pid": os.getpid(), "launch": launch, "global_step": step, "texts": texts(trainer, inputs)}
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
        if os.environ.get("RANK", "0") != fault.get("rank", os.environ.get("RANK", "0")):
            return function(*arguments, **options)
        if "about" in fault and fault["about"] not in repr(arguments):
            return function(*arguments, **options)
        calls += 1
        strikes = fault.get("nth", 0 if "once" in fault else 1) in (0, calls) and is_first(fault.get("once"))
        if strikes and fault.get("when", "before") == "before":
            strike(fault["do"])
        result = function(*arguments, **options)
        if strikes and fault["do"] == "nan":
            return result * float("nan")
        if strikes and fault.get("when") == "after":
            strike(fault["do"])
        return result

    return faulty


def is_first(name: str | None) -> bool:
    """Whether nobody struck under this name before, in any process; a fault without a name may always strike."""
    if name is None:
        return True
    try:
        (Path(os.environ["LONGRUN_PROBE"]) / f"struck-{name}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def strike(how: str) -> None:
    if how in STRIKES:
        STRIKES[how]()
    else:
        raise OSError(getattr(errno, how), os.strerror(getattr(errno, how)))


def kill_parent() -> None:
    os.kill(os.getppid(), signal.SIGKILL)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_both() -> None:
    kill_parent()
    kill()


def remove_model() -> None:
    """By a process of its own: the daemon kills this one as soon as it sees that the model goes."""
    model = Path(os.environ["LONGRUN_PROBE"]).parent / "current_model"
    subprocess.run(["rm", "-rf", str(model)], start_new_session=True, check=False)


def damage_checkpoints() -> None:
    for folder in (Path(os.environ["LONGRUN_PROBE"]).parent / "current_model").glob("checkpoint-*"):
        with (folder / "trainer_state.json").open("a") as file:
            file.write(" ")


def write_slowly() -> None:
    slow = Path(os.environ["LONGRUN_PROBE"]).parent / "state" / "staging" / "slow"
    for _ in range(30):
        with slow.open("a") as file:
            file.write("x" * (1 << 20))
        time.sleep(0.1)
    slow.unlink()


def say_no_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory (as a test)")


def fill_device() -> None:
    import torch

    torch.empty(1 << 48, dtype=torch.uint8, device="cuda")


def eat_memory() -> None:
    eaten = []
    while True:
        eaten.append(bytearray(b"x" * (1 << 20)))


def read_nowhere() -> None:
    import ctypes

    ctypes.string_at(0)


STRIKES = {
    "kill": kill,
    "kill daemon": kill_parent,
    "kill both": kill_both,
    "hang": lambda: time.sleep(3600),
    "slow": lambda: time.sleep(0.1),
    "remove model": remove_model,
    "damage": damage_checkpoints,
    "write slowly": write_slowly,
    "take away": lambda: Path(os.environ["LONGRUN_TAKE_AWAY"]).unlink(),
    "oom": say_no_memory,
    "device full": fill_device,
    "eat": eat_memory,
    "segfault": read_nowhere,
    "nan": lambda: None,  # what was returned is spoilt
}


def told(function):
    @functools.wraps(function)
    def free_bytes(folder):
        try:
            return int(Path(os.environ["LONGRUN_FREE_BYTES"]).read_text())
        except FileNotFoundError:
            return function(folder)

    return free_bytes


def jumping(clock, by_s: float):
    @functools.wraps(clock)
    def jumped():
        return clock() + random.choice((-by_s, 0.0, by_s))

    return jumped


def wrap(module, target: str, wrapper) -> None:
    owner = module
    *path, name = target.split(".")
    for part in path:
        owner = getattr(owner, part)
    WRAPPED.append((owner, name, getattr(owner, name)))
    setattr(owner, name, wrapper(getattr(owner, name)))


WRAPPED: list[tuple[object, str, object]] = []  # with what was there before


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


class Trace(list):
    """Calls, written down one by one: the process may not live to tell them in the end."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        self.write = os.write  # as it is before faults are installed

    def append(self, line: str) -> None:
        super().append(line)
        self.write(self.file, line.encode("utf-8", "backslashreplace") + b"\n")


def install(wrappers: dict[str, list]) -> None:
    """Wrap now what is imported already, and the rest when it is."""
    for name in [name for name in wrappers if name in sys.modules]:
        for function, wrapper in wrappers.pop(name):
            wrap(sys.modules[name], function, wrapper)
    if wrappers:
        sys.meta_path.insert(0, Finder(wrappers))


def uninstall() -> None:
    """Take back what the process has wrapped of which this one is a fork."""
    while WRAPPED:
        setattr(*WRAPPED.pop())


def main() -> None:
    uninstall()
    wrappers: dict[str, list] = {}
    for fault in json.loads(os.environ.get("LONGRUN_FAULTS", "[]")):
        if fault.get("role", role()) == role():
            module, _, function = fault["at"].partition(":")
            wrappers.setdefault(module, []).append((function, functools.partial(broken, fault=fault)))
    if "LONGRUN_PROBE" in os.environ:
        module, _, function = TRAINING_STEP.partition(":")
        # Innermost, so that a batch is recorded only if a fault let it through.
        wrappers.setdefault(module, []).insert(0, (function, record))
    call = json.loads(os.environ.get("LONGRUN_CALL", "{}"))
    if call.get("role") == role() and not Path(call["trace"]).exists():
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        from tests.drills.faults import Faults

        Faults(call["nth"], call["how"], Trace(call["trace"])).install()
    if "LONGRUN_CLOCK_JUMPS" in os.environ:
        time.time = jumping(time.time, float(os.environ["LONGRUN_CLOCK_JUMPS"]))
    if "LONGRUN_RECORD" in os.environ:
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        from tests.drills.recorder import Recorder

        said = json.loads(os.environ["LONGRUN_RECORD"])
        ledger = Path(said["ledger"]) if role() == "daemon" and "run" in sys.argv else None
        Recorder(Path(said["log"]), ledger=ledger, clones=said["clones"]).install()
    if "LONGRUN_CHILDREN" in os.environ:
        wrappers.setdefault("longrun.worker", []).append(("PROGRAM", lambda _: Path(os.environ["LONGRUN_CHILDREN"])))
    if "LONGRUN_FREE_BYTES" in os.environ:
        wrappers.setdefault("longrun.disk", []).append(("free_bytes", told))
    install(wrappers)


main()
