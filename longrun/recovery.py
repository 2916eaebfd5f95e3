"""Recovery: which trained files the model has lost, and the way back into the queue for them.

Nobody tells the daemon of a restore, a hand-copied or a deleted model. It looks at the published lineage while
nothing trains; what to do about the loss is for a person to say.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from longrun import archive, disk, requests
from longrun.checkpoint import LINEAGE
from longrun.errors import BadModel
from longrun.job import Job, JobState
from longrun.missing import missing_of, published_lineage
from longrun.wording import counted

if TYPE_CHECKING:
    from longrun.context import Context

SETTLE_S = 2.0  # a model that is being copied or replaced is judged when nothing changed for so long
TAKE_BACK_S = 1.0  # of a tick; files are read for it
NAMES_TOLD = 10


class Recovery:
    def __init__(self, context: Context) -> None:
        self._context = context
        self._signature: tuple[int, ...] = ()
        self._changed_at: float | None = None
        # Of the request under way: the files that may be taken back, and the jobs whose bytes were looked for in vain.
        self._trained: archive.Trained | None = None
        self._gone: set[int] = set()

    def look(self, now: float, *, idle: bool) -> None:
        """Keep the missing files true, and tell which have become missing."""
        context = self._context
        another = idle and self._another_model(now)
        if another and context.seen is not None and not self._signature:
            context.model_removed()
        if another:
            self._tell_another()
        if not (another or context.missing_unsure):
            return
        try:
            missing = self._find()
        except BadModel:
            return  # half copied, or damaged: its next change, or the next file, tells
        finally:
            context.missing_unsure = False
        known = {job.number for job in context.missing}
        context.missing = missing
        lost = [job for job in missing if job.number not in known]
        if lost:
            self._tell(lost)

    def _another_model(self, now: float) -> bool:
        """Whether the published lineage has changed and is still since; costs one look at a file's facts."""
        found = disk.signature(self._context.home.model / LINEAGE)
        if found != self._signature:
            self._signature, self._changed_at = found, now
        settled = self._changed_at is not None and now - self._changed_at >= SETTLE_S
        if settled:
            self._changed_at = None
        return settled

    def _tell_another(self) -> None:
        """A model that was restored or copied in is told when it is seen, not when the next file goes on from it."""
        with contextlib.suppress(BadModel):  # half copied, or damaged
            lineage, seen = published_lineage(self._context.home, self._context.verifier.lineages), self._context.seen
            known = seen and (seen.lineage.lineage, seen.global_step)
            if lineage is not None and (lineage.lineage, lineage.global_step) != known:
                self._context.say(
                    "another model",
                    f"another model stands in current_model/, at global step {lineage.global_step}:"
                    " the next file goes on from it",
                    global_step=lineage.global_step,
                )

    def _find(self) -> list[Job]:
        context = self._context
        lineage = published_lineage(context.home, context.verifier.lineages)
        return missing_of(context.ledger.each_trained(), lineage, context.home_id)

    def _tell(self, lost: list[Job]) -> None:
        names = [job.name for job in lost]
        told = ", ".join(names[:NAMES_TOLD]) + (", ..." if len(names) > NAMES_TOLD else "")
        count = f"{counted(len(names), 'file')}, {counted(sum(job.rows for job in lost), 'row')}"
        self._context.say(
            "missing",
            f"trained here, but not in the model: {told} ({count}); `daemon.py missing` lists them,"
            " `daemon.py retry --missing` trains them again",
            level="warning",
            files=names,
        )

    # -- back into the queue

    def take_back(self) -> bool:
        """Do what `retry --missing` asked for, a part of it each time; whether there is more to do.

        The jobs keep their numbers, so they come before whatever was dropped since. The request is cleared when all
        of them are in the queue: after a crash it is gone on with.
        """
        asked = requests.pending(self._context.home, requests.RETRY)
        if asked is None:
            return False
        try:
            missing = self._find()
        except BadModel:
            return False  # it must be clear what is missing
        end = time.monotonic() + TAKE_BACK_S
        self._trained = self._trained or archive.Trained(self._context.home, self._context.notifier.patience)
        for job in missing:
            if job.number not in self._gone and job.number in asked.get("jobs", [job.number]):
                if time.monotonic() > end:
                    return True
                self._take_back(job, self._trained)
        self._trained = None
        self._gone.clear()
        if requests.pending(self._context.home, requests.RETRY) == asked:  # else somebody has asked again meanwhile
            requests.clear(self._context.home, requests.RETRY)
        return False

    def _take_back(self, job: Job, trained: archive.Trained) -> None:
        context = self._context
        found = trained.find(job)
        if found is None or not archive.claim_again(context.home, job, found):
            self._gone.add(job.number)
            context.say(
                "not taken back",
                f"{job.name} cannot be trained again: trained/ does not have its bytes any more",
                level="warning",
                job=job.number,
                file=job.name,
            )
            return
        context.ledger.move(job, JobState.CLAIMED)
        context.missing_unsure = True
        context.say("taken back", f"{job.name} will train again, in its old place", job=job.number, file=job.name)
