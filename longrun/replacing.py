"""Being alone with a model, for those who replace or remove it: restore and reset."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from longrun import disk
from longrun.errors import Locked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from longrun.home import Home

LOOK_S = 0.2
FORMER_WORKER_S = 10.0


@contextlib.contextmanager
def alone_with_model(home: Home, what: str, *, wait: bool = False, hint: str) -> Iterator[None]:
    """No file begins to train meanwhile; Locked when one is being trained, unless the caller is willing to wait."""
    lock = None
    while lock is None:
        try:
            lock = disk.Lock.take(home.training_lock, what=what, held=home.model, hint=hint)
        except Locked:
            if not wait:
                raise
            time.sleep(LOOK_S)
    with lock:
        if disk.holder(home.daemon_lock) is None:
            _outlast_former_worker(home, what)
        yield


def _outlast_former_worker(home: Home, what: str) -> None:
    """A worker whose daemon was killed may be about to commit; it ends by itself."""
    with disk.Lock.take(
        home.model_lock, what=what, wait_s=FORMER_WORKER_S, held=home.model, hint="end that process, or wait for it"
    ):
        pass
