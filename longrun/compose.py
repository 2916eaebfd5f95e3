"""Putting the daemon together: locks, checks that must hold before anything is touched, then its parts."""

from __future__ import annotations

import importlib.util
import sqlite3
import subprocess
import sys
import time
import uuid
from typing import TYPE_CHECKING, Any

from longrun import checkpoint, config, disk, locks, process, requests
from longrun.context import Context
from longrun.errors import BadConfig, BadModel, ExitCode, Locked, LongrunError, ModelRemoved
from longrun.journal import Journal
from longrun.ledger import Ledger
from longrun.loop import Daemon
from longrun.notify import Notifier
from longrun.worker import PROGRAM

if TYPE_CHECKING:
    from pathlib import Path

    from longrun.home import Home

FORMER_WORKER_S = 60.0
NEEDED = ("torch", "transformers", "accelerate", "datasets", "trl", "watchdog")
HOME_ID = "home id"  # in the ledger
HUB_ANSWERS_S = 12.0  # with the interpreter's start, below the 15 s in which a user wants to know


def run(home: Home, flags: dict[str, Any], *, drain: bool = False, by_hand: list[Path] | None = None) -> int:
    """Run the daemon on `home` until it leaves; the exit code. Locked, BadConfig before anything was changed."""
    check_packages()
    process.return_large_blocks(32 << 10)  # nothing here is quick because of them
    process.meet_many_names()
    settings = config.load(home.settings, flags=flags)
    home.check()
    home.make()
    for folder in (home.state, home.root):  # also what a start before this one made
        disk.sync_folder(folder)
    if by_hand:
        what, hint = "train.py by hand", "drop the files into inbox/ instead, or `daemon.py stop` it first"
    else:
        what, hint = "the Longrun daemon", "`daemon.py status` tells what it does, `daemon.py stop` ends it"
    with locks.Lock.take(home.daemon_lock, what=what, hint=hint) as lock:
        if (drain or by_hand) and requests.pending(home, requests.PAUSE) is not None:
            raise LongrunError(
                f"training is paused in {home.root}, so this would wait for ever", hint="`daemon.py resume`"
            )
        for void in (requests.STOP, requests.SKIP):  # they were for the daemon before
            requests.clear(home, void)
        check_one_file_system(home)
        wait_for_former_worker(home)
        ledger = Ledger.open(home.ledger)
        try:
            notifier = Notifier()
            context = Context(
                home=home,
                home_id=identify(home, ledger),
                settings=settings,
                flags=flags,
                ledger=ledger,
                journal=Journal(home, settings.log),
                verifier=checkpoint.Verifier(notifier.patience),
                notifier=notifier,
                lock=lock,
            )
            check_base_model(context)
            clean = Daemon(context, drain=drain or by_hand is not None, files=by_hand).run()
        except sqlite3.Error as error:
            why = f"cannot go on: the ledger {home.ledger}: {error}"
            raise LongrunError(why, hint="start again; a ledger that was moved away is made anew") from error
        finally:
            ledger.close()
    return ExitCode.OK if clean or not (drain or by_hand) else ExitCode.FAILURE


def check_packages() -> None:
    """ModuleNotFoundError before anything is begun, as where the virtual environment was forgotten."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"{sys.executable} has no module {name}")


def identify(home: Home, ledger: Ledger) -> str:
    """What this home is called in the models it trains. Kept twice: without it all that was trained would seem lost."""
    known = home.id or ledger.fact(HOME_ID) or uuid.uuid4().hex
    if home.id != known:
        disk.write_file(home.id_file, known.encode())
    if ledger.fact(HOME_ID) != known:
        ledger.set_fact(HOME_ID, known)
    return known


def check_one_file_system(home: Home) -> None:
    """Moves between these folders must be renames, or they would not be atomic."""
    device = home.state.stat().st_dev
    for folder in (home.model, home.trained, home.rejected, home.jobs, home.staging):
        if folder.exists() and folder.stat().st_dev != device:
            raise BadConfig(
                f"{folder} is on another file system than {home.state}",
                hint="keep the home on one file system (only inbox/ may be elsewhere); --home chooses the place",
            )


def wait_for_former_worker(home: Home) -> None:
    """A worker whose daemon was killed dies with it; where the kernel does not see to that, wait for it."""
    deadline = time.monotonic() + FORMER_WORKER_S
    while (former := locks.holder(home.model_lock)) is not None:
        if time.monotonic() > deadline:
            raise Locked(
                f"cannot start: a former training worker (pid {former.get('pid')}) still holds {home.model}",
                hint=f"end it with `kill {former.get('pid')}`",
            )
        time.sleep(0.1)


def check_base_model(context: Context) -> None:
    """BadConfig when training could not even begin, or would go on from another base model than was asked for."""
    try:
        newest = context.newest()
    except (BadModel, Locked, ModelRemoved):
        return  # a running daemon says so, and waits for a person, or for the restore or removal that is under way
    if newest is not None:
        config.check_model(context.settings, newest.lineage, context.home.root)
        return
    ask_for_base_model(context.settings.model.base_model)


def ask_for_base_model(source: str) -> None:
    """BadConfig when there is no such base model, or its hub does not answer."""
    command = [sys.executable, str(PROGRAM), "--check-base", source]
    if source == config.TINY:
        return
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=HUB_ANSWERS_S, check=False)
    except subprocess.TimeoutExpired:
        why = f"the model hub did not answer within {HUB_ANSWERS_S:g} s"
        raise BadConfig(
            f"cannot load the base model {source}: {why}",
            hint="give a local folder, or check the network and HF_ENDPOINT; `daemon.py demo` needs no download",
        ) from None
    if answer.returncode:
        last = answer.stderr.strip().splitlines()[-1:] or ["it cannot be loaded"]
        raise BadConfig(last[0].removeprefix("train.py: "))
