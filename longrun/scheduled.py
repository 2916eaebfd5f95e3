"""Scheduled backups: made between files by a process of their own, so that training does not wait for them.

The backup manager holds the model still by opening its files, which takes milliseconds; the next file is trained
while it copies. Whatever goes wrong there is told in log and status, and tried again; it never stops training.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun.config import NO_TARGET
from longrun.errors import Locked

if TYPE_CHECKING:
    from longrun.checkpoint import Checkpoint
    from longrun.context import Context

PROGRAM = Path(__file__).resolve().parent.parent / "backup_manager.py"
NICE = ("nice", "-n", "10")  # the training process goes first
BACKUP = "a scheduled backup"  # what the model is held for
FACT = "scheduled backup"  # in the ledger: when the last one was made, and of what
UNCOPIED = "backups to copy"  # in the ledger
FAILED = {
    "backup": "the scheduled backup failed",
    "export": "copying the scheduled backup to [backup] target failed",
    "prune": "pruning old backups failed",
}
SECONDS_AN_HOUR = 3600
LIMIT_S = 24 * SECONDS_AN_HOUR  # then an errand counts as hung
LEAVE_S = 5.0


@dataclass
class Scheduled:
    context: Context
    _errands: list[tuple[str, str]] = field(default_factory=list)  # command and backup; the first is under way
    _process: subprocess.Popen[bytes] | None = None
    _began: float = 0.0
    _holds: bool = False  # the model
    _of: dict[str, Any] = field(default_factory=dict)  # what is being backed up
    _not_before: dict[str, float] = field(default_factory=dict)  # by command: when to try it again

    @property
    def busy(self) -> bool:
        return self._process is not None

    def tick(self, now: float, newest: Checkpoint | None, *, between_files: bool) -> None:
        """Hear of the errand under way; begin the next, or another backup when one is due."""
        if self._process is not None:
            self._hear(self._process, now)
        if self._process is None and between_files:
            if newest is not None and self._may("backup", now) and self.is_due(newest):
                self._of = _described(newest)
                self._errands = [("backup", "")]
            elif self._may("export", now):
                self._errands = self._copies()
            self._begin(now)

    def _may(self, command: str, now: float) -> bool:
        return now >= self._not_before.get(command, 0.0)

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
        age_h = abs(time.time() - last.get("at", 0)) / SECONDS_AN_HOUR  # that clock may have been ahead
        return enough or 0 < settings.after_hours <= age_h

    # -- errands

    def _begin(self, now: float) -> None:
        if not self._errands:
            return
        command, backup = self._errands[0]
        home = self.context.home
        words = {
            "backup": [str(home.model), "--type", "scheduled"],
            "export": [backup, self.context.settings.backup.target],
            "prune": ["--execute"],
        }[command]
        whole = [*NICE, sys.executable, str(PROGRAM), command, *words, "--home", str(home.root), "--json"]
        try:
            with contextlib.suppress(Locked):
                self._hold_model(command == "backup")
            if command == "backup" and not self._holds:
                return  # the model is being restored, or reset: when that is done
            # Files, not pipes: a full one would hold up the child. A session of its own: Ctrl-C is for the daemon.
            with self._said.open("wb") as said, self._complained.open("wb") as complained:
                self._process = subprocess.Popen(
                    whole, stdin=subprocess.DEVNULL, stdout=said, stderr=complained, start_new_session=True
                )
            self._began = now
        except OSError as error:
            self._hold_model(False)
            self._failed(str(error), now)

    def _hold_model(self, hold: bool) -> None:
        """A restore that waited for the file's end waits for its backup, too: else it would be of what was restored."""
        if hold and not self._holds:
            self.context.hold_model(BACKUP)
        elif self._holds and not hold:
            self.context.let_go_model(BACKUP)
        self._holds = hold

    @property
    def _said(self) -> Path:
        return self.context.home.state / "backup.out"

    @property
    def _complained(self) -> Path:
        return self.context.home.state / "backup.err"

    def _hear(self, process: subprocess.Popen[bytes], now: float) -> None:
        if process.poll() is None:
            if now - self._began > LIMIT_S:
                process.kill()
            return
        self._process = None
        self._hold_model(False)
        try:
            said = self._said.read_text(encoding="utf-8", errors="replace")
            answer = json.loads(said[said.find("{") :]) if not process.returncode else None
        except (OSError, ValueError) as error:
            self._failed(f"what it said cannot be read: {error}", now)
            return
        if answer is None:
            self._failed(self._complaint(process.returncode), now)
        else:
            self._done(answer, now)

    def _complaint(self, code: int) -> str:
        lines = self._complained.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].removeprefix(f"{PROGRAM.name}: ") if lines else f"exit code {code}"

    def _done(self, answer: dict[str, Any], now: float) -> None:
        command, backup = self._errands.pop(0)
        self.context.solved(f"scheduled {command}")
        if command == "backup":
            self._made(answer)
        elif command == "export":
            self._note_uncopied([other for other in self._uncopied if other != backup])
            self.context.say("backup copied", f"backup {backup} is in {answer['target']}, verified")
        self._begin(now)

    def _made(self, answer: dict[str, Any]) -> None:
        backup, settings = answer["id"], self.context.settings.backup
        self.context.ledger.set_fact(FACT, json.dumps(self._of))
        self.context.say(
            "backup",
            f"backup {backup} is complete and verified: global step {answer['global_step']},"
            f" {answer['new_bytes'] / 1e6:.1f} MB newly stored in {answer['seconds']:.1f} s",
            backup=backup,
        )
        if settings.target != NO_TARGET:
            self._note_uncopied([*self._uncopied, backup])
        self._errands = [*self._copies(), ("prune", "")]

    def _copies(self) -> list[tuple[str, str]]:
        """What is still to be copied, and has not been pruned meanwhile."""
        settings = self.context.settings.backup
        uncopied = self._uncopied
        if not uncopied:
            return []
        folder = settings.folder(self.context.home.root) / "backups"
        there = [backup for backup in uncopied if settings.target != NO_TARGET and (folder / backup).exists()]
        if there != uncopied:
            self._note_uncopied(there)
            self.context.solved("scheduled export")
        return [("export", backup) for backup in there]

    @property
    def _uncopied(self) -> list[str]:
        """Backups that are still to be copied to the target; over restarts, too."""
        found: list[str] = json.loads(self.context.ledger.fact(UNCOPIED) or "[]")
        return found

    def _note_uncopied(self, backups: list[str]) -> None:
        self.context.ledger.set_fact(UNCOPIED, json.dumps(backups))

    def _failed(self, why: str, now: float) -> None:
        """A visible problem until it succeeds; what does not depend on it is done all the same."""
        command, _ = self._errands.pop(0)
        self.context.problem(f"scheduled {command}", f"{FAILED[command]}: {why}")
        self._not_before[command] = now + self.context.settings.worker.retry_s
        self._errands = [errand for errand in self._errands if errand[0] != command]
        self._begin(now)

    def abandon(self) -> None:
        """Leave: an unfinished backup is none, and is due again at the next start."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(LEAVE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
            self._hold_model(False)


def _described(newest: Checkpoint) -> dict[str, Any]:
    return {
        "at": time.time(),
        "digest": newest.digest,
        "lineage": newest.lineage.lineage,
        "files": len(newest.lineage.files),
    }
