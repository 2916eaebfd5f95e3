"""Scheduled backups: made between files by a process of their own, so that training does not wait for them.

The backup manager holds the model still by opening its files, which takes milliseconds; the next file is trained
while it copies. Whatever goes wrong there is told in log and status, and tried again; it never stops training.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longrun.checkpoint import Checkpoint
    from longrun.context import Context

PROGRAM = Path(__file__).resolve().parent.parent / "backup_manager.py"
FACT = "scheduled backup"  # in the ledger: when the last one was made, and of what
NO_TARGET = "none"
SECONDS_AN_HOUR = 3600


@dataclass
class Scheduled:
    context: Context
    _errand: subprocess.Popen[str] | None = None  # one command of the backup manager; it says little
    _steps: list[str] = field(default_factory=list)  # what is left of backup, prune, export
    _of: dict[str, Any] = field(default_factory=dict)  # what is being backed up
    _backup: str = ""  # the id of the backup that was made
    _not_before: float = 0.0

    @property
    def busy(self) -> bool:
        return self._errand is not None

    def tick(self, now: float, newest: Checkpoint | None, *, between_files: bool) -> None:
        """Hear of the errand under way; begin one when a backup is due."""
        if self._errand is not None and self._errand.poll() is not None:
            self._ended(self._errand, now)
        free = self._errand is None and between_files and now >= self._not_before
        if free and newest is not None and self.is_due(newest):
            self._of = _described(newest)
            self._steps = ["backup", "prune"]
            self._steps += ["export"] if self.context.settings.backup.target != NO_TARGET else []
            self._begin(now)

    def is_due(self, newest: Checkpoint) -> bool:
        """Whether so many files were trained since the last scheduled backup, or it is so old, as is set."""
        settings = self.context.settings.backup
        if not (settings.after_files or settings.after_hours):
            return False
        last = json.loads(self.context.ledger.fact(FACT) or "{}")
        if last.get("digest") == newest.digest:
            return False
        before = last.get("files", 0) if last.get("lineage") == newest.lineage.lineage else 0
        files = len(newest.lineage.files)
        enough = 0 < settings.after_files <= abs(files - before)
        age_h = (time.time() - last.get("at", 0)) / SECONDS_AN_HOUR
        return enough or 0 < settings.after_hours <= age_h

    def _begin(self, now: float) -> None:
        home, backup = self.context.home, self.context.settings.backup
        words = {
            "backup": [str(home.model), "--type", "scheduled"],
            "prune": ["--execute"],
            "export": [self._backup, backup.target],
        }[self._steps[0]]
        nice = ["nice", "-n", "10"]  # the training process goes first
        command = [*nice, sys.executable, str(PROGRAM), self._steps[0], *words, "--home", str(home.root), "--json"]
        try:
            self._errand = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        except OSError as error:
            self._failed(now, str(error))

    def _ended(self, errand: subprocess.Popen[str], now: float) -> None:
        said, refused = errand.communicate()
        self._errand = None
        if errand.returncode:
            why = refused.strip().splitlines()[-1:] or [f"exit code {errand.returncode}"]
            self._failed(now, why[0].removeprefix(f"{PROGRAM.name}: "))
            return
        answer = json.loads(said)
        if self._steps[0] == "backup":
            self._made(answer)
        elif self._steps[0] == "export":
            self.context.say("backup copied", f"backup {self._backup} is in {answer['target']}, verified")
        self._steps.pop(0)
        if self._steps:
            self._begin(now)
        else:
            self.context.solved("backup")

    def _made(self, answer: dict[str, Any]) -> None:
        self._backup = answer["id"]
        self.context.ledger.set_fact(FACT, json.dumps(self._of))
        self.context.say(
            "backup",
            f"backup {self._backup} is complete and verified: global step {answer['global_step']},"
            f" {answer['new_bytes'] / 1e6:.1f} MB newly stored in {answer['seconds']:.1f} s",
            backup=self._backup,
        )

    def _failed(self, now: float, why: str) -> None:
        """A visible problem until it succeeds; training goes on."""
        what = {"backup": "the scheduled backup", "prune": "pruning old backups", "export": "copying the backup"}
        self.context.problem("backup", f"{what[self._steps[0]]} failed: {why}")
        self._not_before = now + self.context.settings.worker.retry_s
        self._steps = []

    def abandon(self) -> None:
        """Leave: an unfinished backup is none, and is due again at the next start."""
        if self._errand is not None:
            self._errand.terminate()
            self._errand.communicate()
            self._errand = None


def _described(newest: Checkpoint) -> dict[str, Any]:
    return {
        "at": time.time(),
        "digest": newest.digest,
        "lineage": newest.lineage.lineage,
        "files": len(newest.lineage.files),
    }
