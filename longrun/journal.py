"""The one voice of the daemon: each event is a line for people and a line for machines.

logs/daemon.log and stderr get the sentence, state/events.jsonl the facts. Names come from files that
anybody may have dropped, so control characters never reach a terminal or fake a line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrun import disk
from longrun.wording import printable

if TYPE_CHECKING:
    from longrun.config import LogSettings
    from longrun.home import Home


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Journal:
    def __init__(self, home: Home, settings: LogSettings) -> None:
        self._home = home
        self._logger = logging.getLogger("longrun")
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        logging.getLogger("watchdog").addHandler(logging.NullHandler())  # else Python writes its lines among ours
        self._next_progress = 0.0
        self.configure(settings)

    def configure(self, settings: LogSettings) -> None:
        """Write as these settings say, from the next line on."""
        self._settings = settings
        for handler in self._logger.handlers:
            handler.close()
        self._logger.handlers = _handlers(self._home, settings)
        self._bar = _Bar() if sys.stderr.isatty() and settings.format == "text" else None

    def say(self, event: str, text: str, *, level: str = "info", **facts: Any) -> None:
        """Tell one event. `facts` are for machines; the text must say by itself what a person needs."""
        record = {"time": utc_now(), "level": level, "event": event, "message": text, **facts}
        if self._bar is not None:
            self._bar.clear()
        self._logger.log(logging.getLevelNamesMapping()[level.upper()], printable(text), extra={"facts": record})
        try:
            disk.append_line(self._home.events, json.dumps(record, ensure_ascii=True))
        except OSError as error:  # a full disk pauses training; it must not silence the log as well
            self._logger.warning("state/events.jsonl cannot be written: %s", error)

    def progress(self, *, name: str, done: int, planned: int, loss: float | None, text: str) -> None:
        """How far a job is: a bar on a terminal, a line now and then elsewhere."""
        if self._bar is not None:
            self._bar.show(printable(name), done, planned, loss)
        elif time.monotonic() >= self._next_progress:
            self._next_progress = time.monotonic() + self._settings.progress_s
            self._logger.info(
                printable(text), extra={"facts": {"time": utc_now(), "event": "progress", "message": text}}
            )

    def progress_over(self) -> None:
        """The next job tells its first step at once."""
        self._next_progress = 0.0
        if self._bar is not None:
            self._bar.close()


class _Rotated(logging.handlers.RotatingFileHandler):
    """A log that cannot be written, as on a full disk: stderr has each line, and is told once that the log has not."""

    _fails = False

    def emit(self, record: logging.LogRecord) -> None:
        self._failed = False
        try:
            self._come_back()
        except OSError:
            self.handleError(record)
        super().emit(record)
        self._fails = self._failed

    def _come_back(self) -> None:
        """Begin a new log where the one that is written to has been moved or removed."""
        path = Path(self.baseFilename)
        if self.stream is not None and disk.signature(path)[:1] != (os.fstat(self.stream.fileno()).st_ino,):
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self._open()  # or there would be none to write to
            self.stream.close()
            self.stream = fresh

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._fails:
            with contextlib.suppress(OSError, ValueError):  # stderr may lie on the same full disk, or be closed
                sys.stderr.write(f"{self.baseFilename} cannot be written: {error}\n")
        self._failed = True


def _handlers(home: Home, settings: LogSettings) -> list[logging.Handler]:
    rotated = _Rotated(
        home.log,
        maxBytes=settings.max_bytes,
        backupCount=settings.keep,
        encoding="utf-8",
        errors="backslashreplace",
    )
    formatter = _Json() if settings.format == "json" else logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr), rotated]
    for handler in handlers:
        handler.setFormatter(formatter)
    return handlers


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(getattr(record, "facts", {"message": record.getMessage()}), ensure_ascii=True)


class _Bar:
    """A progress bar that makes room for log lines."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._make = tqdm
        self._bar: Any = None

    def show(self, name: str, done: int, planned: int, loss: float | None) -> None:
        if self._bar is None:
            self._bar = self._make(total=planned, initial=done, unit="step", desc=name[:40], leave=False)
        self._bar.n = done
        self._bar.set_postfix_str("" if loss is None else f"loss {loss:.4f}")

    def clear(self) -> None:
        if self._bar is not None:
            self._bar.clear()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
