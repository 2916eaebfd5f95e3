"""In the place of subprocess.Popen, in a daemon that is itself a fork of a process with everything imported.

The daemon's children are forks of it, then: they start in milliseconds, torch or not, and are processes like any
other, with their own pid, session and parent.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types
from typing import TYPE_CHECKING, Any, NoReturn

from longrun import worker

if TYPE_CHECKING:
    from collections.abc import Callable

    Program = Callable[[list[str]], int | None]


def fork_children(program: Program) -> None:
    """Let the daemon of this process run this program in its children; what it was to start is passed over."""
    names = {"Popen": lambda *command, **how: Forked(program, *command, **how)}
    kept = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
    worker.subprocess = types.SimpleNamespace(**names, **kept)  # type: ignore[assignment]


class Forked:
    def __init__(self, program: Program, command: list[str], *, stdout: Any, stderr: Any, **options: Any) -> None:
        self._code: int | None = None
        begun, told = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.setsid()
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            os.closerange(3, 1024)  # as an exec would: among them are locks
            for number in (signal.SIGTERM, signal.SIGHUP):  # likewise
                if callable(signal.getsignal(number)):
                    signal.signal(number, signal.SIG_DFL)
            sys.argv = command[1:]
            _run_and_exit(program, command[2:])
        os.close(told)
        os.read(begun, 1)  # the session is its own by now, as it is when Popen returns
        os.close(begun)

    def poll(self) -> int | None:
        if self._code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if found else None
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (60.0 if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked child", timeout or 0.0)
            time.sleep(0.001)
        return code


def _run_and_exit(program: Program, arguments: list[str]) -> NoReturn:
    """As an interpreter would: the probe first, then the program, whatever its parent had begun."""
    from tests.probe import sitecustomize as probe

    code: Any = 1
    try:
        probe.main()
        code = program(arguments) or 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 - shown as the interpreter would
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)
