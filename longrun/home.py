"""The home: one folder that holds inbox, model, history and the daemon's own state."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from longrun.errors import BadConfig

# Of a job's prepared folder: what the tokens were made from, and the tokens.
FACTS = "facts.json"
ROWS = "rows.arrow"


@dataclass(frozen=True)
class Home:
    root: Path

    @cached_property
    def inbox(self) -> Path:
        return self.root / "inbox"

    @cached_property
    def model(self) -> Path:
        return self.root / "current_model"

    @cached_property
    def trained(self) -> Path:
        return self.root / "trained"

    @cached_property
    def rejected(self) -> Path:
        return self.root / "rejected"

    @cached_property
    def logs(self) -> Path:
        return self.root / "logs"

    @cached_property
    def log(self) -> Path:
        return self.logs / "daemon.log"

    @cached_property
    def settings(self) -> Path:
        return self.root / "longrun.toml"

    @cached_property
    def state(self) -> Path:
        return self.root / "state"

    @cached_property
    def jobs(self) -> Path:
        """One folder a job: claimed/NAME (bytes fixed) and prepared/ (tokens)."""
        return self.state / "jobs"

    @cached_property
    def last_word(self) -> Path:
        """Why a process ended of a worker that has several: only the first talks to the daemon."""
        return self.state / "last_word.json"

    @cached_property
    def staging(self) -> Path:
        """Where checkpoints are written before they are complete; same file system as the model."""
        return self.state / "staging"

    @cached_property
    def published(self) -> Path:
        """Which files of current_model/ are ours: a removal of the model may meet them on their way there."""
        return self.state / "published.json"

    @cached_property
    def set_aside(self) -> Path:
        """Damaged checkpoints and remains of a removed model: never read again, kept for a person."""
        return self.state / "set_aside"

    @cached_property
    def requests(self) -> Path:
        """What operators asked for: pause (stays until resume), stop, skip, retry."""
        return self.state / "requests"

    @cached_property
    def id_file(self) -> Path:
        """What this home is called in the models it trains, so that job numbers of two homes are kept apart."""
        return self.state / "home_id"

    @property
    def id(self) -> str:
        """Empty before the first daemon ran here."""
        return self.id_file.read_text(encoding="utf-8") if self.id_file.exists() else ""

    @cached_property
    def ledger(self) -> Path:
        return self.state / "ledger.sqlite3"

    @cached_property
    def status(self) -> Path:
        return self.state / "status.json"

    @cached_property
    def events(self) -> Path:
        return self.state / "events.jsonl"

    @cached_property
    def daemon_lock(self) -> Path:
        return self.state / "daemon.lock"

    @cached_property
    def model_lock(self) -> Path:
        return self.state / "model.lock"

    @cached_property
    def training_lock(self) -> Path:
        """Held while the model is read or trained; and by a restore or reset, from its first byte to its last."""
        return self.state / "training.lock"

    @cached_property
    def turn_lock(self) -> Path:
        """Held by who waits to replace the model: the next file begins after that, however many are in the queue."""
        return self.state / "turn.lock"

    def job(self, number: int) -> Path:
        return self.jobs / f"{number:06d}"

    def claimed(self, number: int) -> Path:
        return self.job(number) / "claimed"

    def prepared(self, number: int) -> Path:
        return self.job(number) / "prepared"

    def check(self) -> None:
        """BadConfig when there is no such folder: a home is not made where a name was mistyped."""
        if not self.root.is_dir():
            raise BadConfig(f"cannot use {self.root} as home: there is no such folder", hint=f"mkdir -p {self.root}")
        try:
            str(self.root).encode()
        except UnicodeEncodeError:
            raise BadConfig(f"cannot use {self.root} as home: its path is not UTF-8", hint="choose another") from None

    def make(self) -> None:
        """Create the folders that are missing; state/ is for the owner only. current_model/ is not made here:
        it appears whole with the first checkpoint.
        """
        for folder in (self.inbox, self.trained, self.rejected, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        self.state.mkdir(mode=0o700, exist_ok=True)
        self.state.chmod(0o700)
        for folder in (self.jobs, self.staging, self.requests):
            folder.mkdir(exist_ok=True)


def find_home(flag: str | None) -> Home:
    """--home, else LONGRUN_HOME, else the current directory; with symbolic links resolved once."""
    root = Path(flag or os.environ.get("LONGRUN_HOME") or ".").resolve()
    if root.exists() and not root.is_dir():
        raise BadConfig(f"cannot use {root} as home: it is not a folder", hint="name a folder, or leave --home out")
    return Home(root)
