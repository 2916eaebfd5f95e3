"""From a claimed file to tokens on disk, done by the preparer while the worker trains.

Every file is examined as soon as it is claimed, so a person hears of a bad one at once; it is tokenised
shortly before its turn, because tokens take room.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from longrun import archive, blame, disk, wire
from longrun.errors import CannotTrain
from longrun.home import FACTS
from longrun.job import FINAL, Job, JobState
from longrun.wording import counted, unpinned
from longrun.worker import Child

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from longrun.checkpoint import Checkpoint
    from longrun.context import Context


OF_TOKENIZERS = (".json", ".jinja", ".txt", ".model")


@dataclass(frozen=True)
class Need:
    """What prepared rows depend on; other tokens than these must not be trained."""

    sha256: str
    max_length: int
    base_model: str
    on_bad_row: str
    base_files: str  # what is in the folder of the base model, as long as there is no model


class Preparation:
    def __init__(self, context: Context) -> None:
        self._context = context
        self.preparer = Child(context.home, "preparer")
        self._busy_with: Job | None = None
        self._seen_files = ""
        self._idle_since = 0.0
        self._deaths = 0

    @property
    def doing(self) -> str | None:
        return self._busy_with.name if self._busy_with else None

    def hear(self, now: float) -> None:
        """Take up what the preparer found; a dead one costs its file an attempt."""
        if not self.preparer.running:
            return
        try:
            for message in self.preparer.receive(now):
                self._apply(message)
        except wire.Closed:
            self._died(self.preparer.kill())
        else:
            limits = self._context.settings.worker  # any task may begin with imports and a tokenizer to load
            limit_s = max(limits.start_timeout_s, limits.step_timeout_s)
            waited_for = self._busy_with is not None or not self.preparer.ready
            if waited_for and self.preparer.hangs(now, limit_s):
                self.preparer.kill()
                self._died(f"no progress for {limit_s:g} s")

    def next(self, now: float, newest: Checkpoint | None) -> None:
        """Give the preparer the next thing to do: tokens for the job whose turn is next, lest training waits for them;
        then examining, then tokens for the jobs after that.
        """
        if self._busy_with is not None:
            return
        message = self._next_prepare(newest, limit=1) or self._next_examine() or self._next_prepare(newest)
        if message is None:
            self._release_when_idle(now)
        elif not self.preparer.running:
            self.preparer.start((), now)
        elif self.preparer.ready:
            self._busy_with = self._context.ledger.get(message.job)
            self._idle_since = now
            self.preparer.send(message, now)

    def prepared_facts(self, job: Job, newest: Checkpoint | None) -> dict[str, Any] | None:
        """The facts of the job's prepared rows, if they are what its plan needs."""
        try:
            facts: dict[str, Any] = json.loads((self._context.home.prepared(job.number) / FACTS).read_bytes())
        except (OSError, ValueError):
            return None
        need = asdict(self.need(job, newest))
        if newest is not None:  # which has taken over the tokenizer that these were made with
            del need["base_files"]
        return facts if {key: facts.get(key) for key in need} == need else None

    def need(self, job: Job, newest: Checkpoint | None) -> Need:
        settings = self._context.settings
        here = newest.lineage.progress_of(self._context.home_id, job.number, job.sha256) if newest else None
        return Need(
            sha256=job.sha256,
            max_length=here.plan.recipe.max_length if here else settings.train.max_length,
            base_model=unpinned(self._context.base_model(newest)),
            on_bad_row=job.on_bad_row,
            base_files="" if newest else self._base_files(),
        )

    def _base_files(self) -> str:
        """What tells whether somebody has edited the tokenizer or chat template in the base model's folder.

        The first file that trains takes them as they are then into the model, so what follows it is made with those.
        """
        if not self._context.ledger.count(JobState.RUNNING):
            folder = self._context.home.root / self._context.settings.model.base_model
            self._seen_files = _told_apart(folder) if os.path.isdir(folder) else ""  # noqa: PTH112  (asks nothing)
        return self._seen_files

    # -- choosing

    def _next_examine(self) -> wire.Examine | None:
        inbox = self._context.settings.inbox
        for job, path in self._with_file(JobState.CLAIMED, limit=1):
            return wire.Examine(
                job=job.number,
                path=path,
                # One that is trained again is read as it was: its rows are known by their numbers.
                on_bad_row=job.on_bad_row if job.sha256 else inbox.on_bad_row,
                max_line_bytes=inbox.max_line_bytes,
            )
        return None

    def _next_prepare(self, newest: Checkpoint | None, limit: int = 0) -> wire.Prepare | None:
        settings = self._context.settings
        for job, path in self._with_file(JobState.QUEUED, limit=limit or settings.worker.prepare_ahead):
            if self.prepared_facts(job, newest) is None:
                need = self.need(job, newest)
                return wire.Prepare(
                    job=job.number,
                    path=path,
                    format=job.format,
                    folder=str(self._context.home.prepared(job.number)),
                    tokenizer=str(self._context.home.model) if newest else settings.model.base_model,
                    trust_remote_code=settings.model.trust_remote_code,
                    max_line_bytes=settings.inbox.max_line_bytes,
                    rows=job.rows,
                    **asdict(need),
                )
        return None

    def _with_file(self, state: JobState, *, limit: int) -> Iterator[tuple[Job, str]]:
        """Waiting jobs with their claimed file; one whose file somebody deleted is over."""
        for job in self._context.waiting(state, limit=limit):
            claimed = archive.claimed_files(self._context.home, job.number)
            if claimed:
                yield job, os.fspath(claimed[0])
            else:
                self._context.reject(
                    job, {"kind": "lost", "why": "its file is gone from state/jobs/", "fix": "drop it again"}
                )

    # -- what the preparer says

    def _apply(self, message: wire.Message) -> None:
        if isinstance(message, wire.Examined | wire.Prepared | wire.Refused | wire.Failed):
            job, self._busy_with = self._context.ledger.get(message.job), None
            assert job is not None
            if not isinstance(message, wire.Failed):
                self._deaths = 0
            if job.state in FINAL:
                return  # meanwhile, as when a model was restored that has it
            if isinstance(message, wire.Examined):
                self._admit(job, message.facts)
            elif isinstance(message, wire.Refused):
                self._context.reject(job, message.reason)
            elif isinstance(message, wire.Failed):
                self._failed(job, message)
            else:
                blame.note_works(self._context, blame.preparing(self._context))
                self._tell_prepared(job, message.facts)

    def _admit(self, job: Job, facts: dict[str, Any]) -> None:
        context = self._context
        job = context.ledger.move(
            job,
            JobState.QUEUED,
            sha256=facts["sha256"],
            rows=facts["rows"],
            format=facts["format"],
            on_bad_row=facts["on_bad_row"],
        )
        twin = context.ledger.same_content(job)
        again = [twin.name] if twin is not None and twin.state is not JobState.REJECTED else []
        remarks = [*facts["notes"], *(f"same content as {name} before it, trained again" for name in again)]
        if facts["skipped_rows"]:
            skipped, first = counted(facts["skipped_rows"], "bad row"), facts["skipped"][0]
            remarks.append(f"{skipped} skipped, the first at line {first.get('line')}: {first['why']}")
        context.say(
            "queued",
            f"{job.name}: {counted(job.rows, 'row')} ({job.format}){''.join(f'; {remark}' for remark in remarks)}",
            job=job.number,
            file=job.name,
            **facts,
        )

    def _tell_prepared(self, job: Job, facts: dict[str, Any]) -> None:
        told = [f"{facts['tokens']:,} tokens, {facts['trained_tokens']:,} of them trained"]
        if facts["mask_source"]:
            told.append(f"told apart by {facts['mask_source']}")
        if facts["truncated_rows"]:
            told.append(f"{counted(facts['truncated_rows'], 'row')} cut at {facts['cut_at']} tokens")
        if facts["untrainable_rows"]:
            told.append(
                f"{counted(facts['untrainable_rows'], 'row')} left out (row {facts['untrainable_first']} is the first):"
                " no token to learn from"
            )
        if facts["refused_rows"]:
            told.append(f"{counted(facts['refused_rows'], 'bad row')} skipped, the first: {facts['refused_first']}")
        not_whole = facts["truncated_rows"] or facts["untrainable_rows"] or facts["refused_rows"]
        level = "warning" if not_whole else "info"
        self._context.say("prepared", f"{job.name}: {'; '.join(told)}", level=level, job=job.number, **facts)

    def _failed(self, job: Job, failure: wire.Failed) -> None:
        """A fault that is not the file's content: the disk, the base model, or the preparer itself."""
        if failure.kind in ("disk", "base model"):
            self.preparer.kill()
            raise disk.Refused(failure.why) if failure.kind == "disk" else CannotTrain(failure.why, hint=failure.hint)
        self._count_attempt(job, failure.why)

    def _died(self, how: str) -> None:
        job, self._busy_with = self._busy_with, None
        self._deaths += 1
        if job is not None:
            current = self._context.ledger.get(job.number)
            assert current is not None
            if current.state not in FINAL:
                self._count_attempt(current, f"the preparer died over it ({how})")
        elif self._deaths >= self._context.settings.worker.max_attempts:
            self._deaths = 0
            raise CannotTrain(
                f"the preparer cannot start ({how}): {self.preparer.last_words()}",
                hint=f"{self.preparer.log} tells more, `daemon.py doctor` may tell why",
            )

    def _count_attempt(self, job: Job, why: str) -> None:
        disk.remove_tree(self._context.home.prepared(job.number), self._context.home.staging)
        attempts = job.attempts + 1
        if attempts >= self._context.settings.worker.max_attempts:
            self._give_up(job, f"{why}, {counted(attempts, 'time')}")
            return
        self._context.ledger.note(job, attempts=attempts)
        self._context.say("retry", f"{job.name}: {why}; attempt {attempts} failed, trying again", level="warning")

    def _give_up(self, job: Job, why: str) -> None:
        """Reject the file, unless all tells of what it is prepared with: then the next ones would only follow it."""
        other = blame.alike(self._context, blame.preparing(self._context), job)
        if other is None:
            self._context.reject(job, {"kind": "crash", "why": why})
            return
        self._context.ledger.note(job, attempts=0)
        raise CannotTrain(
            f"{job.name}: {why}, as {other} before it, and nothing was ever prepared with this model and these"
            " libraries",
            hint=f"{self.preparer.log} tells more. If the file is at fault, delete"
            f" {self._context.home.claimed(job.number)}",
        )

    def _release_when_idle(self, now: float) -> None:
        limit_s = 60 * self._context.settings.worker.idle_release_minutes
        if self.preparer.running and now - max(self._idle_since, self.preparer.heard_at) > limit_s:
            self.preparer.kill()


def _told_apart(folder: Path) -> str:
    """Names, sizes and times of a tokenizer's files; what cannot be looked at, as an editor's lock, is left out."""
    found = []
    with contextlib.suppress(OSError):
        for file in sorted(folder.iterdir()):
            if file.suffix in OF_TOKENIZERS and not file.name.startswith("."):
                with contextlib.suppress(OSError):
                    about = file.stat()
                    found.append(f"{file.name} {about.st_size} {about.st_mtime_ns}")
    return " ".join(found)
