from __future__ import annotations

import re
import select
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import zstandard

from longrun import process, wire, worker
from longrun.errors import LongrunError
from longrun.worker import Child

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from longrun.home import Home

REPOSITORY = Path(__file__).resolve().parents[2]
HEAD = f"""\
import os, signal, subprocess, sys, time
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from longrun import wire
def hello():
    channel = wire.connect(Path(sys.argv[2]))
    channel.send(wire.Hello(pid=os.getpid(), role=sys.argv[1].strip("-")))
    return channel
"""
LIMIT_S = 20


@pytest.fixture
def child(home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Child]]:
    """Starts a child whose program is this script."""
    children: list[Child] = []

    def start(script: str, options: tuple[str, ...] = ()) -> Child:
        (home.root / "program.py").write_text(HEAD + script)
        monkeypatch.setattr(worker, "PROGRAM", home.root / "program.py")
        children.append(Child(home, "worker"))
        children[-1].start(options, 100.0)
        return children[-1]

    yield start
    for started in children:
        started.kill()


def wait_for(child: Child, now: float = 101.0) -> list[wire.Message]:
    """The next messages; wire.Closed when it is gone."""
    deadline = time.monotonic() + LIMIT_S
    while not (messages := child.receive(now)):
        assert time.monotonic() < deadline
        select.select(child.filenos(), [], [], 0.005)
    return messages


def test_a_child_is_ready_when_it_has_said_hello(child: Callable[..., Child]) -> None:
    started = child("channel = hello(); time.sleep(60)")
    assert (started.running, started.ready, started.used) == (True, False, False)
    assert wait_for(started) == [wire.Hello(pid=started.pid or 0, role="worker")]
    assert (started.ready, started.used) == (True, False)


def test_work_goes_down_and_news_come_up(child: Callable[..., Child]) -> None:
    started = child("channel = hello(); channel.send(wire.Alive(doing=channel.receive(None)[0].why)); time.sleep(60)")
    wait_for(started)
    started.send(wire.Stop(why="pause"), 102.0)
    assert (started.used, started.silent_s(105.0)) == (True, 3.0)
    assert wait_for(started, 104.0) == [wire.Alive(doing="pause")]
    assert started.silent_s(105.0) == 1.0


def test_silence_is_measured_from_the_start(child: Callable[..., Child]) -> None:
    started = child("time.sleep(60)")
    assert started.receive(103.0) == []
    assert started.silent_s(107.0) == 7.0


@pytest.mark.parametrize(
    ("does", "hangs"),
    [("time.sleep(60)", True), ("open('/dev/null', 'wb').write(bytes(2 << 20)); time.sleep(60)", False)],
)
def test_silence_is_no_hang_while_bytes_are_moved(child: Callable[..., Child], does: str, hangs: bool) -> None:
    started = child(f"channel = hello(); channel.receive(None); {does}")
    wait_for(started, 102.0)
    started.send(wire.Stop(why="pause"), 103.0)
    moved = process.moved_bytes(started.pid or 0)
    deadline = time.monotonic() + LIMIT_S
    while not hangs and process.moved_bytes(started.pid or 0) < moved + (2 << 20):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert not started.hangs(113.0, 10.0)
    assert started.hangs(114.0, 10.0) is hangs
    assert started.hangs(125.0, 10.0), "nothing was moved since"


def test_a_child_without_a_log_has_no_last_words(home: Home) -> None:
    assert Child(home, "worker").last_words() == ""


def test_the_last_words_of_a_child_are_the_last_line_of_its_log(child: Callable[..., Child]) -> None:
    started = child("print('once'); sys.exit('it broke:\\nand why  ')")
    assert started.last_words() in ("", "once", "and why")
    with pytest.raises(wire.Closed):
        wait_for(started)
    started.kill()
    assert started.last_words() == "and why"


def test_a_child_knows_its_home_and_options(home: Home, child: Callable[..., Child]) -> None:
    started = child(
        "channel = hello(); channel.send(wire.Alive(doing=' '.join(sys.argv[3:]))); time.sleep(60)", ("--options", "{}")
    )
    messages = wait_for(started)
    while len(messages) < 2:
        messages += wait_for(started)
    assert messages[1] == wire.Alive(doing=f"--home {home.root} --options {{}}")
    assert started.options == ("--options", "{}")


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("sys.exit(3)", "exit code 3"),
        ("pass", "exit code 0"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL; perhaps the system ran out of memory"),
    ],
)
@pytest.mark.parametrize("connects", [True, False])
def test_how_a_child_ended_is_told_in_words(child: Callable[..., Child], end: str, words: str, connects: bool) -> None:
    started = child(f"{'channel = hello()' if connects else ''}\n{end}")
    with pytest.raises(wire.Closed):
        for _ in range(2):
            wait_for(started)
    assert started.kill() == words
    assert (started.running, started.ready, started.pid, started.filenos()) == (False, False, None, [])


