"""A home to experiment in: drop files, run the real daemon, break it, and count what the model received."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.drills.hand import Hand

REPOSITORY = Path(__file__).resolve().parent.parent
PROBE = REPOSITORY / "tests" / "probe"
LIMIT_S = 150.0


def python_path(place: Path) -> str:
    """PYTHONPATH with this place first; what it names already may be where the packages are."""
    packages = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(place), *([packages] if packages else [])])


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def numbered(name: str, rows: int) -> list[dict[str, Any]]:
    """Rows that can be told apart in what the model receives: "<name>-0007."."""
    return [chat(f"Say {name}-{row:04d}.", f"{name}-{row:04d}. {'word ' * (row % 7)}") for row in range(1, rows + 1)]


def toml(settings: dict[str, Any]) -> str:
    tables: dict[str, dict[str, Any]] = collections.defaultdict(dict)
    for key, value in settings.items():
        section, _, name = key.partition(".")
        tables[section][name] = value
    lines = [
        line
        for section, table in tables.items()
        for line in (f"[{section}]", *(f"{name} = {json.dumps(value)}" for name, value in table.items()))
    ]
    return "\n".join(lines) + "\n"


def digest_of(tensor: Any) -> str:
    """Of a tensor's bytes, which differ when a bit does; megabytes of them would keep pytest busy showing where."""
    return hashlib.sha256(tensor.contiguous().view(-1).numpy().tobytes()).hexdigest()


