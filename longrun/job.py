"""A job: the obligation to train one claimed file. Its states are data, and one function moves them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class JobState(StrEnum):
    CLAIMED = "claimed"  # out of the inbox, bytes fixed, content not yet checked
    QUEUED = "queued"  # checked, waits for its turn
    RUNNING = "running"  # a run of it has been started
    TRAINED = "trained"  # the lineage of a committed checkpoint says so
    REJECTED = "rejected"  # bad content, failed too often, or skipped: the reason says which


WAITING = frozenset({JobState.CLAIMED, JobState.QUEUED})
FINAL = frozenset({JobState.TRAINED, JobState.REJECTED})

TRANSITIONS = {
    (JobState.CLAIMED, JobState.QUEUED): "admit",
    (JobState.CLAIMED, JobState.REJECTED): "reject",
    (JobState.QUEUED, JobState.RUNNING): "start",
    (JobState.QUEUED, JobState.REJECTED): "reject",
    (JobState.RUNNING, JobState.QUEUED): "retry",  # the worker died, or the run was stopped on purpose
    (JobState.RUNNING, JobState.TRAINED): "finish",
    (JobState.RUNNING, JobState.REJECTED): "give up",
    # A ledger that was lost or restored learns from the model what was trained already.
    (JobState.CLAIMED, JobState.TRAINED): "reconcile",
    (JobState.QUEUED, JobState.TRAINED): "reconcile",
    # An older model was restored, or none is left: what it does not have may be trained again.
    (JobState.TRAINED, JobState.CLAIMED): "take back",
}


@dataclass(frozen=True, kw_only=True)
class Job:
    number: int  # arrival order, and the name of its folder
    name: str  # as dropped; bytes that are no UTF-8 are surrogate-escaped
    state: JobState
    arrived_at: float  # seconds since the epoch
    sha256: str = ""  # of the claimed bytes; empty until examined
    rows: int = 0  # accepted rows; 0 until examined
    format: str = ""
    on_bad_row: str = "reject"  # as it was examined: the numbers of its rows depend on it
    attempts: int = 0  # deaths over it in a row, of the worker or the preparer, that saved nothing new
    reason: str = ""  # JSON, for REJECTED
    record: str = ""  # JSON of the lineage's FileRecord, for TRAINED: a model that is restored may not have it


def check_move(job: Job, target: JobState) -> str:
    """The verb of the move from job.state to target; a move not in TRANSITIONS is a programmer's mistake."""
    verb = TRANSITIONS.get((job.state, target))
    assert verb is not None, f"job {job.number} cannot go from {job.state} to {target}"
    return verb
