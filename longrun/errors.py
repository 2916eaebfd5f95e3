"""What can go wrong, said so that a person knows what to do next.

    LongrunError
    |-- BadConfig        a setting, flag or folder that cannot work          exit 78
    |-- Locked           another process holds this home                     exit 75
    |-- NotRunning       the command needs a running daemon                  exit 3
    |-- BadFile          the content of a dropped file                       exit 1
    |-- BadBackup        a backup, or what should become one, is not whole   exit 1
    |   `-- BadManifest  what says what is in a backup cannot be trusted     exit 1
    |-- BadModel         current_model/ is not something to go on from       exit 1
    |-- CannotTrain      what files are trained with does not work           exit 1
    `-- ModelRemoved     current_model/ went away or changed under a run     exit 1

Every message names what was attempted, on what, why it failed; `hint` says what to type next.
"""

from __future__ import annotations

import io
import sys
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from longrun.wording import printable

if TYPE_CHECKING:
    from collections.abc import Callable


class ExitCode(IntEnum):
    """Process exit codes; 75 and 78 are those of sysexits.h, 3 is the LSB's "not running"."""

    OK = 0
    FAILURE = 1
    USAGE = 2
    NOT_RUNNING = 3
    LOCKED = 75
    BAD_CONFIG = 78
    INTERRUPTED = 130  # Ctrl-C before there was anything to save


class LongrunError(Exception):
    """Something failed in a way a person can act on."""

    exit_code = ExitCode.FAILURE
    before_hint = "; "

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}{self.before_hint}{self.hint}" if self.hint else self.message


class BadConfig(LongrunError):
    """A setting, flag or folder cannot work as given."""

    exit_code = ExitCode.BAD_CONFIG


class Locked(LongrunError):
    """Another process holds the lock of this home."""

    exit_code = ExitCode.LOCKED


class NotRunning(LongrunError):
    """The command needs a running daemon and there is none."""

    exit_code = ExitCode.NOT_RUNNING


class BadBackup(LongrunError):
    """A backup, or what should become one, is not whole."""


class BadManifest(BadBackup):
    """The manifest of a backup is damaged or missing; other backups are none the worse."""


class BadModel(LongrunError):
    """current_model/ holds nothing that training may go on from."""


class CannotTrain(LongrunError):
    """What files are trained with does not work: processes, base model, device or settings. No file is at fault."""


class ModelRemoved(LongrunError):
    """current_model/ was removed or replaced while a run was using it."""


class BadFile(LongrunError):
    """The content of a dropped file cannot be trained; nothing of it was.

    `line` counts from 1, `byte` from 0 within the (decompressed) file, `field` is a path such as
    `messages[2].content`, `hint` is the fix.
    """

    before_hint = ". Fix: "

    def __init__(
        self,
        why: str,
        *,
        kind: str = "content",
        line: int | None = None,
        byte: int | None = None,
        field: str | None = None,
        extract: str | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(placed(why, line=line, byte=byte, field=field), hint=hint)
        self.why = why
        self.kind = kind
        self.line = line
        self.byte = byte
        self.field = field
        self.extract = extract

    def reason(self) -> dict[str, Any]:
        """The refusal as plain values, for rejected/NAME.reason.json and the event log."""
        found = {
            "kind": self.kind,
            "why": self.why,
            "line": self.line,
            "byte": self.byte,
            "field": self.field,
            "extract": self.extract,
            "fix": self.hint or None,
        }
        return {key: value for key, value in found.items() if value is not None}


def placed(why: str, *, line: int | None = None, byte: int | None = None, field: str | None = None) -> str:
    """What is wrong, behind where it is, as far as that is known."""
    at = [f"line {line}" if line is not None else "", f"byte {byte}" if byte is not None else ""]
    place = ", ".join(part for part in at if part)
    return ": ".join(part for part in (place, field, why) if part)


def exit_code(program: str, work: Callable[[], int]) -> int:
    """Do a program's work; what a person can act on becomes one sentence on stderr and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names are told that the terminal has no letters for
            stream.reconfigure(errors="backslashreplace")
    try:
        return work()
    except LongrunError as error:
        return _told(program, str(error), error.exit_code)
    except ModuleNotFoundError as error:
        return _told(program, f"{error}; use .venv/bin/python, which `make run` sets up", ExitCode.FAILURE)
    except BrokenPipeError:  # `daemon.py status | head`
        return ExitCode.FAILURE
    except OSError as error:
        return _told(program, str(error), ExitCode.FAILURE)
    except KeyboardInterrupt:
        return _told(program, "interrupted", ExitCode.INTERRUPTED)


def _told(program: str, sentence: str, code: ExitCode) -> int:
    print(f"{program}: {printable(sentence)}", file=sys.stderr)  # noqa: T201
    return code