class Lab:
    """A home with its daemon: a process that imports what it needs or, with a hand, a fork that starts at once."""

    def __init__(
        self,
        home: Path,
        *,
        hand: Hand | None = None,
        base_model: Path | None = None,
        fresh: bool = True,
        **settings: Any,
    ) -> None:
        self.home = home
        self.hand = hand
        self.inbox = home / "inbox"
        self.model = home / "current_model"
        self.stderr = home / "stderr.log"
        self.under: tuple[str | Path, ...] = ()  # the command that the daemon is started by
        self.daemons: list[Any] = []
        if not fresh:  # somebody else's home, only looked at
            return
        self.inbox.mkdir(parents=True)
        self.probe = home / "probe"
        self.probe.mkdir()
        if base_model is not None:
            settings["model.base_model"] = str(base_model)
        self.configure(**{"inbox.settle_s": 0.3, "worker.retry_s": 0.5, "log.rows": True, **settings})

    def configure(self, **settings: Any) -> None:
        """Write longrun.toml from {"train.learning_rate": 1e-3}."""
        (self.home / "longrun.toml").write_text(toml(settings))

    def drop(self, name: str, rows: list[dict[str, Any]] | int) -> Path:
        """Put a file into the inbox in one step; a number makes that many numbered rows."""
        content = numbered(name.partition(".")[0], rows) if isinstance(rows, int) else rows
        aside = self.inbox / f".{name}.tmp"
        aside.write_text("".join(json.dumps(row) + "\n" for row in content))
        return aside.rename(self.inbox / name)

    # -- running

    def start(self, *arguments: str, faults: list[dict[str, Any]] | None = None, **environment: str) -> Any:
        return self._start("daemon", "run", *arguments, environment=self.environment(faults, **environment))

    def train(self, *files: Path, faults: list[dict[str, Any]] | None = None, **environment: str) -> int:
        """Train these files by hand; the exit code."""
        by_hand = self._start("train", *map(str, files), environment=self.environment(faults, **environment))
        return int(by_hand.wait(LIMIT_S))

    def _start(self, program: str, *arguments: str, environment: dict[str, str]) -> Any:
        self.daemons.append(self._started(program, arguments, environment))
        return self.daemons[-1]

    def _started(self, program: str, arguments: tuple[str, ...], environment: dict[str, str]) -> Any:
        if self.hand is not None:
            return self.hand.start(
                *arguments, home=self.home, log=self.stderr, environment=environment, program=program
            )
        started = (sys.executable, REPOSITORY / f"{program}.py", "--home", self.home)
        command = [*map(str, (*self.under, *started, *arguments))]
        with self.stderr.open("a") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, text=True, cwd=self.home)

    def environment(self, faults: list[dict[str, Any]] | None = None, **extra: str) -> dict[str, str]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("LONGRUN_")}
        return inherited | {
            "PYTHONPATH": python_path(PROBE),
            "LONGRUN_PROBE": str(self.probe),
            "LONGRUN_FAULTS": json.dumps(faults or []),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            **extra,
        }

    def drain(self, *arguments: str, faults: list[dict[str, Any]] | None = None, **environment: str) -> int:
        """Run the daemon until inbox and queue are empty; its exit code."""
        return int(self.start("--drain", *arguments, faults=faults, **environment).wait(LIMIT_S))

    def command(
        self, *arguments: str, program: str = "daemon.py", faults: list[dict[str, Any]] | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(REPOSITORY / program), *arguments, "--home", str(self.home)]
        environment = self.environment(faults)
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=LIMIT_S, cwd=self.home, check=False
        )

    def kill(self, daemon: Any) -> None:
        daemon.send_signal(signal.SIGKILL)
        daemon.wait()

    def close(self) -> None:
        for daemon in self.daemons:
            with contextlib.suppress(ProcessLookupError):
                daemon.kill()
            daemon.wait()

    # -- looking

    def wait_until(self, what: Any, limit_s: float = LIMIT_S) -> Any:
        deadline = time.monotonic() + limit_s
        while not (found := what()):
            assert time.monotonic() < deadline, f"waited {limit_s} s in vain; the log:\n{self.log}"
            time.sleep(0.05)
        return found

    def wait_until_idle(self) -> None:
        """Until the daemon that was started last says so."""
        pid = self.daemons[-1].pid
        self.wait_until(lambda: (note := self.note)["pid"] == pid and note["state"] == "idle")

    @property
    def log(self) -> str:
        path = self.home / "logs" / "daemon.log"
        return path.read_text() if path.exists() else ""

    @property
    def status(self) -> dict[str, Any]:
        return json.loads(self.command("status", "--json").stdout)

    @property
    def note(self) -> dict[str, Any]:
        """The daemon's own note: `status` without the time that a process takes, to wait for what it will say."""
        path = self.home / "state" / "status.json"
        empty = {"state": "", "pid": None, "current": None, "problems": [], "missing": None}
        return json.loads(path.read_text()) if path.exists() else empty

    @property
    def events(self) -> list[dict[str, Any]]:
        path = self.home / "state" / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def global_step(self) -> int:
        path = self.model / "trainer_state.json"
        return json.loads(path.read_text())["global_step"] if path.exists() else 0

    @property
    def lineage(self) -> dict[str, Any]:
        return json.loads((self.model / "lineage.json").read_text())

    def names(self, folder: str) -> set[str]:
        path = self.home / folder
        return {entry.name for entry in path.iterdir()} if path.exists() else set()

    def steps_received(self) -> dict[int, list[str]]:
        """The rows of each global step as the model received them; of a step done again, the last time counts.

        Only steps that are part of the model's life are given: what was rolled back was never trained.
        """
        received: dict[tuple[int, int], list[str]] = {}
        order: list[tuple[int, int]] = []
        path = self.probe / "batches.jsonl"
        for line in path.read_text().splitlines() if path.exists() else []:
            batch = json.loads(line)
            key = (batch["pid"], batch["global_step"])
            if not order or order[-1] != key:
                received[key] = []
                order.append(key)
            received[key] += batch["texts"]
        return {step: received[pid, step] for pid, step in order if step < self.global_step}

    def times_trained(self, name: str, rows: int) -> collections.Counter[int]:
        """How often each row 1..rows of a numbered file was trained, as {times: rows}."""
        received = [text for texts in self.steps_received().values() for text in texts]
        times = collections.Counter(
            row for text in received for row in range(1, rows + 1) if f"Say {name}-{row:04d}." in text
        )
        return collections.Counter(times[row] for row in range(1, rows + 1))

    def weights(self) -> dict[str, str]:
        """Digests of the newest checkpoint's weights and optimizer state, by tensor."""
        import torch
        from safetensors.torch import load_file

        newest = max(self.model.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
        tensors: dict[str, Any] = dict(load_file(newest / "model.safetensors"))
        state = torch.load(newest / "optimizer.pt", weights_only=True)["state"]
        tensors |= {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}
        return {name: digest_of(tensor) for name, tensor in tensors.items()}
