"""What holds of any file whatsoever that is dropped: it is read the same twice, or refused in one piece.

`check` raises where it does not hold; `mutate` makes files that come further than bytes struck at random would.
"""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from longrun import jsonl, wire
from longrun.errors import BadFile
from longrun.examine import Examined, examine
from longrun.home import ROWS
from longrun.training.base_model import load_tokenizer
from longrun.training.masks import Encoder
from longrun.training.prepare import prepare
from tests.drills.test_input import CONTENTS
from tests.drills.test_json import GROWTH_BYTES, NO, PACKERS, TOKENS, YES, forget_peak, peak_bytes, seeds

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_LINE_BYTES = 5_000
MAX_LENGTH = 200  # tokens: short, so that rows are cut
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5"
WITHOUT_A_PLACE = {"empty", "compression", "incomplete"}  # of the file as a whole, where it is
VALUES: tuple[Any, ...] = (
    *(None, True, 0, 1, -1, 1.5, "", " ", "text", "\u2028", "\0", "\U0001f600", "</think>", "<|im_end|>", [], {}),
    *("user", "assistant", "system", "tool", "developer", "human", "gpt", "function_call", '{"a": 1}', "[]"),
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
    {"role": "tool", "content": "c", "tool_call_id": "1"},
    {"type": "text", "text": "a"},
    {"type": "image_url"},
    {"from": "gpt", "value": "b"},
)
KEYS = (
    *("messages", "role", "content", "tool_calls", "function", "name", "arguments", "tools", "weight", "prompt"),
    *("completion", "text", "conversations", "from", "value", "instruction", "input", "output", "system", "images"),
    *("type", "reasoning_content", "train_from", "a"),
)


class Reading:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "x.jsonl"
        self.encoder = Encoder(load_tokenizer("tiny", trust_remote_code=False), max_length=MAX_LENGTH)
        for content in starts():  # what is imported and cached once is no file's memory
            self._check(content)

    def check(self, content: bytes) -> None:
        before = forget_peak()
        self._check(content)
        grown = peak_bytes() - before
        assert grown < GROWTH_BYTES, f"it takes {grown >> 20} MiB"

    def _check(self, content: bytes) -> None:
        self.path.write_bytes(content)
        if not self._is_read("reject", content):
            self._is_read("skip", content)

    def _is_read(self, on_bad_row: str, content: bytes) -> bool:
        try:
            found = examine(self.path, on_bad_row=on_bad_row, max_line_bytes=MAX_LINE_BYTES)
        except BadFile as problem:
            _check_refusal(problem, content)
            return False
        self._check_prepared(found, on_bad_row)
        return True

    def _check_prepared(self, found: Examined, on_bad_row: str) -> None:
        assert found.rows
        assert json.dumps(vars(found)).encode()
        task = wire.Prepare(
            job=1,
            path=str(self.path),
            format=found.format.value,
            sha256=found.sha256,
            folder=str(self.folder / "prepared"),
            rows=found.rows,
            tokenizer="tiny",
            base_model="tiny",
            max_length=MAX_LENGTH,
            on_bad_row=on_bad_row,
            max_line_bytes=MAX_LINE_BYTES,
            trust_remote_code=False,
        )
        try:
            facts = prepare(task, self.encoder, lambda _: None)
        except BadFile as problem:
            assert problem.kind == "template", problem.reason()
            assert json.dumps(problem.reason()).encode()
            return
        assert facts["rows"] == found.rows, f"{found.rows} rows examined, {facts['rows']} prepared"
        assert facts["trainable_rows"] + facts["untrainable_rows"] + facts["refused_rows"] == found.rows
        with pa.ipc.open_stream(str(self.folder / "prepared" / ROWS)) as stream:
            assert stream.read_all().num_rows == facts["trainable_rows"]


def _check_refusal(problem: BadFile, content: bytes) -> None:
    assert problem.why
    assert json.dumps(problem.reason()).encode()
    if problem.line is None or problem.byte is None:
        assert problem.kind in WITHOUT_A_PLACE, problem.reason()
        return
    text = unpacked(content)
    line = text[: problem.byte].count(b"\n") + 1
    assert problem.byte <= len(text)
    assert line == problem.line, f"byte {problem.byte} is in line {line}, not in {problem.line}: {problem.why}"


def unpacked(content: bytes) -> bytes:
    """As much of it as can be decompressed."""
    codec = jsonl._codec(content)
    out = b""
    with contextlib.suppress(BadFile):
        for piece in jsonl._decompress(iter([content]), codec) if codec else [content]:
            out += piece
    return out


# -- making files


def starts() -> list[bytes]:
    """The bad-input table, all of JSON's corners as values of a row, and good files of each format."""
    tables = [content for content, _ in CONTENTS.values() if len(content) < 20_000]
    corners = [b'{"text": "a", "more": ' + value + b"}\n" for value in (*YES, *NO)]
    return [*tables, *corners, *seeds()]


def words() -> list[bytes]:
    """For the fuzzer's dictionary."""
    return [*(json.dumps(key).encode() for key in KEYS), *(token for token in TOKENS if len(token) < 100)]


def mutate(content: bytes, most: int, seed: int, bytewise: Callable[[bytes, int], bytes]) -> bytes:
    """Bytes struck at random; or a value of a row exchanged; within a compressed file, too."""
    dice = random.Random(seed)
    packed = content[:2] in (GZIP, ZSTD)
    if packed and dice.random() < 0.8:
        inner = mutate(unpacked(content)[:most], most, seed + 1, bytewise)
        return PACKERS[1 if content[:2] == GZIP else 2](inner)[:most]
    if dice.random() < 0.02:
        return dice.choice(PACKERS)(content)[:most]
    if dice.random() < 0.5:
        return bytewise(content, most)
    lines = content.split(b"\n")
    at = dice.randrange(len(lines))
    try:
        row = json.loads(lines[at])
    except (ValueError, RecursionError):
        return bytewise(content, most)
    text = json.dumps(exchanged(row, dice), ensure_ascii=dice.random() < 0.5)
    lines[at] = text.encode("utf-8", "surrogatepass")
    if dice.random() < 0.2:
        lines.insert(at, dice.choice(lines))
    return b"\n".join(lines)[:most]


def exchanged(value: Any, dice: random.Random) -> Any:
    """The value with one value somewhere in it exchanged, added or taken away."""
    if not isinstance(value, dict | list) or not value or dice.random() < 0.2:
        return dice.choice(VALUES)
    places = list(value) if isinstance(value, dict) else list(range(len(value)))
    at = dice.choice(places)
    found = value.copy()
    match dice.randrange(5):
        case 0:
            del found[at]
        case 1 if isinstance(found, dict):
            found[dice.choice(KEYS)] = dice.choice(VALUES)
        case 1:
            found.insert(at, dice.choice([*VALUES, *found]))
        case _:
            found[at] = exchanged(found[at], dice)
    return found
