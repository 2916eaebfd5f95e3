from __future__ import annotations

import itertools
import os
import socket
import stat
import threading
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrun import wire

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VALUES: dict[str, Any] = {
    "int": 7,
    "str": "x\n\udcff\N{EURO SIGN}",
    "float": 0.1,
    "bool": True,
    "dict[str, Any]": {"a": [1, None, "b\n"]},
    "list[int]": [1, 2],
    "str | None": None,
    "float | None": 2.5,
    "int | None": 3,
}


def example(kind: type[Any], *, optional: bool) -> Any:
    chosen = [f for f in fields(kind) if optional or (f.default is MISSING and f.default_factory is MISSING)]
    return kind(**{f.name: VALUES[f.type] for f in chosen})


@pytest.fixture
def pair() -> Iterator[tuple[wire.Channel, socket.socket]]:
    """A channel and the raw other end."""
    ours, theirs = socket.socketpair()
    channel = wire.Channel(ours)
    yield channel, theirs
    channel.close()
    theirs.close()


@pytest.mark.parametrize("kind", list(wire._TYPES.values()), ids=list(wire._TYPES))
@pytest.mark.parametrize("optional", [True, False])
def test_every_message_arrives_as_it_was_sent(kind: type[Any], optional: bool) -> None:
    message = example(kind, optional=optional)
    line = wire.encode(message)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert wire.decode(line) == message


def test_every_message_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(wire.Message.__args__) == set(wire._TYPES.values())


def test_nothing_said_is_no_message(pair: tuple[wire.Channel, socket.socket]) -> None:
    channel, _ = pair
    assert channel.receive(0) == []
    assert channel.receive(0.001) == []


def test_messages_that_came_together_are_told_together(pair: tuple[wire.Channel, socket.socket]) -> None:
    channel, theirs = pair
    said = [wire.Alive(doing=str(number)) for number in range(3)]
    theirs.sendall(b"".join(map(wire.encode, said)))
    assert channel.receive(None) == said


def test_a_message_that_comes_byte_by_byte_is_told_whole(pair: tuple[wire.Channel, socket.socket]) -> None:
    channel, theirs = pair
    line = wire.encode(wire.Alive(doing="reading"))
    for byte in line[:-1]:
        theirs.sendall(bytes([byte]))
        assert channel.receive(0) == []
    theirs.sendall(line[-1:])
    assert channel.receive(0) == [wire.Alive(doing="reading")]


@given(cuts=st.lists(st.integers(0, 60), max_size=8))
def test_any_cuts_give_the_same_messages(cuts: list[int]) -> None:
    ours, theirs = socket.socketpair()
    channel = wire.Channel(ours)
    said = [wire.Alive(doing="one"), wire.Stop(why="pause")]
    stream = b"".join(map(wire.encode, said))
    heard: list[wire.Message] = []
    edges = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    for start, end in itertools.pairwise(edges):
        theirs.sendall(stream[start:end])
        heard += channel.receive(0)
    channel.close()
    theirs.close()
    assert heard == said


def test_a_message_of_5_mb_arrives_whole(pair: tuple[wire.Channel, socket.socket]) -> None:
    channel, theirs = pair
    message = wire.Examined(job=1, facts={"notes": ["x" * 5_000_000]})
    sender = threading.Thread(target=wire.Channel(theirs).send, args=[message])
    sender.start()
    assert channel.receive(None) == [message]
    sender.join()


def test_the_last_message_is_heard_before_the_end(pair: tuple[wire.Channel, socket.socket]) -> None:
    channel, theirs = pair
    theirs.sendall(wire.encode(wire.Alive(doing="leaving")) + b'{"is": "Ali')
    theirs.close()
    assert channel.receive(None) == [wire.Alive(doing="leaving")]
    for _ in range(2):
        with pytest.raises(wire.Closed):
            channel.receive(None)


def test_a_reset_is_an_end(pair: tuple[wire.Channel, socket.socket]) -> None:
    channel, theirs = pair
    channel.send(wire.Alive(doing="never read"))
    theirs.close()
    with pytest.raises(wire.Closed):
        channel.receive(None)
    with pytest.raises(wire.Closed):
        channel.send(wire.Alive(doing="to nobody"))


@pytest.mark.parametrize("folder", ["short", "long" * 40])
def test_a_socket_works_at_any_length_of_path(tmp_path: Path, folder: str) -> None:
    path = tmp_path / folder / "worker.sock"
    path.parent.mkdir()
    for _ in range(2):  # also over the remains of a former daemon
        listener = wire.listen(path)
        below = wire.connect(path)
        above = wire.Channel(listener.accept()[0])
        below.send(wire.Hello(pid=1, role="worker"))
        assert above.receive(None) == [wire.Hello(pid=1, role="worker")]
        assert os.get_inheritable(above.fileno()) is False
        for end in (below, above, listener):
            end.close()


def test_a_socket_is_for_its_owner_only(tmp_path: Path) -> None:
    with wire.listen(tmp_path / "worker.sock"):
        assert stat.S_IMODE((tmp_path / "worker.sock").stat().st_mode) == 0o600


def test_nobody_listening_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        wire.connect(tmp_path / "absent.sock")