def test_what_a_child_said_before_its_end_is_heard(child: Callable[..., Child]) -> None:
    started = child("channel = hello(); channel.send(wire.Alive(doing='last word'))")
    heard: list[wire.Message] = []
    with pytest.raises(wire.Closed):
        while True:
            heard += wait_for(started)
    assert heard[1:] == [wire.Alive(doing="last word")]


@pytest.mark.parametrize("ready", [True, False])
def test_a_child_is_killed_with_everything_it_started(home: Home, child: Callable[..., Child], ready: bool) -> None:
    script = "other = subprocess.Popen(['sleep', '60']); Path(sys.argv[4], 'pid').write_text(f'{other.pid} ')"
    started = child(f"{script}\n{'channel = hello()' if ready else ''}\ntime.sleep(60)")
    if ready:
        wait_for(started)
    while not (home.root / "pid").exists() or not (home.root / "pid").read_text().endswith(" "):
        time.sleep(0.005)
    assert started.kill() == "killed by the daemon"
    assert not started.running
    other = Path("/proc") / (home.root / "pid").read_text().strip() / "stat"
    deadline = time.monotonic() + LIMIT_S
    while other.exists() and other.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_child_that_outlives_its_kill_is_told_and_not_waited_for(
    child: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = child("channel = hello(); channel.receive(None); time.sleep(60)")
    wait_for(started)
    held_by_the_kernel = started._process
    assert held_by_the_kernel is not None
    with monkeypatch.context() as held:
        held.setattr(worker, "GONE_S", 0.1)
        held.setattr(worker.os, "killpg", lambda *_: None)
        told = rf"cannot end the worker \(pid {started.pid}\): it is still there 0.1 s after it was killed"
        with pytest.raises(LongrunError, match=told):
            started.kill()
    assert started.kill() == "not running"
    held_by_the_kernel.kill()
    held_by_the_kernel.wait()


def test_a_child_may_be_started_again(child: Callable[..., Child]) -> None:
    started = child("channel = hello(); channel.receive(None); time.sleep(60)")
    wait_for(started)
    started.send(wire.Stop(why="x"), 1.0)
    started.kill()
    assert started.kill() == "not running"
    started.start((), 1.0)
    wait_for(started)
    assert (started.ready, started.used) == (True, False)


def test_sending_to_one_that_is_gone_is_found_out_by_receiving(child: Callable[..., Child]) -> None:
    started = child("channel = hello()")
    wait_for(started)
    with pytest.raises(wire.Closed):
        wait_for(started)
    started.send(wire.Stop(why="x"), 1.0)
    with pytest.raises(wire.Closed):
        started.receive(1.0)


def test_what_libraries_print_is_kept_apart_and_bounded(home: Home, child: Callable[..., Child]) -> None:
    log = home.logs / "worker.log"
    log.write_bytes(b"x" * (worker.LOG_LIMIT_BYTES + 1))
    for _ in range(2):
        with pytest.raises(wire.Closed):
            wait_for(child("print('from a library')"))
    assert log.read_text() == "from a library\n" * 2


def test_a_removed_log_folder_is_made_again(home: Home, child: Callable[..., Child]) -> None:
    home.logs.rmdir()
    with pytest.raises(wire.Closed):
        wait_for(child("print('x')"))
    assert (home.logs / "worker.log").read_text() == "x\n"


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the memory of a process")
def test_a_bomb_leaves_no_memory_behind_in_the_preparer(home: Home) -> None:
    bomb = home.root / "bomb.jsonl.zst"
    bomb.write_bytes(zstandard.ZstdCompressor().compress(b" " * 50_000_000))
    preparer = Child(home, "preparer")
    preparer.start((), 100.0)
    wait_for(preparer)
    kept_kib = []
    for job in range(4):
        preparer.send(wire.Examine(job=job, path=str(bomb), on_bad_row="reject", max_line_bytes=1 << 20), 100.0)
        (refused,) = wait_for(preparer)
        assert isinstance(refused, wire.Refused)
        kept_kib.append(int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{preparer.pid}/status").read_text())[1]))
    preparer.kill()
    assert max(kept_kib) - kept_kib[0] < 8 << 10, kept_kib
