"""What operators ask of the daemon, as small files in state/requests/: sticky until it is done.

`pause` stays until `resume` removes it, over restarts too. `stop` stays until the daemon has left. `skip`
names the job it is for, so it can never hit the next one. `retry` names the missing jobs that are to train again
and stays until all of them are in the queue.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

from longrun import disk

if TYPE_CHECKING:
    from longrun.home import Home

PAUSE, STOP, SKIP, RETRY = NAMES = ("pause", "stop", "skip", "retry")


def make(home: Home, name: str, **facts: Any) -> None:
    content = {"asked_at": time.strftime("%Y-%m-%d %H:%M:%S"), **facts}
    disk.write_file(home.requests / name, json.dumps(content).encode())


def pending(home: Home, name: str) -> dict[str, Any] | None:
    """The request, if it was made; one that cannot be read still counts as made."""
    try:
        content = (home.requests / name).read_bytes()
    except FileNotFoundError:
        return None
    except PermissionError:  # another user has made it
        return {}
    try:
        facts = json.loads(content)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def made(home: Home) -> dict[str, dict[str, Any]]:
    """All requests, by name."""
    with contextlib.suppress(FileNotFoundError):
        found = {path.name: pending(home, path.name) for path in home.requests.iterdir() if path.name in NAMES}
        return {name: facts for name, facts in found.items() if facts is not None}
    return {}


def clear(home: Home, name: str) -> bool:
    """Take the request back; whether there was one."""
    return disk.remove_file(home.requests / name)
