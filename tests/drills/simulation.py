"""A home with its daemon, children, users and disk in one process, by a clock of its own.

The code is the real one, from `compose.run` and the scripted children down to the sockets between them. Everybody runs
in a thread, of which one at a time goes on; dice say which. A step is what one of them does until it waits, or comes to
a call that changes the disk, and time passes when all wait. Who is killed does nothing more, and what it had open is
closed as the kernel would. When the power fails, the disk keeps what `power` says that it may.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
import types
import uuid
from typing import TYPE_CHECKING, Any, Self

from longrun import compose, disk, inbox, loop, wire, worker
from longrun.home import Home
from longrun.journal import Journal
from longrun.ledger import Ledger
from tests.drills import power, scripted
from tests.drills.recorder import WRITES, Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

EPOCH_S = 1_750_000_000.0
SLICE_S = 0.0005  # what a step takes
ROLES = ("daemon", "worker", "preparer")
LEDGERS_KEPT = 5

readable = select.select
close = os.close


class Killed(BaseException):
    """Raised in whoever was killed, wherever it is. It does nothing to the disk on its way out."""


class Task:
    """Somebody who goes on when it is his turn: a process, or a person at the keyboard."""

    def __init__(self, world: World, name: str, body: Callable[[], Any]) -> None:
        self.name = name
        self.number = world.born = world.born + 1
        self.parent = world.current
        self.dead = self.over = self.hung = False
        self.error: BaseException | None = None
        self.result: Any = None
        self.daemon: Any = None  # which it is, once it is one
        self.descriptors: set[int] = set()
        self.sockets: list[socket.socket] = []
        self.due = 0.0  # it waits until then,
        self._ends: list[Any] = []  # or until one of these can be read
        self._world, self._body = world, body
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self._live, daemon=True).start()

    def _live(self) -> None:
        self._turn.acquire()
        try:
            if not self.dead:
                self.result = self._body()
        except Killed:
            pass  # as every life of a process that is killed here ends
        except BaseException as error:  # noqa: BLE001 - told to whoever asks
            self.error = error
        for end in self.sockets:
            end.close()
        for number in self.descriptors:
            close(number)
        self.over = True
        self._back.release()

    def go_on(self) -> None:
        """Let it have its turn; back when it waits."""
        former, self._world.current = self._world.current, self
        self._turn.release()
        self._back.acquire()
        self._world.current = former

    def wait(self, until: float = 0.0, ends: list[Any] | None = None) -> None:
        """Let the others go on."""
        if self.dead:
            raise Killed
        self.due, self._ends = until, ends or []
        self._back.release()
        self._turn.acquire()
        if self.dead:
            raise Killed

    def kill(self) -> None:
        self.dead = True
        if not self.over:
            self.go_on()
        assert self.over, f"{self.name} outlives its death"

    def is_ready(self, now: float) -> bool:
        if self.over or self.hung:
            return False
        return self.due <= now or bool(self._ends and readable(self._ends, [], [], 0)[0])


class Disk(Recorder):
    """Keeps in mind what is done to the disk, and lets calls fail while there is trouble."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.ledger, self.clones = None, False
        self.trouble: tuple[int, float] | None = None  # the errno, and how likely a call meets it
        self._open, self._write = os.open, os.write
        self._device = world.home.root.stat().st_dev
        self.begin()

    def begin(self) -> None:
        """All that is there now is durable."""
        self.entries: list[power.Entry] = []
        self._nodes: dict[int, dict[str, Any]] = {}
        self.root = power.look(self.world.home.root, self._nodes)

    def nodes(self) -> dict[int, power.Node]:
        return power.nodes_of(self._nodes, self.entries)

    def say(self, *line: Any) -> None:
        if line[0] != "said":  # the world hears it from the daemon itself
            self.entries.append(list(line))

    def around(self, what: str, arguments: tuple[Any, ...], options: dict[str, Any], call: Callable[[], Any]) -> Any:
        task, dice = self.world.current, self.world.dice
        if task is None:  # the world itself
            return call()
        if what == "open" and arguments[1:] and not arguments[1] & WRITES:
            return self._opened(task, call())
        if dice.random() < self.world.finely:
            task.wait()
        if task.dead:
            raise Killed
        if self.trouble and task.name in ROLES and dice.random() < self.trouble[1]:
            raise OSError(self.trouble[0], os.strerror(self.trouble[0]))
        found = getattr(self, f"on_{what.removeprefix('file.')}")(call, *arguments, **options)
        return self._opened(task, found) if what == "open" else found

    def _opened(self, task: Task, found: Any) -> Any:
        """What os.open gives is a number; what io.open gives closes itself."""
        if isinstance(found, int):
            task.descriptors.add(found)
        return found


