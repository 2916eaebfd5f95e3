"""What was trained in this home and is not in its model: after a restore, a copy, a removal, or damage.

The ledger knows what was trained, the model what it has. Both are only read here, beside a daemon or without one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from longrun import archive
from longrun.checkpoint import GONE, LINEAGE
from longrun.errors import BadModel
from longrun.job import Job, JobState
from longrun.ledger import Ledger
from longrun.lineage import FileRecord, Lineage, LineageReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from longrun.home import Home


def missing_of(jobs: Iterable[Job], lineage: Lineage | None, home: str) -> list[Job]:
    """Those of the trained jobs that the model does not have, in order of arrival.

    A file that was dropped again after its loss makes up for it: each later job of the model with the same bytes
    for one earlier job. An earlier one does not, because then the same bytes were meant to be trained twice.
    """
    trained = lineage.trained(home) if lineage else {}
    later: dict[str, list[int]] = defaultdict(list)
    for number, sha256 in sorted(trained):
        later[sha256].append(number)
    missing = []
    absent = [job for job in jobs if (job.number, job.sha256) not in trained]
    for job in sorted(absent, key=lambda job: job.number, reverse=True):
        if later[job.sha256] and later[job.sha256][-1] > job.number:
            later[job.sha256].pop()
        else:
            missing.append(job)
    return missing[::-1]


def published_lineage(home: Home, lineages: LineageReader | None = None) -> Lineage | None:
    """What the published model says it has seen; None when there is no model, BadModel when it does not say."""
    try:
        return (lineages or LineageReader()).read((home.model / LINEAGE).read_bytes())
    except GONE:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadModel(f"cannot read {home.model / LINEAGE}: {error!r}") from None


def forgotten(lineage: Lineage, home: str, known: Callable[[int], object]) -> list[Job]:
    """Trained jobs of this home that a ledger made anew, or an older one, does not know of: a restore would lose
    them unseen.
    """
    records = [record for record in lineage.trained(home).values() if record.home]
    return [_job_of(record) for record in records if not known(record.job)]


def _job_of(record: FileRecord) -> Job:
    return Job(
        number=record.job,
        name=record.name,
        state=JobState.TRAINED,
        arrived_at=datetime.fromisoformat(record.finished_at).timestamp(),
        sha256=record.sha256,
        rows=record.rows + record.held_out_rows,
        on_bad_row="skip",  # the rows are the same: had there been a bad one, it was skipped
        record=record.to_json(),
    )


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A missing file, for a person who decides what to do about it."""

    job: Job
    record: FileRecord | None  # of its training; None when it was trained before records were kept
    file: Path | None  # where its bytes are now
    done_steps: int  # more than 0 when the model is in the middle of it


def jobs(home: Home) -> list[Job]:
    """The missing jobs as the disk tells them now; LongrunError when ledger or model cannot be read."""
    trained = Ledger.trained(home.ledger)  # before the model: what is trained meanwhile is in it by then
    return missing_of(trained, published_lineage(home), home.id)


def look(home: Home) -> list[Missing]:
    """`jobs`, each with its file, which is read for that."""
    lineage = published_lineage(home)
    found: list[Missing] = []
    taken: set[Path] = set()
    trained = archive.Trained(home)
    for job in jobs(home):
        here = lineage.progress_of(home.id, job.number, job.sha256) if lineage else None
        file = trained.find(job, taken)
        taken |= {file} if file else set()
        record = FileRecord.from_json(job.record) if job.record else None
        found.append(Missing(job=job, record=record, file=file, done_steps=here.done_steps if here else 0))
    return found
