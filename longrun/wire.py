"""What the daemon and its two children say to each other: frozen messages, one JSON object a line, over a Unix socket.

The end of the stream means that the other is gone; there is no other farewell.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_MESSAGE_BYTES = 64 << 20
ADDRESS_BYTES = 100


@dataclass(frozen=True, kw_only=True)
class Examine:
    """Down, to the preparer: is this file what it must be?"""

    job: int
    path: str
    on_bad_row: str
    max_line_bytes: int


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Down, to the preparer: template, mask, tokenise into `folder`."""

    job: int
    path: str
    sha256: str
    format: str
    on_bad_row: str
    max_line_bytes: int
    max_length: int
    folder: str
    rows: int  # that were accepted when it was examined
    base_model: str  # recorded with the rows, as are these files of it
    base_files: str = ""
    tokenizer: str  # where to load it from: the model, or the base model before there is one
    trust_remote_code: bool


@dataclass(frozen=True, kw_only=True)
class Train:
    """Down, to the worker: train what is left of this plan."""

    plan: dict[str, Any]
    prepared: str
    checkpoint: str | None  # None: from the base model
    lineage: str  # of a model that begins with this run; unused otherwise
    base_model: str
    save_steps: int
    save_total_limit: int
    logging_steps: int
    row_log: bool


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Down, to the worker: at the next step boundary save a checkpoint and end the run."""

    why: str  # pause, stop, skip


@dataclass(frozen=True, kw_only=True)
class Hello:
    """Up: ready for work."""

    pid: int
    role: str
    device: str = ""


@dataclass(frozen=True, kw_only=True)
class Alive:
    """Up: not a step, but real work was done (loading, evaluating, reading)."""

    doing: str


@dataclass(frozen=True, kw_only=True)
class Examined:
    job: int
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    job: int
    facts: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Up, from the preparer: the content of the file is at fault."""

    job: int
    reason: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Started:
    """Up: the model is loaded and stands at this step."""

    job: int
    global_step: int
    device: str
    seconds: float
    warm: bool
    rows_at_once: int  # on a device
    adds_up: bool = True  # the losses of its micro-batches to that of a step, as they do where there is but one


@dataclass(frozen=True, kw_only=True)
class Progress:
    job: int
    global_step: int
    loss: float | None
    learning_rate: float
    steps_per_s: float


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Up: checkpoint-N is committed."""

    job: int
    global_step: int
    seconds: float
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Up: training stands still at a step boundary until there is room for the next checkpoint."""

    job: int
    need_bytes: int


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Up: the run is over and what it trained is in a committed checkpoint."""

    job: int
    global_step: int
    stopped: str  # "" when the target was reached, else why (pause, stop, skip)
    rows_trained: list[int] = field(default_factory=list)  # of a skipped file: row numbers from 1


@dataclass(frozen=True, kw_only=True)
class Failed:
    """Up, as the worker's last word: the run ended without its goal."""

    job: int
    kind: str  # out of memory, diverged, token, model removed, base model, prepared rows, disk, crash
    why: str
    hint: str = ""
    global_step: int | None = None
    rows: list[int] = field(default_factory=list)  # of the step at fault: row numbers from 1


Message = (
    Examine | Prepare | Train | Stop | Hello | Alive | Examined | Prepared | Refused | Started | Progress
    | Saved | Waiting | Ended | Failed
)  # fmt: skip

_TYPES: dict[str, type[Any]] = {kind.__name__: kind for kind in get_args(Message)}


def encode(message: Message) -> bytes:
    return json.dumps({"is": type(message).__name__, **asdict(message)}).encode() + b"\n"


def decode(line: bytes | bytearray) -> Message:
    values = json.loads(line)
    message: Message = _TYPES[values.pop("is")](**values)
    return message


class Closed(Exception):
    """The other side is gone."""


class Channel:
    """One end of the conversation."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray()
        self._ended = False

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        try:
            self._socket.sendall(encode(message))
        except OSError as error:
            raise Closed from error

    def receive(self, timeout_s: float | None) -> list[Message]:
        """Every whole message that has arrived, waiting at most `timeout_s` (None: for ever) for the first.

        Closed once the other side is gone and its last message was handed out.
        """
        messages = self._whole_messages()
        while not messages and not self._ended and self._readable(timeout_s):
            self._read()
            messages = self._whole_messages()
            timeout_s = 0 if timeout_s is not None else None
        if not messages and self._ended:
            raise Closed
        return messages

    def close(self) -> None:
        self._socket.close()

    def _readable(self, timeout_s: float | None) -> bool:
        return bool(select.select([self._socket], [], [], timeout_s)[0])

    def _read(self) -> None:
        try:
            data = self._socket.recv(1 << 16)
        except OSError:
            data = b""
        self._ended = not data
        self._buffer += data
        assert len(self._buffer) < MAX_MESSAGE_BYTES, "a message without an end"

    def _whole_messages(self) -> list[Message]:
        if b"\n" not in self._buffer:  # a long message arrives in many pieces: it is copied once
            return []
        *lines, self._buffer = self._buffer.split(b"\n")
        return [decode(line) for line in lines]


def listen(path: Path) -> socket.socket:
    """A socket that accepts one worker at `path`, for the owner only: its folder is, and soon its mode says so, too."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    with _short(path) as address:
        listener.bind(address)
    path.chmod(0o600)
    listener.listen(1)
    return listener


def connect(path: Path) -> Channel:
    connection = socket.socket(socket.AF_UNIX)
    try:
        with _short(path) as address:
            connection.connect(address)
    except OSError:
        connection.close()
        raise
    return Channel(connection)


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """A socket's address holds about 100 bytes, a home's path may be longer: go by way of the open folder."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        long = len(os.fsencode(path)) > ADDRESS_BYTES and os.path.isdir("/proc/self/fd")  # noqa: PTH112
        yield f"/proc/self/fd/{folder}/{path.name}" if long else str(path)
    finally:
        os.close(folder)
