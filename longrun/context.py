"""What the parts of the daemon share: where things are, what holds, and who to tell."""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from longrun import archive, checkpoint, config, disk, locks
from longrun.errors import BadConfig, placed
from longrun.job import WAITING, Job, JobState
from longrun.lineage import FileRecord
from longrun.wording import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from longrun.config import Settings
    from longrun.home import Home
    from longrun.journal import Journal
    from longrun.ledger import Ledger
    from longrun.notify import Notifier


EDITED_S = 0.2  # between two looks at an edited longrun.toml
LOOKS = 10  # at most; what is edited without end is read as it is
TRAINING, LOOKING = "training", "the Longrun daemon"  # what the model is held for
OF_A_FILE = ("train.", "model.", "log.rows ", "worker.processes ")  # what a file that is being trained keeps

SOLVED = {
    "room": "there is room for the next checkpoint",
    "disk": "the disk takes what was refused before",
    "model": "the model can be used again",
    "worker": "the worker is ready",
    "inbox": "files can be taken from the inbox",
    "settings": "longrun.toml is good",
    "restore": "the model is free",
}


@dataclass
class Context:
    home: Home
    home_id: str
    settings: Settings
    flags: dict[str, Any]
    ledger: Ledger
    journal: Journal
    verifier: checkpoint.Verifier
    notifier: Notifier
    lock: locks.Lock  # of the home
    problems: dict[str, str] = field(default_factory=dict)  # by kind: what a person should know and mend
    rejected_now: int = 0  # since this daemon started
    ended_now: int = 0  # jobs trained or rejected since then
    missing: list[Job] = field(default_factory=list)  # trained here, but not in the model
    missing_unsure: bool = True  # whether `missing` may be another by now
    only: set[int] | None = None  # by hand: the jobs that were asked for, and no others
    lived: str | None = None  # the lineage that was last seen whole; a removal that is under way does not unsay it
    seen: checkpoint.Checkpoint | None = None  # the newest as last seen; the disk is asked again before every job
    _settings_seen: tuple[object, ...] = ()  # the file as last judged, and the model it was held against
    _holders: list[str] = field(default_factory=list)  # of the model, in this process: what each does
    _model_lock: locks.Lock | None = None

    def waiting(self, *states: JobState, limit: int) -> list[Job]:
        """The first jobs that wait for their turn; the one that the model is in the middle of comes first."""
        states = states or tuple(WAITING)
        begun = self.ledger.get(self._begun)
        first = [begun] if begun is not None and begun.state in states else []
        rest = self.ledger.in_state(*states, limit=limit if self.only is None else -1)
        asked = [job for job in rest if job not in first and (self.only is None or job.number in self.only)]
        return [*first, *asked][:limit]

    @property
    def _begun(self) -> int:
        """The job of this home that the model is in the middle of; 0 when there is none."""
        lineage = self.seen.lineage if self.seen else None
        here = lineage.in_progress if lineage and not lineage.is_foreign(self.home_id) else None
        return here.plan.job if here else 0

    def say(self, event: str, text: str, *, level: str = "info", **facts: Any) -> None:
        self.journal.say(event, text, level=level, **facts)

    def problem(self, kind: str, text: str, *, level: str = "error") -> None:
        """Raise a visible problem; it is told once, and stays in status until solved."""
        if self.problems.get(kind) != text:
            self.problems[kind] = text
            self.say("problem", text, level=level, kind=kind)

    def solved(self, kind: str, because: str = "") -> None:
        if self.problems.pop(kind, None) is not None:
            self.say("solved", f"solved: {because or SOLVED.get(kind, kind)}")

    def disk_is_well(self) -> None:
        """What was refused has been written since."""
        self.solved("room")
        self.solved("disk")

    def hold_model(self, what: str) -> None:
        """Keep restore and reset from replacing the model until `let_go_model`; Locked when one is at it now."""
        if not self._holders:
            self._model_lock = locks.Lock.take(
                self.home.training_lock, what=what, wait_s=0.0, held=self.home.model, hint="wait for it to end"
            )
        self._holders.append(what)
        self._tell_holder()

    def let_go_model(self, what: str) -> None:
        self._holders.remove(what)
        self._tell_holder()

    def _tell_holder(self) -> None:
        assert self._model_lock is not None
        if self._holders:
            for_longest = [what for what in (TRAINING, *self._holders) if what in self._holders and what != LOOKING]
            self._model_lock.tell([*for_longest, LOOKING][0])
        else:
            self._model_lock.release()

    @contextlib.contextmanager
    def model_held(self) -> Iterator[None]:
        """For a moment."""
        self.hold_model(LOOKING)
        try:
            yield
        finally:
            self.let_go_model(LOOKING)

    def newest(self) -> checkpoint.Checkpoint | None:
        """The checkpoint that the next job goes on from; BadModel when the model cannot be trusted.

        To be asked only while no run commits, because what was published from a damaged checkpoint is replaced. Locked
        while somebody replaces the model.
        """
        with self.model_held():
            return self._newest()

    def _newest(self) -> checkpoint.Checkpoint | None:
        newest = checkpoint.newest(
            self.home, self.verifier, lambda text: self.say("checkpoint damaged", text, level="error")
        )
        if newest is not None and (self.seen is None or self.seen.digest != newest.digest):
            checkpoint.publish(self.home, newest.path)  # whoever committed it may have died before this
            self.missing_unsure = True
        if newest is None and self.seen is not None:
            self.model_removed()
        self.seen = newest
        self.lived = newest.lineage.lineage if newest else None
        self.reload_settings(newest)  # whether they fit depends on the model
        return newest

    def model_removed(self, text: str = "", **facts: Any) -> None:
        """Tell it once, whoever notices first."""
        self.seen = None
        self.missing_unsure = True
        text = text or f"current_model/ was removed: starting from the base model {self.base_model(None)} at step 0"
        self.say("model removed", text, level="warning", **facts)

    def base_model(self, newest: checkpoint.Checkpoint | None) -> str:
        """What the model grew from: told by the lineage once there is one, by the settings before."""
        return newest.lineage.base_model if newest else self.settings.model.base_model

    def reload_settings(self, newest: checkpoint.Checkpoint | None) -> None:
        """Take up an edited longrun.toml; one that is wrong changes nothing and raises a problem."""
        seen = (self._settings_file(), newest and (newest.lineage.base_model, newest.lineage.optim))
        if seen == self._settings_seen:
            return
        self._settings_seen = seen
        try:
            fresh = config.load(self.home.settings, flags=self.flags)
            if newest is not None:
                config.check_model(fresh, newest.lineage, self.home.root)
        except BadConfig as error:
            self.problem("settings", f"{error}. {self._instead(newest)}")
            return
        self.solved("settings")
        for change in config.changes(self.settings, fresh):
            since = "from the next file on" if change.startswith(OF_A_FILE) else "from now on"
            self.say("setting changed", f"{since}: {change}")
        if fresh.log != self.settings.log:
            self.journal.configure(fresh.log)
        self.settings = fresh

    def _settings_file(self) -> tuple[int, ...]:
        """Which longrun.toml there is, once two looks agree: most editors empty a file before they write it."""
        seen = disk.signature(self.home.settings)
        if self._settings_seen and seen != self._settings_seen[0]:
            for _ in range(LOOKS):
                time.sleep(EDITED_S)
                before, seen = seen, disk.signature(self.home.settings)
                if seen == before:
                    break
        return seen

    def check_settings(self, newest: checkpoint.Checkpoint | None) -> None:
        """BadConfig when this model, which perhaps was put there just now, cannot be trained with those in force.

        A model of another base is gone on with as what it is.
        """
        if newest is not None:
            config.check_optim(self.settings, newest.lineage)

    def _instead(self, newest: checkpoint.Checkpoint | None) -> str:
        """What holds while the settings file is not good."""
        try:
            self.check_settings(newest)
        except BadConfig:
            return "Until then no file is trained"
        return "The former settings stay in force"

    def record_of(self, job: Job, newest: checkpoint.Checkpoint | None) -> FileRecord | None:
        """What the model says of the job, if it was trained to its end; None otherwise."""
        return newest.lineage.record_of(self.home_id, job.number, job.sha256) if newest else None

    def finish_if_trained(self, job: Job, newest: checkpoint.Checkpoint | None) -> bool:
        """Whether the lineage says that the job was trained to its end: it is booked then, and its file put away."""
        record = self.record_of(job, newest)
        if record is not None:
            self._finish(job, record)
        return record is not None

    def _finish(self, job: Job, record: FileRecord) -> None:
        done = self.ledger.move(job, JobState.TRAINED, attempts=0, record=record.to_json())
        self.ended_now += 1
        self.missing_unsure |= bool(self.missing)  # it may make up for one of them
        self.put_away(done)
        self._sweep()

    def reject(self, job: Job, reason: dict[str, Any]) -> None:
        """End the job without training (the rest of) its file; the reason goes with the file."""
        refused = self.ledger.move(job, JobState.REJECTED, reason=json.dumps(reason))
        self.ended_now += 1
        self.rejected_now += 1
        self.put_away(refused)

    def put_away(self, job: Job) -> None:
        """Bring the file of a job that is over to its last place, and tell how it ended: in this life, or the next."""
        place = archive.put_away(self.home, job)
        if job.state is JobState.REJECTED:
            self._tell_rejected(job, json.loads(job.reason), place.name if place else job.name)
        elif job.record:  # none of what was trained before records were kept
            self._tell_trained(job, FileRecord.from_json(job.record))

    def _tell_trained(self, job: Job, record: FileRecord) -> None:
        steps = f"{record.done_steps} of {record.planned_steps} steps"
        told = [f"{job.name} is trained: {steps}, global step {record.target_step}"]
        if record.mean_loss is not None:
            told.append(f"loss {record.mean_loss:.4f} on average, {record.final_loss:.4f} at the end")
        if record.eval_loss is not None:
            told.append(f"held-out loss {record.eval_loss:.4f} over {counted(record.held_out_rows, 'row')}")
        self.say(
            "trained",
            "; ".join(told),
            job=job.number,
            file=job.name,
            global_step=record.target_step,
            planned_steps=record.planned_steps,
            final_loss=record.final_loss,
            mean_loss=record.mean_loss,
            eval_loss=record.eval_loss,
        )

    def _tell_rejected(self, job: Job, reason: dict[str, Any], name: str) -> None:
        mended = "" if reason["kind"] == "skipped" else "once it is mended there, "
        way = f" (rejected/{name}; {mended}`daemon.py retry {shlex.quote(name)}` trains it from its first row)"
        self.say(
            "rejected",
            f"{job.name} is rejected: {_in_words(reason)}{'' if reason['kind'] == 'lost' else way}",
            level="warning",
            job=job.number,
            file=job.name,
            reason=reason,
        )

    def _sweep(self) -> None:
        """Apply the retention of trained/ and rejected/, which is off by default."""
        for path in archive.expired(self.home, self.settings.inbox.keep_days):
            disk.remove_file(path)


def _in_words(reason: dict[str, Any]) -> str:
    text = placed(reason["why"], line=reason.get("line"), byte=reason.get("byte"), field=reason.get("field"))
    return f"{text}. Fix: {reason['fix']}" if reason.get("fix") else text
