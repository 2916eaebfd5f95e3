"""The two child processes of the daemon, from their first line to their last word."""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from longrun import disk, locks, process, wire
from longrun.errors import BadConfig, BadFile, LongrunError, ModelRemoved

if TYPE_CHECKING:
    from longrun.home import Home
    from longrun.training.masks import Encoder
    from longrun.training.run import Line, Runner

LOCK_WAIT_S = 60.0
WHY_CHARACTERS = 300


def be_a_child() -> None:
    """Live and die with the daemon: Ctrl-C is its to handle, and nobody else is left to do so once it is gone."""
    process.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


# -- the worker


def worker(home: Home, socket: Path, options_json: str) -> None:
    """Train what the daemon says, until it is gone. With several processes, one of which this is, the first leads."""
    be_a_child()
    if int(os.environ.get("RANK", "0")):
        _work(home, options_json, None)
        return
    with locks.Lock.take(home.model_lock, what="training worker", wait_s=LOCK_WAIT_S):
        _work(home, options_json, wire.connect(socket))


def _work(home: Home, options_json: str, channel: wire.Channel | None) -> None:
    if "WORLD_SIZE" not in os.environ:
        keep_to_one_gpu()
    from longrun.training.run import Options, Runner, Silence

    line = channel or Silence()
    runner = Runner(home, Options.from_json(options_json), line)
    line.send(wire.Hello(pid=os.getpid(), role="worker", device=str(runner.device)))
    try:
        while True:
            for message in runner.world.share(channel.receive(None) if channel else []):
                if isinstance(message, wire.Train):
                    _train(runner, home, line, message)
    except wire.Closed:
        # The other processes wait for a word that will not come; the launcher ends them with this one.
        sys.exit(runner.world.size > 1)


def keep_to_one_gpu() -> None:
    """Hide all GPUs but the first that may be seen: over several, the Trainer of one process splits every batch."""
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


def _train(runner: Runner, home: Home, channel: Line, task: wire.Train) -> None:
    """One run. After a failure the process ends: what is in its memory is not to be trusted."""
    try:
        channel.send(runner.run(task))
    except wire.Closed:
        raise
    except Exception as error:  # noqa: BLE001  (whatever it is, the daemon must hear of it)
        traceback.print_exc()
        last_word = _in_words(task, error, home)
        channel.send(last_word)
        if not runner.world.leads and last_word.kind != "crash":  # that may be that it has lost another
            disk.write_file(home.last_word, wire.encode(last_word))
        sys.exit(1)


def _in_words(task: wire.Train, error: Exception, home: Home) -> wire.Failed:
    from longrun.training.base_model import is_out_of_memory
    from longrun.training.data import DamagedRows
    from longrun.training.metrics import Diverged
    from longrun.training.run import DiskFull

    job, said = task.plan["job"], str(error).strip() or type(error).__name__
    if isinstance(error, Diverged):
        numbers = [row + 1 for row in error.rows]
        return wire.Failed(
            job=job,
            kind="diverged",
            why=f"{error}, training rows {', '.join(map(str, numbers))}",
            hint="look at these rows; if they are good, lower learning_rate or set max_grad_norm",
            global_step=error.global_step,
            rows=numbers,
        )
    if isinstance(error, ModelRemoved):
        return wire.Failed(job=job, kind="model removed", why=said)
    if isinstance(error, BadFile):
        return wire.Failed(job=job, kind=error.kind, why=error.why, hint=error.hint)
    if isinstance(error, DamagedRows):
        return wire.Failed(job=job, kind="prepared rows", why=said)
    if isinstance(error, DiskFull) or (isinstance(error, OSError) and _is_of_the_disk(error, home)):
        return wire.Failed(job=job, kind="disk", why=said)
    if isinstance(error, BadConfig):
        return wire.Failed(job=job, kind="base model", why=error.message, hint=error.hint)
    if isinstance(error, OSError):  # a compiler that is not there, a server that does not answer: no file opens these
        return wire.Failed(job=job, kind="base model", why=f"{type(error).__name__}: {said}")
    if is_out_of_memory(error):
        return wire.Failed(job=job, kind="out of memory", why=f"out of memory: {said.splitlines()[0]}")
    hint = error.hint if isinstance(error, LongrunError) else ""
    in_one_line = " ".join(said.split())[:WHY_CHARACTERS]
    return wire.Failed(job=job, kind="crash", why=f"{type(error).__name__}: {in_one_line}", hint=hint)


def _is_of_the_disk(error: OSError, home: Home) -> bool:
    """Whether what the home is on refused it."""
    number, name = error.errno, error.filename
    below = isinstance(name, str) and Path(name).is_relative_to(home.root)
    return below or number in disk.NO_FILES_FAULT or number == errno.EIO


# -- the preparer


class Preparer:
    def __init__(self, channel: wire.Channel) -> None:
        self._channel = channel
        self._encoders: dict[tuple[str, int], Encoder] = {}
        self._base_files = ""

    def do(self, task: wire.Examine | wire.Prepare) -> wire.Message:
        try:
            return self._examine(task) if isinstance(task, wire.Examine) else self._prepare(task)
        except BadFile as error:
            return wire.Refused(job=task.job, reason=error.reason())
        except BadConfig as error:
            return wire.Failed(job=task.job, kind="base model", why=error.message, hint=error.hint)
        except OSError as error:
            kind = "disk" if error.errno in disk.NO_FILES_FAULT else "crash"
            return wire.Failed(job=task.job, kind=kind, why=str(error))

    def _examine(self, task: wire.Examine) -> wire.Examined:
        from longrun.examine import examine

        found = examine(
            Path(task.path),
            on_bad_row=task.on_bad_row,
            max_line_bytes=task.max_line_bytes,
            alive=lambda rows: self._channel.send(wire.Alive(doing=f"{rows} rows read")),
        )
        facts = {**vars(found), "format": found.format.value, "on_bad_row": task.on_bad_row}
        return wire.Examined(job=task.job, facts=facts)

    def _prepare(self, task: wire.Prepare) -> wire.Prepared:
        from longrun.training.prepare import prepare

        facts = prepare(task, self._encoder(task), lambda doing: self._channel.send(wire.Alive(doing=doing)))
        return wire.Prepared(job=task.job, facts=facts)

    def _encoder(self, task: wire.Prepare) -> Encoder:
        """The encoder of the base model: kept, because all models of a lineage share its tokenizer.

        Until there is a model, somebody may edit the template in the base model's folder, as a refusal advises.
        """
        key = (task.base_model, task.max_length)
        if task.base_files not in ("", self._base_files) or key not in self._encoders:
            from longrun.training.base_model import load_tokenizer
            from longrun.training.masks import Encoder

            tokenizer = load_tokenizer(task.tokenizer, trust_remote_code=task.trust_remote_code)
            self._encoders, self._base_files = {key: Encoder(tokenizer, max_length=task.max_length)}, task.base_files
            gc.freeze()
        return self._encoders[key]


def preparer(socket: Path) -> None:
    """Examine and prepare files, until the daemon is gone. Heavy imports come with the first file to tokenise."""
    be_a_child()
    process.return_large_blocks()
    channel = wire.connect(socket)
    channel.send(wire.Hello(pid=os.getpid(), role="preparer"))
    work = Preparer(channel)
    try:
        while True:
            for message in channel.receive(None):
                if isinstance(message, wire.Examine | wire.Prepare):
                    channel.send(work.do(message))
    except wire.Closed:
        return
