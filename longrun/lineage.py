"""What the weights have seen, told by the model itself.

A lineage is written inside each checkpoint, in the same commit as the weights, so that deleting, restoring
or copying the model moves the truth along with it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field, replace
from typing import IO, Any

from longrun.plan import Plan


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file in the model's life. `done_steps` < `planned_steps` only when it was skipped or failed."""

    job: int
    name: str
    sha256: str
    rows: int
    held_out_rows: int
    epochs: int
    batch_size: int
    seed: int
    base_step: int
    planned_steps: int
    target_step: int
    done_steps: int
    outcome: str  # "trained", or "ended early"
    finished_at: str  # ISO 8601, UTC
    final_loss: float | None  # of the last step
    mean_loss: float | None  # over all steps of the job
    eval_loss: float | None  # mean per trained token of the held-out rows
    home: str = ""  # id of the home that `job` is a number of; "" in models older than these ids
    _line: str = field(default="", init=False, repr=False, compare=False)

    def is_trained(self, home: str) -> bool:
        """Whether it was trained to its end, as a job of this home."""
        return self.outcome == "trained" and self.home in (home, "")

    def to_json(self) -> str:
        values = asdict(self)
        del values["_line"]
        return json.dumps(values)

    @property
    def line(self) -> str:
        """to_json, kept: every checkpoint of a lineage is written with all its records."""
        if not self._line:
            object.__setattr__(self, "_line", self.to_json())
        return self._line

    @classmethod
    def from_json(cls, text: str) -> FileRecord:
        return cls(**json.loads(text))


@dataclass(frozen=True, kw_only=True)
class InProgress:
    """The job that the weights are in the middle of."""

    plan: Plan
    done_steps: int
    loss_sum: float  # over the steps done, so that the job's mean loss survives a crash exactly
    last_loss: float | None

    @property
    def global_step(self) -> int:
        return self.plan.base_step + self.done_steps


@dataclass(frozen=True, kw_only=True)
class Lineage:
    lineage: str  # unlike that of any other model
    base_model: str  # what it grew from, pinned
    optim: str = ""  # whose state is beside the weights; "" in models older than this note
    global_step: int = 0
    files: tuple[FileRecord, ...] = ()
    in_progress: InProgress | None = None

    def trained(self, home: str) -> dict[tuple[int, str], FileRecord]:
        """The files of this home that were trained to their end, by job and hash."""
        return {(record.job, record.sha256): record for record in self.files if record.is_trained(home)}

    def record_of(self, home: str, job: int, sha256: str) -> FileRecord | None:
        """What was written of this home's job when it was trained to its end; None when it was not."""
        # Asked several times a file: the latest records first, and of most their number only.
        return next(
            (
                record
                for record in reversed(self.files)
                if record.job == job and record.sha256 == sha256 and record.is_trained(home)
            ),
            None,
        )

    def progress_of(self, home: str, job: int, sha256: str) -> InProgress | None:
        """How far this job is, if the weights are in its middle.

        Another home's job with the same bytes counts: the order of rows depends on them, not on who dropped them.
        So a model that was copied in the middle of a file goes on when the file is dropped where it is now.
        """
        here = self.in_progress
        if here is None or here.plan.sha256 != sha256:
            return None
        return here if here.plan.job == job or self.is_foreign(home) else None

    def is_foreign(self, home: str) -> bool:
        """Whether the job in progress was begun in another home."""
        return self.in_progress is not None and self.in_progress.plan.home not in (home, "")

    def begun(self, plan: Plan, now: str) -> tuple[Lineage, InProgress]:
        """The lineage as a run of `plan` goes on from it, and how far the job is.

        Another job that was left in the middle (skipped, or given up) is closed: its rest will not be trained.
        """
        here = self.progress_of(plan.home, plan.job, plan.sha256)
        if here is not None:
            return replace(self, in_progress=None), replace(here, plan=plan)  # under this home's id and number
        closed = self
        if self.in_progress is not None:
            closed = self.ended(self.in_progress, outcome="ended early", finished_at=now, eval_loss=None)
        return closed, InProgress(plan=plan, done_steps=0, loss_sum=0.0, last_loss=None)

    def at(self, progress: InProgress) -> Lineage:
        """This lineage with the job in the middle of training."""
        return replace(self, global_step=progress.global_step, in_progress=progress)

    def ended(self, progress: InProgress, *, outcome: str, finished_at: str, eval_loss: float | None) -> Lineage:
        """This lineage with the job of `progress` among the files that are over."""
        plan = progress.plan
        record = FileRecord(
            job=plan.job,
            name=plan.name,
            sha256=plan.sha256,
            rows=plan.rows,
            held_out_rows=plan.held_out_rows,
            epochs=plan.recipe.epochs,
            batch_size=plan.recipe.batch_size,
            seed=plan.recipe.seed,
            base_step=plan.base_step,
            planned_steps=plan.planned_steps,
            target_step=plan.target_step,
            done_steps=progress.done_steps,
            outcome=outcome,
            finished_at=finished_at,
            final_loss=progress.last_loss,
            mean_loss=progress.loss_sum / progress.done_steps if progress.done_steps else None,
            eval_loss=eval_loss,
            home=plan.home,
        )
        return replace(self, global_step=progress.global_step, files=(*self.files, record), in_progress=None)

    def to_json(self) -> str:
        """The head on the first line, and each file on one of its own: what grows, grows at its end."""
        here = self.in_progress
        told = {"planned_steps": here.plan.planned_steps, "target_step": here.plan.target_step} if here else {}
        head = {
            "lineage": self.lineage,
            "base_model": self.base_model,
            "optim": self.optim,
            "global_step": self.global_step,
            "in_progress": here and asdict(here) | told,
        }
        records = ",\n".join(record.line for record in self.files)
        return f"{json.dumps(head)[:-1]}{_FILES.decode()}{records}{_END.decode()}"

    @classmethod
    def from_json(cls, text: str) -> Lineage:
        """The lineage written by to_json; ValueError, KeyError or TypeError when it is not one."""
        return LineageReader().read(text.encode())