class World:
    """Whoever is in it, what time it is, and what people were told."""

    def __init__(self, root: Path, dice: random.Random) -> None:
        self.home = Home(root)
        self.dice = dice
        self.now = 0.0
        self.finely = 0.0  # how likely the others have a turn before a call that changes the disk
        self.steps = self.born = 0
        self.tasks: list[Task] = []
        self.current: Task | None = None
        self.said: list[dict[str, Any]] = []
        self.ledgers: list[bytes] = []
        self.hear: Callable[[dict[str, Any]], None] = lambda facts: None
        self.disk = Disk(self)

    def start(self, name: str, body: Callable[[], Any]) -> Task:
        task = Task(self, name, body)
        self.tasks.append(task)
        return task

    def living(self, *names: str) -> list[Task]:
        return [task for task in self.tasks if not task.over and (not names or task.name in names)]

    def daemons(self) -> list[Any]:
        return [task.daemon for task in self.living("daemon") if task.daemon is not None]

    def step(self) -> list[Task]:
        """Somebody goes on; when all wait, not before the first of them need not wait any longer. Whose end it was."""
        self.steps += 1
        self.now += SLICE_S
        ready = [task for task in self.tasks if task.is_ready(self.now)]
        waiting = [task.due for task in self.tasks if not task.over and not task.hung]
        if not ready and waiting:
            self.now = max(self.now, min(waiting))
            ready = [task for task in self.tasks if task.is_ready(self.now)]
        if ready:
            self.dice.choice(ready).go_on()
        ended = [task for task in self.tasks if task.over]
        self.tasks = self.living()
        return ended

    def kill_daemon(self, *, children: bool = True) -> None:
        """With it, unless the kernel does not see to that, go those whom it has started."""
        for task in self.living("daemon", *(ROLES[1:] if children else ())):
            task.kill()

    def lose_power(self) -> None:
        """Everybody is gone, and what was not synced may be."""
        for task in self.living():
            task.kill()
        self.tasks.clear()
        kept = power.lose_power(self.disk, len(self.disk.entries), self.dice)
        nodes = power.played(self.disk, kept)
        shutil.rmtree(self.home.root)
        power.materialise(nodes, self.disk.root, self.home.root)
        self.disk.begin()

    # -- what processes ask of the system

    def sleep(self, seconds: float) -> None:
        if self.current is None:
            self.now += seconds
        else:
            self.current.wait(self.now + seconds)

    def select(self, ends: list[Any], _: Any, __: Any, timeout_s: float | None) -> Any:
        deadline = float("inf") if timeout_s is None else self.now + timeout_s
        while not (found := readable(ends, [], [], 0))[0] and self.now < deadline:
            assert self.current is not None
            self.current.wait(deadline, ends)
        return found

    def kill_group(self, number: int, _: int) -> None:
        assert self.current is not None
        if self.current.dead:
            raise Killed
        for task in self.tasks:
            if task.number == number:
                task.kill()

    def close(self, number: int) -> None:
        close(number)
        if self.current is not None:
            self.current.descriptors.discard(number)

    def pipe(self, flags: int) -> tuple[int, int]:
        ends = pipe2(flags)
        if self.current is not None:
            self.current.descriptors.update(ends)
        return ends

    def install(self) -> None:
        """Make this process the world; there is no way back."""
        self.disk.install()
        logging.raiseExceptions = False
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        time.monotonic, time.time, time.sleep = lambda: self.now, lambda: EPOCH_S + self.now, self.sleep
        os.urandom = self.dice.randbytes
        os.close, os.pipe2, os.killpg = self.close, self.pipe, self.kill_group
        uuid.uuid4 = lambda: uuid.UUID(bytes=self.dice.randbytes(16))
        wire.select = loop.select = types.SimpleNamespace(select=self.select)  # type: ignore[assignment]
        wire.socket = types.SimpleNamespace(socket=_sockets(self), AF_UNIX=socket.AF_UNIX)  # type: ignore[assignment]
        worker.subprocess = types.SimpleNamespace(  # type: ignore[assignment]
            Popen=_processes(self), DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
        )
        compose.Daemon, compose.Journal = _daemons(self), _journals(self)  # type: ignore[misc]
        disk.sync_trees = lambda folders: [disk.sync_tree(folder) for folder in folders]  # no threads beside ours
        inbox.Bell = Deaf  # type: ignore[misc,assignment]
        Ledger._transaction = _transactions(self, Ledger._transaction)  # type: ignore[method-assign]


