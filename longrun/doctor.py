"""`daemon.py doctor`: a look at everything that training needs, before it is needed."""

from __future__ import annotations

import glob
import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from longrun import config, disk, locks
from longrun.commands import say
from longrun.errors import BadConfig, ExitCode, LongrunError
from longrun.wording import counted, printable
from longrun.worker import PROGRAM

if TYPE_CHECKING:
    from collections.abc import Callable

    from longrun.home import Home


DEFAULTS = config.Settings()


def run(home: Home, flags: dict[str, Any]) -> int:
    """Say what is wrong, and of the rest how it is; FAILURE if something is wrong."""
    fine = True
    for name, look in _EXAMINATIONS.items():
        try:
            verdict, good = look(home, flags), True
        except (LongrunError, OSError, subprocess.SubprocessError) as error:
            verdict, good = str(error), False
        fine &= good
        say(f"{'ok  ' if good else 'BAD '} {name:<12} {printable(verdict)}")
    return ExitCode.OK if fine else ExitCode.FAILURE


def _look_at_settings(home: Home, flags: dict[str, Any]) -> str:
    settings = config.load(home.settings, flags=flags)
    given = [
        f"{change} ({settings.sources[change.partition(' ')[0]]})" for change in config.changes(DEFAULTS, settings)
    ]
    return f"{home.settings.name}: {', '.join(given) or 'all defaults'}"


def _settings(home: Home, flags: dict[str, Any]) -> config.Settings:
    """Those in force, or the defaults where they are wrong, which is told by itself."""
    try:
        return config.load(home.settings, flags=flags)
    except BadConfig:
        return config.Settings()


def _look_at_home(home: Home, flags: dict[str, Any]) -> str:  # noqa: ARG001
    from longrun.compose import check_one_file_system

    home.check()
    home.make()
    check_one_file_system(home)
    probe = home.state / "doctor.probe"
    disk.write_file(probe, b"")
    disk.remove_file(probe)
    held = locks.holder(home.daemon_lock)
    who = f"; held by {held.get('what')} (pid {held.get('pid')})" if held else "; no daemon runs"
    return f"{home.root} can be written{who}"


def _look_at_disk(home: Home, flags: dict[str, Any]) -> str:  # noqa: ARG001
    free = shutil.disk_usage(home.root).free
    if free < config.MEBIBYTE * 256:
        raise LongrunError(f"{free / 1e6:.0f} MB are free", hint="make room: a checkpoint needs about 3x the model")
    return f"{free / 1e9:.1f} GB are free{_kept(home)}"


def _kept(home: Home) -> str:
    """What restores have left for a person to delete, with its size."""
    model = home.model.resolve()
    former = list(model.parent.glob(f"{glob.escape(model.name)}.replaced-*"))
    size = sum(map(disk.tree_bytes, former))
    if not former:
        return ""
    return f"; {counted(len(former), 'former model')}, {size / 1e9:.1f} GB: delete {model}.replaced-* when you are sure"


def _look_at_inbox(home: Home, flags: dict[str, Any]) -> str:
    from longrun.inbox import has_writer

    inbox = _settings(home, flags).inbox

    probe = home.inbox / ".doctor.probe"
    with probe.open("wb"):
        seen = has_writer(probe)
    disk.remove_file(probe)
    if seen is None:
        still_s = max(inbox.settle_s, inbox.settle_without_lease_s)
        return f"open writers cannot be seen on this file system: a file settles after {still_s:g} s without a change"
    return f"open writers can be seen: a file settles {inbox.settle_s:g} s after its last change"


def _look_at_packages(home: Home, flags: dict[str, Any]) -> str:  # noqa: ARG001
    from importlib.metadata import PackageNotFoundError, version

    from longrun.compose import NEEDED

    found = []
    for name in NEEDED:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            raise LongrunError(f"{name} is not installed", hint="pip install -e . in a virtual environment") from None
    return ", ".join(found)


def _look_at_device(home: Home, flags: dict[str, Any]) -> str:
    settings = _settings(home, flags)
    options = {"dtype": settings.model.dtype, "use_cpu": settings.train.use_cpu}
    command = [sys.executable, str(PROGRAM), "--device", "--options", json.dumps(options)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if answer.returncode:
        raise LongrunError((answer.stderr.strip().splitlines() or ["torch cannot be started"])[-1])
    return answer.stdout.strip().splitlines()[-1]


def _look_at_base_model(home: Home, flags: dict[str, Any]) -> str:
    from longrun.compose import ask_for_base_model

    source = config.load(home.settings, flags=flags, only="model").model.base_model
    ask_for_base_model(source)
    return source


_EXAMINATIONS: dict[str, Callable[[Home, dict[str, Any]], str]] = {
    "settings": _look_at_settings,
    "home": _look_at_home,
    "disk": _look_at_disk,
    "inbox": _look_at_inbox,
    "packages": _look_at_packages,
    "device": _look_at_device,
    "base model": _look_at_base_model,
}
