"""Bad contents, odd names and things that are no files, all through one daemon, with good files in between."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import socket
from contextlib import closing
from pathlib import Path

import pytest
import zstandard

from tests.drills.daemons import Watched
from tests.lab import chat

ROW = json.dumps(chat("a", "b")).encode()
TEXT = b'{"text": "a"}\n'
MAX_LINE_BYTES = 100_000
NOISE = b"".join(b'{"text": "%s"}\n' % hashlib.sha512(b"%d" % n).hexdigest().encode() for n in range(200))


def zstd(content):
    return zstandard.ZstdCompressor().compress(content)


def valued(value):
    return TEXT + b'{"text": "a", "more": ' + value + b"}\n"


# What a file holds, and how many rows are trained of it, or why it is refused and in which line and byte.
CONTENTS = {
    "with a mark": (b"\xef\xbb\xbf" + TEXT * 2, 2),
    "CRLF": (TEXT.replace(b"\n", b"\r\n") * 3, 3),
    "no newline at the end": (TEXT * 2 + TEXT.strip(), 3),
    "blank lines": (b"\n \n" + TEXT + b"\n\t\n" + TEXT + b"\n", 2),
    "U+2028 in a string": ('{"text": "a\u2028b\u2029c\u0085d"}\n'.encode() * 2, 2),
    "gzip under a plain name": (gzip.compress(TEXT * 4), 4),
    "zstd under a plain name": (zstd(TEXT * 5), 5),
    "plain under the name of gzip.gz": (TEXT * 2, 2),
    "zstd under the name of gzip.gz": (zstd(TEXT * 2), 2),
    "two members.gz": (gzip.compress(TEXT) + gzip.compress(TEXT), 2),
    "escaped pairs": (b'{"text": "\\ud83d\\ude00"}\n', 1),
    "64 levels": (valued(b"[" * 63 + b"]" * 63), 2),
    "a line just short enough": (b'{"text": "' + b"x" * (MAX_LINE_BYTES - 13) + b'"}\n', 1),
    "messages": (ROW + b"\n", 1),
    "UTF-16": ('{"text": "a"}\n'.encode("utf-16"), ("encoding", 1, 0)),
    "UTF-16BE unmarked": ('{"text": "a"}\n'.encode("utf-16-be"), ("encoding", 1, 0)),
    "UTF-32": ('{"text": "a"}\n'.encode("utf-32"), ("encoding", 1, 0)),
    "Latin-1": (TEXT + '{"text": "é"}\n'.encode("latin-1"), ("encoding", 2, 24)),
    "overlong UTF-8": (TEXT + b'{"text": "\xc0\xaf"}\n', ("encoding", 2, 24)),
    "NUL in a string": (b'{"text": "a\0"}\n', ("nul", 1, 11)),
    "NULs after the rows": (TEXT * 2 + b"\0" * 4096, ("nul", 3, 28)),
    "a duplicate key": (valued(b'{"b": 1, "b": 2}'), ("value", 2, 14)),
    "NaN": (valued(b"NaN"), ("value", 2, 14)),
    "Infinity": (valued(b"-Infinity"), ("value", 2, 14)),
    "1e999": (valued(b"1e999"), ("value", 2, 14)),
    "an integer of 5,000 digits": (valued(b"9" * 5000), ("value", 2, 14)),
    "nesting of 65": (valued(b"[" * 64 + b"]" * 64), ("value", 2, 14)),
    "nesting of 40,000": (valued(b"[" * 40_000 + b"]" * 40_000), ("value", 2, 14)),
    "nesting without end": (valued(b'{"a":' * 10_000), ("value", 2, 14)),
    "a lone surrogate": (valued(b'"\\ud800"'), ("value", 2, 14)),
    "a surrogate pair the wrong way": (valued(b'"\\udc00\\ud800"'), ("value", 2, 14)),
    "CR only": (TEXT.replace(b"\n", b"\r") * 3, ("line_ends", 1, 0)),
    "an array": (b'[{"text": "a"}]\n', ("array", 1, 0)),
    "pretty JSON": (json.dumps({"text": "a"}, indent=2).encode(), ("pretty", 1, 0)),
    "a pretty array": (json.dumps([{"text": "a"}], indent=2).encode(), ("array", 1, 0)),
    "a huge line": (TEXT + b'{"text": "' + b"x" * MAX_LINE_BYTES + b'"}\n' + TEXT, ("too_long", 2, 14)),
    "empty": (b"", ("empty", None, None)),
    "only blank lines": (b"\n\r\n  \t\n", ("empty", None, None)),
    "only a mark": (b"\xef\xbb\xbf", ("empty", None, None)),
    "empty.gz": (gzip.compress(b""), ("empty", None, None)),
    "mixed shapes": (TEXT + ROW + b"\n", ("format", 2, 14)),
    "no known shape": (b'{"question": "a", "answer": "b"}\n', ("format", 1, 0)),
    "a cut row": (TEXT + TEXT[:9], ("incomplete", 2, 14)),
    "cut.gz": (gzip.compress(NOISE)[:-9], ("incomplete", None, None)),
    "cut.zst": (zstd(NOISE)[:-9], ("incomplete", None, None)),
    "a damaged stream.gz": (gzip.compress(NOISE)[:40] + b"\xff" * 40 + gzip.compress(NOISE)[80:], ("compression",)),
    "garbage after it.gz": (gzip.compress(TEXT) + b"garbage", ("compression",)),
    "a bomb.gz": (gzip.compress(b" " * 50_000_000), ("compression",)),
    "a bomb.zst": (zstd(b" " * 50_000_000), ("compression",)),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), ("encoding",)),
    "HTML": (b"<html>\n<body>not found</body></html>\n", ("json", 1, 0)),
    "CSV": (b"text\na\nb\n", ("json", 1, 0)),
    "no text": (TEXT + b'{"text": 7}\n', ("content", 2, 14)),
    "an empty text": (TEXT + b'{"text": ""}\n', ("content", 2, 14)),
    "a picture": (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}\n', ("multimodal", 1, 0)),
    "control characters in a key": (b'{"\\u001b[2J\\n\\r": 1}\n', ("format", 1, 0)),
    "control characters in bad JSON": (b'{"text": "\x1b[2J"\x1b[31m}\n', ("json", 1)),
}


def file_of(name):
    stem, _, ending = name.rpartition(".")
    return f"{stem}.jsonl.{ending}" if stem else f"{name}.jsonl"


@pytest.fixture(scope="module")
def fed(tmp_path_factory):
    """A home into which every content was dropped."""
    with closing(Watched(tmp_path_factory.mktemp("fed") / "home", **{"inbox.max_line_bytes": MAX_LINE_BYTES})) as lab:
        for name, (content, expected) in CONTENTS.items():
            put(lab, os.fsencode(file_of(name)), content)
            if isinstance(expected, int):
                lab.dropped.append(expected)
            else:
                lab.refused += 1
            lab.drop_rows(f"good beside {name}", 3)
        lab.code = lab.drain()
        yield lab


def put(lab, name, content):
    aside = lab.home / "aside"
    aside.write_bytes(content)
    os.rename(aside, os.path.join(os.fsencode(lab.inbox), name))  # noqa: PTH104, PTH118 - names that are no text


def test_each_content_is_trained_whole_or_refused_with_its_place(campaign, fed):
    records = {record["name"]: record for record in fed.lineage["files"]}

    def attempt(name, dice):
        file = file_of(name)
        expected = CONTENTS[name][1]
        assert records[f"good beside {name}.jsonl"]["rows"] == 3
        if isinstance(expected, int):
            assert records[file]["rows"] == expected
            return
        reason = json.loads((fed.home / "rejected" / f"{file}.reason.json").read_text())
        told = [reason.get(key) for key in ("kind", "line", "byte")]
        assert told[: len(expected)] == list(expected), reason
        assert reason["fix"]
        assert (fed.home / "rejected" / file).read_bytes() == CONTENTS[name][0]

    campaign.run("12: bad content is refused with its place, the rest trains", list(CONTENTS), attempt, small=1000)
    assert fed.code == 1
    fed.check()
    check_told(fed)


LONG = b"n" * (255 - len(".jsonl"))
# fmt: off
NAMES = (
    *(b"new\nline", b"carriage\rreturn", b"-rf", b"--home", b"\xff\xfe\x80", b"caf\xe9", LONG, b"n" * 245, b" "),
    b" a ",
    *(b"\x1b[2J\x1b]0;title\x07", b"\x1b[31mred", b"<script>alert(1)<\\script>", b"a..", b"a..b", b"back\\slash"),
    *(b"$(touch tripwire)", b"`touch tripwire`", b"; touch tripwire", b"| touch tripwire", b"%s%n%d", b"{name}"),
    b"*",
    *(b"CON", b"nul", b"\xe2\x80\xaegnp", b"\xe2\x80\xa8line separator", b"\xc2\x85next line", b"'\"quoted", b"a\tb"),
    *("é".encode(), "e\u0301".encode(), "\U0001f600".encode(), b"a.jsonl", b"a.reason.json", b"1.2", b"a.2"),
    b"\x01\x7f",
)
# fmt: on
BAD_TOO = b'{"text": \x1b[2J}\n'


def test_any_name_trains_or_is_refused_under_its_name(campaign, quick):
    with closing(Watched(quick / "home")) as lab:
        for name in NAMES:
            put(lab, name + b".jsonl", TEXT * 2)
        lab.dropped = [2] * len(NAMES)
        assert lab.drain() == 0, lab.log
        for name in NAMES:
            put(lab, name + b".jsonl", BAD_TOO)
        lab.refused = len(NAMES)
        assert lab.drain() == 1, lab.log

        def attempt(name, dice):
            file = os.fsdecode(name + b".jsonl")
            assert (lab.home / "trained" / file).read_bytes() == TEXT * 2
            assert (lab.home / "rejected" / file).read_bytes() == BAD_TOO

        campaign.run("12: any name is carried through unharmed", NAMES, attempt, small=1000)
        reasons = [json.loads(path.read_text()) for path in (lab.home / "rejected").glob("*.reason.json")]
        assert sorted(reason["file"] for reason in reasons) == sorted(os.fsdecode(name + b".jsonl") for name in NAMES)
        lab.check()
        check_told(lab)
        assert not list(quick.rglob("tripwire"))


def a_socket(path):
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


def a_device(path):
    if os.geteuid():
        pytest.skip("only root makes device nodes")
    os.mknod(path, 0o20666, os.makedev(1, 5))  # /dev/zero: whoever read it would never end


THINGS = {
    "a FIFO": os.mkfifo,
    "a socket": a_socket,
    "a device": a_device,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to a folder": lambda path: path.symlink_to("/etc"),
    "a link to a file outside": lambda path: path.symlink_to("/etc/passwd"),
    "a link to a good file": lambda path: path.symlink_to(path.parent.parent.parent / "outside" / "good.jsonl"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a folder": lambda path: path.mkdir(),
    "a folder with a file": lambda path: (path.mkdir(), (path / "inner.jsonl").write_bytes(TEXT)),
}
ENDINGS = (".jsonl", ".jsonl.gz", "")


def test_what_is_no_file_is_left_alone_and_told(campaign, quick):
    outside = quick / "outside"
    outside.mkdir()
    (outside / "good.jsonl").write_bytes(TEXT)
    before = facts_of(outside), facts_of(Path("/etc/passwd"))
    with closing(Watched(quick / "home")) as lab:
        things = {f"{name}{ending}": make for name, make in THINGS.items() for ending in ENDINGS}
        for number, (name, make) in enumerate(things.items()):
            make(lab.inbox / name)
            lab.drop_rows(f"good-{number}", 5)
        assert lab.drain() == 0, lab.log
        log = lab.log

        def attempt(name, dice):
            assert os.path.lexists(lab.inbox / name)
            assert len(re.findall(rf"inbox/{re.escape(name)} is left alone: ", log)) == 1

        campaign.run("12: what is no file is left alone, told once", list(things), attempt, small=1000)
        assert lab.names("inbox") == set(things)
        lab.check_model()
        lab.check_ledger()
        check_told(lab)
    assert (facts_of(outside), facts_of(Path("/etc/passwd"))) == before


def facts_of(place):
    """All that a touch, a read for writing or a change would leave behind; reading a file changes none of it."""
    paths = [place, *(place.rglob("*") if place.is_dir() else ())]
    return {path: (path.stat().st_mode, path.stat().st_size, path.stat().st_ctime_ns) for path in paths}


LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO   |WARNING|ERROR  ) ")


def check_told(lab):
    """Log and stderr have one line an event and nothing that a terminal would obey; the events can be read."""
    for text in (lab.whole_log, (lab.home / "stderr.log").read_text()):
        lines = text.removesuffix("\n").split("\n")
        assert [line for line in lines if not LINE.match(line) or not line.isprintable()] == []
    said = [line for line in lab.whole_log.split("\n") if line and ": step " not in line]
    assert len(said) == len(lab.events)