pipe2 = os.pipe2


class Deaf:
    """A watcher that hears nothing: files are found by looking."""

    def __init__(self, *_: Any) -> None: ...

    def check(self) -> None: ...

    def stop(self) -> None: ...


def _daemons(world: World) -> type[loop.Daemon]:
    class Simulated(loop.Daemon):
        """The real one; signals come from the world."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            assert world.current is not None
            world.current.daemon = self

        def _signals_handled(self) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

        def count_signal(self) -> None:
            self._signals += 1
            self._ring()

    return Simulated


def _journals(world: World) -> type[Journal]:
    class Heard(Journal):
        def say(self, event: str, text: str, *, level: str = "info", **facts: Any) -> None:
            super().say(event, text, level=level, **facts)
            world.said.append({"event": event, "message": text, **facts})
            world.hear(world.said[-1])

    return Heard


def _sockets(world: World) -> type[socket.socket]:
    class Owned(socket.socket):
        """Closed with whoever made it."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            assert world.current is not None
            world.current.sockets.append(self)

        def accept(self) -> tuple[socket.socket, Any]:
            connection, address = super().accept()
            assert world.current is not None
            world.current.sockets.append(connection)
            return connection, address

    return Owned


def _processes(world: World) -> type[Any]:
    class Process:
        """In the place of subprocess.Popen: the scripted child as a task."""

        def __init__(self, command: list[str], **_: Any) -> None:
            role = next(role for role in ROLES if f"--{role}" in command)
            place = world.home.state / f"{role}.sock"
            body = {"worker": lambda: scripted.work(world.home, place), "preparer": lambda: scripted.prepare(place)}
            self._task = world.start(role, lambda: _until_closed(body[role]))
            self.pid = self._task.number

        def poll(self) -> int | None:
            return (-signal.SIGKILL if self._task.dead else 0) if self._task.over else None

        def wait(self, timeout: float | None = None) -> int:
            end = world.now + (60.0 if timeout is None else timeout)
            while (code := self.poll()) is None:
                if world.now >= end:
                    raise subprocess.TimeoutExpired("a child", timeout or 0.0)
                world.sleep(0.001)
            return code

    return Process


def _until_closed(body: Callable[[], None]) -> None:
    with contextlib.suppress(wire.Closed, ConnectionRefusedError):  # its daemon is gone
        body()


def _transactions(world: World, transaction: Any) -> Any:
    @contextlib.contextmanager
    def kept(self: Self) -> Iterator[None]:
        """A copy of the ledger after each transaction."""
        with transaction(self):
            yield
        world.ledgers = [*world.ledgers, self._db.serialize()][-LEDGERS_KEPT:]  # type: ignore[attr-defined]

    return kept
