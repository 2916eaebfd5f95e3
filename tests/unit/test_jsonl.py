from __future__ import annotations

import gzip
import hashlib
import json
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from longrun.errors import BadFile
from longrun.jsonl import MAX_DEPTH, JsonlReader, loads

if TYPE_CHECKING:
    from pathlib import Path

ROW = b'{"text": "a"}'
MIB = 1024 * 1024
NOISE = b'{"text": "' + b"".join(hashlib.sha256(bytes([n])).hexdigest().encode() for n in range(250)) + b'"}\n'


def read(path: Path, **options: Any) -> list[tuple[int, int, Any]]:
    return list(JsonlReader(path, **options))


def refusal(path: Path, content: bytes, **options: Any) -> BadFile:
    """The first refusal, whether raised or given."""
    path.write_bytes(content)
    try:
        return next(found for _, _, found in read(path, **options) if isinstance(found, BadFile))
    except BadFile as problem:
        return problem


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.jsonl"


def nested(depth: int) -> bytes:
    return b'{"a": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}\n"


BAD = {
    "a bad line": (ROW + b"\nnot json\n", "json", 2, 14),
    "an error inside a line": (ROW + b'\n{"a": 1, b}\n', "json", 2, 23),
    "an object that stops with its line": (ROW + b'\n{"a":\n' + ROW, "json", 2, 19),
    "two objects on a line": (ROW + ROW, "json", 1, 13),
    "a list later": (ROW + b"\n[1]\n", "json", 2, 14),
    "UTF-16 with a mark": ('{"text": "a"}'.encode("utf-16"), "encoding", 1, 0),
    "UTF-16 without": ('{"text": "a"}'.encode("utf-16-be"), "encoding", 1, 0),
    "UTF-32 with a mark": ('{"text": "a"}'.encode("utf-32"), "encoding", 1, 0),
    "UTF-32 without": ('{"text": "a"}'.encode("utf-32-le"), "encoding", 1, 0),
    "Latin-1": (ROW + b'\n{"text": "caf\xe9"}\n', "encoding", 2, 27),
    "a NUL byte": (b'{"text": "a\0b"}\n', "nul", 1, 11),
    "NUL bytes at the end": (ROW + b"\n" + b"\0" * 5, "nul", 2, 14),
    "a duplicate key": (b'{"a": {"b": 1, "b": 2}}\n', "value", 1, 0),
    "a duplicate key in a last line": (b'{"a": 1, "a": 2}', "value", 1, 0),
    "NaN": (b'{"a": NaN}\n', "value", 1, 0),
    "Infinity": (b'{"a": -Infinity}\n', "value", 1, 0),
    "1e999": (b'{"a": 1e999}\n', "value", 1, 0),
    "an integer beyond 64 bits": (b'{"a": 9223372036854775808}\n', "value", 1, 0),
    "an integer of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}\n", "value", 1, 0),
    "nesting of 65": (nested(MAX_DEPTH + 1), "value", 1, 0),
    "nesting of 100,000": (nested(100_000), "value", 1, 0),
    "a lone surrogate": (b'{"a": "\\ud800"}\n', "value", 1, 0),
    "a lone surrogate in a key": (b'{"\\uDFFF": 1}\n', "value", 1, 0),
    "CR-only line ends": (ROW + b"\r" + ROW + b"\r", "line_ends", 1, 0),
    "an array": (b'[{"text": "a"}]', "array", 1, 0),
    "an indented array": (b'[\n{"text": "a"}\n]\n', "array", 1, 0),
    "an indented object": (b'{\n  "text": "a"\n}\n', "pretty", 1, 0),
    "an object over two lines": (b'{"text":\n"a"}\n', "pretty", 1, 0),
    "a cut last line": (ROW + b'\n{"text": "cut of', "incomplete", 2, 14),
    "a cut character": (ROW + b'\n{"text": "\xe2\x82', "incomplete", 2, 14),
    "a cut after one byte": (ROW + b"\n{", "incomplete", 2, 14),
}


@pytest.mark.parametrize(("content", "kind", "line", "byte"), BAD.values(), ids=BAD.keys())
def test_bad_data_is_refused_with_its_place_and_a_fix(
    path: Path, content: bytes, kind: str, line: int, byte: int
) -> None:
    problem = refusal(path, content)
    assert (problem.kind, problem.line, problem.byte) == (kind, line, byte)
    assert problem.hint
    assert len(problem.extract or "") <= 80


GOOD = {
    "no newline at the end": (ROW, ["a"]),
    "CRLF": (ROW + b"\r\n" + ROW + b"\r\n", ["a", "a"]),
    "blank lines": (b"\n  \t\r\n" + ROW + b"\n\n", ["a"]),
    "U+2028, U+0085 and form feed": ('{"text": "a\u2028b\u0085c"}\n'.encode(), ["a\u2028b\u0085c"]),
    "a joined surrogate pair": (b'{"text": "\\ud83d\\ude00"}', ["\U0001f600"]),
    "an escaped backslash before ud800": (b'{"text": "\\\\ud800"}', ["\\ud800"]),
    "brackets in a string": (b'{"text": "\\"' + b"[" * 100 + b'"}', ['"' + "[" * 100]),
    "nothing": (b"", []),
}


