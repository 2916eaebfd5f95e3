"""A process with mounts of its own: what it mounts is a real file system, which it and its children alone see.

    unshare -Urm python -m tests.drills.apart      reads a line of JSON for each scene, answers with one

A scene is a function of a drill: scene(folder, dice, note, *case). It may mount what it likes, without being root.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.drills.campaign import Campaign

REPOSITORY = Path(__file__).resolve().parents[2]
LIBRARY = ctypes.CDLL(None, use_errno=True)
READ_ONLY, REMOUNT, BIND = 1, 32, 4096  # mount(2)
MNT_DETACH = 2  # umount2(2)
ALONE = ("unshare", "-Urm")


def refusal() -> str:
    """Why no process can have mounts of its own here; empty when one can."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            tried = subprocess.run(
                [*ALONE, "mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return "there is no unshare(1) here"
    return f"mounts of one's own are refused here: {tried.stderr.strip()}" if tried.returncode else ""


class Apart:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            [*ALONE, sys.executable, "-m", "tests.drills.apart"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def play(self, scene: Any, case: tuple[Any, ...], dice: random.Random, campaign: Campaign) -> None:
        """Play one scene; what it noted is noted here, and its failure is one here."""
        assert self._process.stdin and self._process.stdout
        line = {"module": scene.__module__, "scene": scene.__name__, "case": case, "dice": dice.random()}
        self._process.stdin.write(json.dumps({**line, "folder": str(self._folder)}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        for what in answer["notes"]:
            campaign.note(what)
        assert not answer["error"], answer["error"]


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A file system at `folder` that is as small, or has as few inodes, as the options say."""
    folder.mkdir()
    mount(folder, options, kind="tmpfs")
    try:
        yield folder
    finally:
        unmount(folder)


def mount(folder: Path, options: str = "", *, kind: str = "", source: Path | None = None, flags: int = 0) -> None:
    """mount(2), which is over before the daemon does anything more."""
    result = LIBRARY.mount(_name(source or kind), _name(folder), _name(kind), flags, _name(options))
    if result:
        raise OSError(ctypes.get_errno(), f"mount: {os.strerror(ctypes.get_errno())}", str(folder))


def unmount(folder: Path) -> None:
    """What is still open there is let go later."""
    if LIBRARY.umount2(_name(folder), MNT_DETACH):
        raise OSError(ctypes.get_errno(), f"umount: {os.strerror(ctypes.get_errno())}", str(folder))


def _name(text: str | Path) -> bytes:
    return os.fsencode(text)


def _serve() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        scene = getattr(importlib.import_module(asked["module"]), asked["scene"])
        folder = Path(tempfile.mkdtemp(dir=asked["folder"]))
        notes: list[str] = []
        try:
            scene(folder, random.Random(asked["dice"]), notes.append, *asked["case"])
            error = ""
        except Exception:  # noqa: BLE001 - told by who asked
            error = traceback.format_exc()
        shutil.rmtree(folder, ignore_errors=True)
        sys.stdout.write(json.dumps({"error": error, "notes": notes}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
