"""What the daemon is doing, told without asking it: a note it keeps, and the lock that proves it lives.

Read by `daemon.py status` with the standard library alone, so it answers at once, also while the daemon hangs.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from longrun import disk, locks
from longrun.wording import unpinned

if TYPE_CHECKING:
    from longrun.home import Home

STALE_S = 30.0  # a living daemon renews its note every few seconds
RENEW_S = 5.0


def write(home: Home, facts: dict[str, Any]) -> None:
    """Renew the note. It is not synced: after a crash it is about a process that is gone."""
    content = json.dumps({**facts, "written_at": time.time()}).encode()
    try:
        disk.write_file(home.status, content, durable=False)
    except OSError as error:
        if error.errno not in disk.FULL:
            raise
        # "paused: disk" must be seen just when nothing new can be stored: the old note's blocks are there.
        disk.rewrite_note(home.status, content)


def read(home: Home) -> dict[str, Any]:
    """The last note, corrected by the truth: `state` is "stopped" when nobody holds the lock, "starting" when its
    holder has not written a note yet, and `stale_s` says how old the note is when that is suspicious.
    """
    facts = _empty(home) | _note(home)
    written_at = facts.pop("written_at", None)
    held = locks.holder(home.daemon_lock)
    if held is None:
        return _unfinished(facts) | {"state": "stopped", "pid": None, "worker_pid": None, "preparer_pid": None}
    if held.get("pid") != facts["pid"] or not isinstance(written_at, float):
        return facts | {"state": "starting", "pid": held.get("pid"), "current": None}
    age_s = time.time() - written_at
    return facts | {"stale_s": round(age_s)} if age_s > STALE_S else facts


def _unfinished(facts: dict[str, Any]) -> dict[str, Any]:
    """The note of a daemon that was killed: the file it was training is the first that the next one takes up."""
    current = facts["current"]
    if not isinstance(current, dict):
        return facts | {"current": None}
    queue = [current["file"], *facts["queue"]]
    return facts | {"current": None, "queue": queue, "queued": facts["queued"] + 1}


def _note(home: Home) -> dict[str, Any]:
    try:
        note = json.loads(home.status.read_bytes())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _empty(home: Home) -> dict[str, Any]:
    """What can be said before any daemon ran here, or of a model that arrived since."""
    facts: dict[str, Any] = {
        "state": "starting",
        "pid": None,
        "home": str(home.root),
        "global_step": 0,
        "current": None,
        "queue": [],
        "queued": 0,
        "trained": 0,
        "rejected": 0,
        "missing": [],
        "missing_files": 0,
        "problems": [],
    }
    return facts


@dataclass(frozen=True)
class Before:
    """What a file that is dropped now comes after."""

    step: int  # the global step that is reached by then, not counting what waits
    begun: str = ""  # the file that is being trained, or that the model is in the middle of
    waiting: int = 0  # files whose steps nobody knows yet

    @property
    def remarks(self) -> list[str]:
        begun = [f"after {self.begun}, which is begun and comes first"] if self.begun else []
        waits = "file waits" if self.waiting == 1 else "files wait"
        return [*begun, *([f"{self.waiting} {waits} before it: their steps come on top"] if self.waiting else [])]


def before(home: Home) -> Before:
    from longrun import archive, missing
    from longrun.errors import BadModel

    facts = read(home)
    current = facts["current"]
    if current:
        return Before(current["target_step"], current["file"], facts["queued"])
    try:
        lineage = missing.published_lineage(home)
    except BadModel:
        lineage = None
    begun = lineage.in_progress if lineage and not lineage.is_foreign(home.id) else None
    if begun and archive.claimed_files(home, begun.plan.job):
        return Before(begun.plan.target_step, begun.plan.name, max(0, facts["queued"] - 1))
    return Before(published_step(home), "", facts["queued"])


def published_step(home: Home) -> int:
    """global_step of the published model; 0 when there is none."""
    try:
        return int(json.loads((home.model / "trainer_state.json").read_bytes())["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def of_model(home: Home) -> dict[str, Any]:
    """What the published model says of itself: its `base_model`, and the file of this home that is `begun` in it.

    None each, where there is no model, or it does not say.
    """
    from longrun.lineage import head_in

    try:
        with (home.model / "lineage.json").open("rb") as file:
            head = head_in(file)
        return {"base_model": unpinned(head["base_model"]), "begun": _begun(home, head["in_progress"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"base_model": None, "begun": None}


def _begun(home: Home, here: dict[str, Any] | None) -> dict[str, Any] | None:
    from longrun import archive

    if not here or here["plan"]["home"] not in (home.id, "") or not archive.claimed_files(home, here["plan"]["job"]):
        return None
    return {"file": here["plan"]["name"], "done_steps": here["done_steps"], "planned_steps": here["planned_steps"]}
