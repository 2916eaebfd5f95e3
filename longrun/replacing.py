"""Being alone with a model, for those who replace or remove it: restore and reset."""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING

from longrun import locks
from longrun.errors import Locked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from longrun.home import Home

LOOK_S = 0.2
FORMER_WORKER_S = 10.0


@contextlib.contextmanager
def alone_with_model(home: Home, what: str, *, wait: bool = False, hint: str) -> Iterator[None]:
    """No file begins to train meanwhile; Locked when one is being trained, unless the caller is willing to wait."""
    with _next_in_turn(home, what) if wait else contextlib.nullcontext():
        lock = None
        while lock is None:
            try:
                lock = locks.Lock.take(home.training_lock, what=what, held=home.model, hint=hint)
            except Locked:
                if not wait:
                    raise
                time.sleep(LOOK_S)
    with lock:
        if locks.holder(home.daemon_lock) is None:
            _outlast_former_worker(home, what)
        yield


def _next_in_turn(home: Home, what: str) -> locks.Lock:
    """Else the next file would begin in the moment in which one ends."""
    return locks.Lock.take(home.turn_lock, what=what, wait_s=math.inf, held=home.model)


def check_turn(home: Home) -> None:
    """Locked while somebody waits to replace the model."""
    waiting = locks.holder(home.turn_lock)
    if waiting is not None:
        raise Locked(f"{waiting.get('what', 'another process')} (pid {waiting.get('pid', '?')}) waits for the model")


def _outlast_former_worker(home: Home, what: str) -> None:
    """A worker whose daemon was killed may be about to commit; it ends by itself."""
    with locks.Lock.take(home.model_lock, what=what, wait_s=FORMER_WORKER_S, held=home.model):
        pass
