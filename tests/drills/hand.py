"""A process that has everything imported and runs a program in forked children: a case costs milliseconds.

    python -m tests.drills.hand CHILDREN      reads a line of JSON for each order, answers with one

CHILDREN says what a daemon has for worker and preparer: "scripted" ones, or "real" ones with torch imported. A run
may be told to die after some seconds, or at its nth call that changes the disk (see `faults`). A daemon may also be
started and left to itself: it is a process like any other, and who started it signals it and asks how it ended.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from tests.lab import REPOSITORY, python_path

LIMIT_S = 10.0  # no command may hang
MEMORY_BYTES = 200 << 20


@dataclass(frozen=True)
class Outcome:
    code: int  # negative: the signal that ended it
    out: str
    err: str
    seconds: float
    peak_bytes: int
    calls: list[str]  # those that change the disk, when they were counted

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def check_told(self) -> None:
        """A failure is one sentence; nothing hung, nothing took much memory."""
        assert self.code in (0, 1), self
        told = self.err.removeprefix("backup_manager.py: ")
        verdict = self.out.startswith(("DAMAGED", "{"))  # of verify, for a person or a machine
        assert self.code == 0 or verdict or (told != self.err and told.count("\n") == 1), self
        assert self.peak_bytes < MEMORY_BYTES, self


class Hand:
    def __init__(self, children: str = "scripted", **environment: str) -> None:
        command = [sys.executable, "-m", "tests.drills.hand", children]
        here = os.environ | {"PYTHONPATH": python_path(REPOSITORY), "PYTHONUNBUFFERED": "1"} | environment
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=here
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def do(self, *arguments: str | Path, home: Path, **orders: Any) -> Outcome:
        """Run backup_manager.py in this home. Orders: after_s, nth, how, settings ({"longrun.store:YOUNG_S": 0}), and
        program "daemon": daemon.py.
        """
        line = {"arguments": [*map(str, arguments), "--home", str(home)], "cwd": str(home), **orders}
        return Outcome(**self.ask(line))

    def start(
        self, *arguments: str, home: Path, log: Path, environment: dict[str, str], program: str = "daemon"
    ) -> Started:
        """Start daemon.py, or train.py where children are real, in this home, as subprocess.Popen would."""
        whole = ["--home", str(home), *arguments]
        line = {"start": whole, "cwd": str(home), "log": str(log), "environment": environment, "program": program}
        return Started(self, self.ask(line)["pid"], log)

    def ask(self, line: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


class Started:
    """As subprocess.Popen would have given. The hand is its parent: the pid is its own until poll() tells its end."""

    def __init__(self, hand: Hand, pid: int, log: Path) -> None:
        self.pid = pid
        self._log = log
        self.returncode: int | None = None
        self._hand = hand

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._hand.ask({"poll": self.pid})["code"]
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        begun = time.monotonic()
        while (code := self.poll()) is None:
            if timeout is not None and time.monotonic() > begun + timeout:
                os.kill(self.pid, signal.SIGUSR2)  # it tells where it is
                time.sleep(0.5)
                raise AssertionError(f"the daemon has not ended after {timeout} s\n{self._log.read_text()[-2000:]}")
            time.sleep(0.002)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _serve() -> None:
    import fsspec  # noqa: F401 - warm
    import watchdog.observers  # noqa: F401 - warm
    import zstandard  # noqa: F401 - warm

    if "AWS_ENDPOINT_URL" in os.environ:
        import s3fs  # noqa: F401 - warm

    import backup_manager
    import daemon
    from longrun import compose  # noqa: F401 - warm
    from tests.drills.forked import fork_children
    from tests.probe import sitecustomize  # noqa: F401 - warm

    begin = functools.partial(fork_children, _children(sys.argv[1]))
    programs = {"backup_manager": (backup_manager.main, lambda: None), "daemon": (daemon.main, begin)}
    if sys.argv[1] == "real":
        programs["train"] = (_children("real"), begin)
    for line in sys.stdin:
        order = json.loads(line)
        if "start" in order:
            answer = {"pid": _start(*programs[order["program"]], order)}
        elif "poll" in order:
            answer = {"code": _code(order["poll"])}
        else:
            answer = _do(*programs[order.get("program", "backup_manager")], order)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _children(kind: str) -> Any:
    """The main function of the program that a daemon starts as worker and preparer, with all that it imports."""
    if kind == "scripted":
        from tests.drills import scripted

        return scripted.main

    import train
    from longrun.training import base_model, metrics, prepare, run, serve, trainer  # noqa: F401 - warm

    return train.main


def _start(main: Any, begin: Any, order: dict[str, Any]) -> int:
    """The pid of a fork that runs a program, whose children are forks of it; it ends as an interpreter does."""
    child = os.fork()
    if child:
        return child
    from tests.probe import sitecustomize as probe

    with Path(order["log"]).open("a") as log, Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv = [f"{order['program']}.py", *order["start"]]
    begin()
    probe.main()
    faulthandler.register(signal.SIGUSR2)
    sys.exit(main(order["start"]))


def _code(child: int) -> int | None:
    """Exit code, or the signal that ended it, negative; None while it runs."""
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _do(main: Any, begin: Any, order: dict[str, Any]) -> dict[str, Any]:
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        tempfile.TemporaryFile("w+") as calls,
    ):
        before = time.monotonic()
        child = os.fork()
        if not child:
            begin()
            _run(main, order, out, err, calls)
        code, peak_kib = _wait(child, before, order.get("after_s"))
        values = {"code": code, "seconds": time.monotonic() - before, "peak_bytes": peak_kib << 10}
        return values | {"out": _text(out), "err": _text(err), "calls": _text(calls).splitlines()}


def _run(main: Any, order: dict[str, Any], out: IO[str], err: IO[str], calls: IO[str]) -> None:
    from tests.drills.faults import Faults

    os.chdir(order["cwd"])
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    trace: list[str] = []
    for name, value in order.get("settings", {}).items():
        module, _, attribute = name.partition(":")
        setattr(importlib.import_module(module), attribute, value)
    if "nth" in order:
        Faults(order["nth"], order.get("how", ""), trace).install()
    code = 70
    try:
        code = main(order["arguments"])
    except BaseException:  # noqa: BLE001 - shown as the interpreter would
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        calls.write("\n".join(trace))
        with contextlib.suppress(OSError):
            calls.flush()
        os._exit(code)


def _wait(child: int, before: float, after_s: float | None) -> tuple[int, int]:
    """Exit code and peak memory; the child is killed at its moment, or when it hangs (then: SIGALRM)."""
    end = before + (LIMIT_S if after_s is None else after_s)
    if after_s is not None:
        time.sleep(max(0.0, end - time.monotonic()))
        os.kill(child, signal.SIGKILL)
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss
        if time.monotonic() > end + LIMIT_S:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -signal.SIGALRM, 0
        time.sleep(0.002)


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


if __name__ == "__main__":
    _serve()