@pytest.mark.parametrize(("content", "texts"), GOOD.values(), ids=GOOD.keys())
def test_unusual_but_sound_data_is_read(path: Path, content: bytes, texts: list[str]) -> None:
    path.write_bytes(content)
    assert [found["text"] for _, _, found in read(path)] == texts


def test_a_byte_order_mark_is_taken_off_and_noted(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + ROW + b"\n" + ROW)
    reader = JsonlReader(path)
    assert [(line, byte, found["text"]) for line, byte, found in reader] == [(1, 0, "a"), (2, 17, "a")]
    assert reader.notes == ["starts with a UTF-8 byte order mark"]


def test_crlf_is_noted_once(path: Path) -> None:
    path.write_bytes((ROW + b"\r\n") * 3)
    reader = JsonlReader(path)
    assert len(list(reader)) == 3
    assert reader.notes == ["lines end in CRLF"]


def test_sixty_four_levels_are_deep_enough() -> None:
    assert loads(nested(MAX_DEPTH).decode())


def test_the_largest_integers_are_kept() -> None:
    assert loads("[9223372036854775807, -9223372036854775808]") == [2**63 - 1, -(2**63)]


def test_a_bad_line_does_not_end_the_reading(path: Path) -> None:
    path.write_bytes(ROW + b"\noops\n" + ROW + b"\n")
    assert [(line, byte, isinstance(found, BadFile)) for line, byte, found in read(path)] == [
        (1, 0, False),
        (2, 14, True),
        (3, 19, False),
    ]


def test_the_line_after_one_that_is_too_long_keeps_its_place(path: Path) -> None:
    path.write_bytes(b'{"text": "' + b"x" * 3 * MIB + b'"}\n' + ROW)
    (_, _, long), (line, byte, found) = read(path, max_line_bytes=MIB)
    assert long.kind == "too_long"
    assert (line, byte, found) == (2, 3 * MIB + 13, {"text": "a"})


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_line_of_just_the_limit_is_read(path: Path, mark: bytes) -> None:
    path.write_bytes(mark + ROW + b"\n")
    limit = len(mark + ROW)
    assert read(path, max_line_bytes=limit)[0][2] == {"text": "a"}
    assert [found.kind for _, _, found in read(path, max_line_bytes=limit - 1)] == ["too_long"]


def test_a_huge_line_is_never_held_in_memory(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(64 * MIB)
        file.write(b'{"text": "')
    tracemalloc.start()
    found = read(path, max_line_bytes=MIB)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [problem.kind for _, _, problem in found] == ["too_long"]
    assert peak_bytes < 8 * MIB


# Compression


PACKERS = {"gzip": gzip.compress, "zstd": lambda data: zstandard.ZstdCompressor().compress(data)}
packed = pytest.mark.parametrize("name", PACKERS)


@packed
def test_compression_is_known_by_its_first_bytes_not_by_the_name(path: Path, name: str) -> None:
    content = PACKERS[name](NOISE * 3)
    path.write_bytes(content)
    reader = JsonlReader(path)
    assert [line for line, _, _ in reader] == [1, 2, 3]
    assert (reader.compression, reader.size_bytes) == (name, 3 * len(NOISE))
    assert reader.sha256 == hashlib.sha256(content).hexdigest()
    assert reader.notes == [f"{name} compressed"]


@packed
def test_members_one_after_the_other_are_one_file(path: Path, name: str) -> None:
    path.write_bytes(PACKERS[name](ROW[:5]) + PACKERS[name](b"") + PACKERS[name](ROW[5:] + b"\n"))
    assert read(path) == [(1, 0, {"text": "a"})]


@packed
@pytest.mark.parametrize("lost_bytes", [1, 9, 1000])
def test_a_cut_stream_is_incomplete(path: Path, name: str, lost_bytes: int) -> None:
    assert refusal(path, PACKERS[name](NOISE)[:-lost_bytes]).kind == "incomplete"


@packed
def test_a_damaged_stream_is_refused(path: Path, name: str) -> None:
    content = PACKERS[name](NOISE)
    assert refusal(path, content + b"garbage").kind == "compression"
    assert refusal(path, content[:4] + b"\xff" * 20 + content[24:]).kind == "compression"


@packed
def test_a_bomb_is_given_up_early(path: Path, name: str) -> None:
    bomb = PACKERS[name](b" " * 64 * MIB)
    tracemalloc.start()
    problem = refusal(path, bomb)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert problem.kind == "compression"
    assert "200 times" in problem.why
    assert peak_bytes < 48 * MIB


QUICK = settings(max_examples=50, deadline=None)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
KEYS = st.text("ab\u2028\n", max_size=3)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner), max_leaves=6)
OBJECTS = st.dictionaries(KEYS, VALUES, max_size=3)


@QUICK
@given(rows=st.lists(OBJECTS, max_size=4), ascii_only=st.booleans())
def test_any_objects_survive_being_written_and_read(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], ascii_only: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows), encoding="utf-8")
    assert [found for _, _, found in read(path)] == rows


@QUICK
@given(content=st.binary(max_size=60) | st.text('{}[]":,\\u0d8\r\n \ufeff', max_size=40).map(str.encode))
def test_no_bytes_do_worse_than_a_refusal(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.jsonl"
    path.write_bytes(content)
    try:
        found = read(path)
    except BadFile:
        return
    assert all(isinstance(value, dict | BadFile) for _, _, value in found)