# With an end of line as they are, neither can be within a string.
_FILES, _END = b', "files": [\n', b"\n]}\n"


class LineageReader:
    """Reads a lineage again and again while it grows: the records it had before are neither parsed nor held twice.

    What was read before is known by its hash, not kept: a process that follows a lineage for months holds each record
    once, and nothing else.
    """

    def __init__(self) -> None:
        self._files: tuple[FileRecord, ...] = ()
        self._size = 0  # bytes of their text
        self._digest = b""

    def read(self, content: bytes) -> Lineage:
        """ValueError, KeyError or TypeError when this is no lineage."""
        # One of another form, as models older than this one have it, is read whole each time.
        start = content.find(_FILES) + len(_FILES) if _FILES in content and content.endswith(_END) else None
        known: tuple[FileRecord, ...] = ()
        news = content
        digest = hashlib.sha256()
        if start and self._files:
            digest.update(memoryview(content)[start : start + self._size])
            if digest.digest() == self._digest:
                known = self._files
                news = content[:start] + content[start + self._size :].removeprefix(b",")
        values: dict[str, Any] = json.loads(news, object_hook=_record)
        here, found = values["in_progress"], tuple(values["files"])
        if not all(isinstance(record, FileRecord) for record in found):
            raise TypeError("files holds what is no record of a file")
        lineage = Lineage(
            lineage=values["lineage"],
            base_model=values["base_model"],
            optim=values.get("optim", ""),
            global_step=values["global_step"],
            files=known + found,
            in_progress=here
            and InProgress(
                plan=Plan.from_dict(here["plan"]),
                done_steps=here["done_steps"],
                loss_sum=here["loss_sum"],
                last_loss=here["last_loss"],
            ),
        )
        self._files = lineage.files if start else ()
        if start:
            digest = digest if known else hashlib.sha256()
            digest.update(memoryview(content)[start + (self._size if known else 0) : -len(_END)])
            self._size, self._digest = len(content) - start - len(_END), digest.digest()
        return lineage


def head_in(file: IO[bytes]) -> dict[str, Any]:
    """What to_json wrote before the records, which of a long one are not read; ValueError when it is no JSON object."""
    head = file.readline()
    content = head.removesuffix(_FILES) + b"}" if head.endswith(_FILES) else head + file.read()
    found = json.loads(content)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def _record(values: dict[str, Any]) -> FileRecord | dict[str, Any]:
    """What the parser has just read, as a record where it is one: all of them as dicts would take twice the memory."""
    if "outcome" not in values:
        return values
    shared: dict[str, Any] = {name: sys.intern(values[name]) for name in ("outcome", "home") if name in values}
    return FileRecord(**values | shared)
