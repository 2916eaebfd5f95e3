"""A daemon to measure: its home, what is dropped into it, and what it tells."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parent.parent
LIMIT_S = 3600.0
LOOK_S = 0.02
SAID = "said.log"
PROBE = ROOT / "bench" / "probe"
TOLD = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) \S+ +(.*)$", re.MULTILINE)


def python_path(*places: Path) -> str:
    """PYTHONPATH with these places first; what it names already may be where the packages are."""
    packages = os.environ.get("PYTHONPATH")
    return os.pathsep.join([*map(str, places), *([packages] if packages else [])])


class Daemon:
    """`daemon.py run` on a home, as long as the block lasts."""

    def __init__(self, home: Path, settings: str, *arguments: str) -> None:
        self.home = home
        self.log = home / "logs" / "daemon.log"
        self._arguments = arguments
        (home / "inbox").mkdir(parents=True, exist_ok=True)
        (home / "longrun.toml").write_text(settings)

    def __enter__(self) -> Self:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path(ROOT)}
        command = [sys.executable, str(ROOT / "daemon.py"), "run", "--home", str(self.home), *self._arguments]
        with (self.home / "stderr.log").open("a") as log:
            self.process = subprocess.Popen(command, cwd=self.home, env=environment, stdout=log, stderr=log)
        self.wait(lambda: self.status.get("pid") == self.process.pid)
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(LIMIT_S)

    @property
    def told(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    @property
    def status(self) -> dict[str, Any]:
        """What it told last; nothing at first."""
        file = self.home / "state" / "status.json"
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return found

    def drop(self, name: str, rows: list[dict[str, Any]]) -> float:
        """Put a file into the inbox in one step; when, in seconds since the epoch."""
        return self.drop_text(name, "".join(json.dumps(row) + "\n" for row in rows))

    def drop_text(self, name: str, text: str) -> float:
        aside = self.home / "inbox" / f".{name}.tmp"
        aside.write_text(text)
        aside.rename(self.home / "inbox" / f"{name}.jsonl")
        return time.time()

    def wait(self, until: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
        deadline = time.monotonic() + limit_s
        while not (found := until()):
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"the daemon ended, or nothing came in {limit_s:.0f} s; it told:\n{self.told}")
            time.sleep(LOOK_S)
        return found

    def wait_told(self, text: str) -> float:
        """Until the log has a line with this text; when it was told, in seconds since the epoch."""
        return float(self.wait(lambda: self._when_told(text)))

    def _when_told(self, text: str) -> float | None:
        told = next((when for when, line in TOLD.findall(self.told) if text in line), None)
        return told and datetime.strptime(told, "%Y-%m-%d %H:%M:%S,%f").astimezone().timestamp()

    def events_of(self, name: str) -> dict[str, float]:
        """When each event of a file was told last, by its kind, in seconds since the epoch."""
        events = lines_of(self.home / "state" / "events.jsonl")
        job = next(event["job"] for event in events if event.get("file") == f"{name}.jsonl")
        return {
            event["event"]: datetime.fromisoformat(event["time"]).timestamp()
            for event in events
            if event.get("job") == job
        }


def fill(home: Path, files: list[Path], settings: str) -> None:
    """Settings, and files in the inbox that arrived in this order."""
    (home / "inbox").mkdir(parents=True)
    (home / "longrun.toml").write_text(settings)
    now = time.time()
    for at, file in enumerate(files):
        shutil.copy(file, home / "inbox")
        os.utime(home / "inbox" / file.name, (now - 100 + at,) * 2)


def draining(home: Path, base: Path, python: Path | str = sys.executable) -> list[str]:
    """What to type to train what is in the inbox, and leave."""
    return [str(python), str(ROOT / "daemon.py"), "run", "--drain", "--home", str(home), "--base-model", str(base)]


def drain(home: Path, base: Path, files: list[Path], settings: str, **environment: str) -> float:
    """Train the files, in this order, through a daemon in a new home; wall seconds."""
    fill(home, files, settings)
    return run(draining(home, base), home, **environment)


def run(command: list[str], home: Path, **environment: str) -> float:
    """Wall seconds of a command that is run to its end."""
    began = time.monotonic()
    with start(command, home, **environment) as process:
        try:
            code = process.wait(LIMIT_S)
        except BaseException:
            process.kill()
            raise
    must_be_good(code, command, home)
    return time.monotonic() - began


def must_be_good(code: int, command: list[str], home: Path) -> None:
    """RuntimeError with what the command said last, if it failed."""
    if code:
        raise RuntimeError(f"{shlex.join(command)}: exit {code}\n{(home / SAID).read_text()[-3000:]}")


def start(command: list[str], home: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start a command with the probe on its path and no way to the hub; what it says is kept in its home."""
    places = {"PYTHONPATH": python_path(PROBE, ROOT), "HF_HUB_OFFLINE": "1"}
    with (home / SAID).open("a") as log:
        return subprocess.Popen(command, cwd=home, env=os.environ | places | environment, stdout=log, stderr=log)


def lines_of(file: Path) -> list[dict[str, Any]]:
    """Of a file with one JSON object a line. Not str.splitlines: that ends lines at U+2028 too, within a string."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@dataclass(frozen=True)
class Used:
    """What a process has used, as Linux says."""

    cpu_s: float
    rss_mb: float

    @classmethod
    def by(cls, pid: int) -> Used:
        cpu = psutil.Process(pid).cpu_times()  # to 10 ms, of threads that have ended, too
        rolled = Path(f"/proc/{pid}/smaps_rollup").read_text()
        rss = re.search(r"^Rss: +(\d+) kB", rolled, re.MULTILINE)
        assert rss
        return cls(cpu.user + cpu.system, int(rss[1]) * 1024 / 1e6)
