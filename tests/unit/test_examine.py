from __future__ import annotations

import gzip
import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from longrun.errors import BadFile
from longrun.examine import MAX_SKIPPED_SHOWN, RowReader, examine
from longrun.rows import ChatRow, CompletionRow, Row, RowFormat, TextRow

if TYPE_CHECKING:
    from pathlib import Path

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.jsonl"


def write(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_of(path: Path, **options: Any) -> list[Row]:
    examined = examine(path, **options)
    return [row for _, row in RowReader(path, examined.format, **options)]


def refusal(path: Path, *rows: Any) -> BadFile:
    write(path, *rows)
    with pytest.raises(BadFile) as caught:
        examine(path)
    return caught.value


def chat(*messages: dict[str, Any], **options: Any) -> ChatRow:
    return ChatRow(messages=list(messages), **options)


def call(arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


READ: dict[str, tuple[dict[str, Any], RowFormat, Row]] = {
    "messages": ({"messages": [USER, ASSISTANT]}, RowFormat.MESSAGES, chat(USER, ASSISTANT)),
    "text parts": (
        {"messages": [USER, {**ASSISTANT, "content": [{"type": "text", "text": t} for t in ("Hel", "lo")]}]},
        RowFormat.MESSAGES,
        chat(USER, ASSISTANT),
    ),
    "other message keys": (
        {"messages": [{**USER, "name": "Ann"}, {**ASSISTANT, "reasoning_content": "hm", "tool_calls": None}]},
        RowFormat.MESSAGES,
        chat({**USER, "name": "Ann"}, {**ASSISTANT, "reasoning_content": "hm", "tool_calls": None}),
    ),
    "tool calls as objects": (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [TOOL]},
        RowFormat.MESSAGES,
        chat({"role": "assistant", "content": None, "tool_calls": [CALL]}, tools=[TOOL]),
    ),
    "arguments and tools as strings": (
        {"messages": [call('{"a": 1}')], "tools": json.dumps([TOOL])},
        RowFormat.MESSAGES,
        chat(call({"a": 1}), tools=[TOOL]),
    ),
    "prompt and completion": (
        {"prompt": "", "completion": "b"},
        RowFormat.PROMPT_COMPLETION,
        CompletionRow(prompt="", completion="b"),
    ),
    "prompt and completion as messages": (
        {"prompt": [ASSISTANT, USER], "completion": [ASSISTANT]},
        RowFormat.PROMPT_COMPLETION,
        chat(ASSISTANT, USER, ASSISTANT, train_from=2),
    ),
    "text": ({"text": "a"}, RowFormat.TEXT, TextRow(text="a")),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        RowFormat.SHAREGPT,
        chat(USER, ASSISTANT),
    ),
    "ShareGPT with roles": ({"conversations": [USER, ASSISTANT]}, RowFormat.SHAREGPT, chat(USER, ASSISTANT)),
    "Alpaca": (
        {"instruction": "Hi", "input": "", "output": "Hello", "text": "Hi Hello"},
        RowFormat.ALPACA,
        chat(USER, ASSISTANT),
    ),
    "Alpaca with everything": (
        {"instruction": "A", "input": "B", "output": "Hello", "system": "S"},
        RowFormat.ALPACA,
        chat({"role": "system", "content": "S"}, {"role": "user", "content": "A\n\nB"}, ASSISTANT),
    ),
}


@pytest.mark.parametrize(("found", "row_format", "row"), READ.values(), ids=READ.keys())
def test_each_format_is_detected_and_read(path: Path, found: dict[str, Any], row_format: RowFormat, row: Row) -> None:
    write(path, found, found)
    assert examine(path).format is row_format
    assert rows_of(path) == [row, row]


def said(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


def asked(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, ASSISTANT]}


ARGUMENTS = "messages[0].tool_calls[0].function.arguments"
BAD: dict[str, tuple[Any, str, str | None]] = {
    "messages no list": ({"messages": "Hi"}, "content", "messages"),
    "messages empty": ({"messages": []}, "content", "messages"),
    "message no object": ({"messages": ["Hi"]}, "content", "messages[0]"),
    "unknown role": ({"messages": [{"role": "human", "content": "a"}]}, "content", "messages[0].role"),
    "role no string": ({"messages": [{"role": [], "content": "a"}]}, "content", "messages[0].role"),
    "content null": (asked(None), "content", "messages[0].content"),
    "content a number": (asked(3), "content", "messages[0].content"),
    "image part": (asked([{"type": "image_url"}]), "multimodal", "messages[0].content[0]"),
    "audio part": (asked([{"type": "input_audio"}]), "multimodal", "messages[0].content[0]"),
    "unknown part": (asked(["a"]), "content", "messages[0].content[0]"),
    "no assistant": ({"messages": [USER]}, "content", "messages"),
    "assistant blank": ({"messages": [USER, {**ASSISTANT, "content": " \n"}]}, "content", "messages"),
    "tools no list": ({"messages": [ASSISTANT], "tools": {"a": 1}}, "content", "tools"),
    "tools no JSON": ({"messages": [ASSISTANT], "tools": "f(x)"}, "content", "tools"),
    "user calls a tool": (
        {"messages": [{**USER, "tool_calls": [CALL]}]},
        "content",
        "messages[0].tool_calls",
    ),
    "call without function": (
        {"messages": [{**ASSISTANT, "tool_calls": [{"id": 1}]}]},
        "content",
        "messages[0].tool_calls[0]",
    ),
    "arguments no JSON": ({"messages": [call("a=1")]}, "content", ARGUMENTS),
    "arguments a list": ({"messages": [call("[1]")]}, "content", ARGUMENTS),
    "arguments too deep": ({"messages": [call("[" * 100_000)]}, "content", ARGUMENTS),
    "prompt and completion of two kinds": (
        {"prompt": "a", "completion": [ASSISTANT]},
        "content",
        "completion",
    ),
    "completion empty": ({"prompt": "a", "completion": ""}, "content", "completion"),
    "completion without assistant": ({"prompt": [USER], "completion": [USER]}, "content", "completion"),
    "text empty": ({"text": ""}, "content", "text"),
    "text null": ({"text": None}, "content", "text"),
    "unknown speaker": (said(("bing", "a")), "content", "conversations[0].from"),
    "function_call": (said(("function_call", "{}")), "content", "conversations[0].from"),
    "value null": (said(("gpt", None)), "content", "conversations[0].value"),
    "output empty": ({"instruction": "a", "output": ""}, "content", "output"),
    "input a list": ({"instruction": "a", "input": [], "output": "b"}, "content", "input"),
    "no format": ({"question": "a", "answer": "b"}, "format", None),
    "no columns": ({}, "format", None),
}


@pytest.mark.parametrize(("found", "kind", "field"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_refused_with_its_field_and_a_fix(path: Path, found: Any, kind: str, field: str | None) -> None:
    problem = refusal(path, found)
    assert (problem.kind, problem.field, problem.line, problem.byte) == (kind, field, 1, 0)
    assert problem.hint
    assert len(problem.extract or "") <= 80


def test_a_row_of_no_format_is_shown_all_five(path: Path) -> None:
    hint = refusal(path, {"question": "a"}).hint
    assert all(f'"{key}"' in hint for key in ("messages", "prompt", "text", "conversations", "instruction"))


def test_two_formats_in_one_file_are_refused_with_both_lines(path: Path) -> None:
    write(path, {"messages": [ASSISTANT]})
    path.write_bytes(b"\n" + path.read_bytes() + b'\n\n{"text": "a"}\n')
    with pytest.raises(BadFile, match="line 2 is messages, line 5 is text") as caught:
        examine(path)
    assert caught.value.line == 5


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf", gzip.compress(b"", mtime=0)])
def test_a_file_without_rows_is_refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(BadFile, match="0 rows") as caught:
        examine(path)
    assert caught.value.kind == "empty"


def test_a_cut_last_line_is_reported_as_incomplete(path: Path) -> None:
    path.write_bytes(b'{"text": "a"}\n{"text": "b')
    with pytest.raises(BadFile, match="line 2, byte 14: the last line is not complete") as caught:
        examine(path)
    assert caught.value.kind == "incomplete"


def test_columns_that_are_not_used_are_noted_once(path: Path) -> None:
    write(path, {"text": "a", "source": "s", "id": 1}, {"text": "b", "id": 2})
    assert examine(path).notes == ("columns not used: id, source",)


def test_endless_new_columns_are_noted_up_to_a_limit(path: Path) -> None:
    write(path, *({"text": "a", f"column_{index:03}": 1} for index in range(100)))
    assert len(examine(path).notes[0]) < 400


@pytest.mark.parametrize(
    ("compression", "pack"),
    [
        ("none", bytes),
        ("gzip", gzip.compress),
        ("zstd", lambda data: zstandard.ZstdCompressor().compress(data)),
    ],
)
def test_the_hash_is_of_the_bytes_on_disk_and_the_size_is_of_the_text(path: Path, compression: str, pack: Any) -> None:
    text = b'{"text": "a"}\n{"text": "b"}\n'
    path.write_bytes(pack(text))
    examined = examine(path)
    assert (examined.compression, examined.size_bytes, examined.rows) == (compression, len(text), 2)
    reader = RowReader(path, examined.format)
    assert list(reader) == [(0, TextRow(text="a")), (1, TextRow(text="b"))]
    assert reader.sha256 == examined.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


# Skipping


def test_skipped_rows_are_counted_and_the_first_hundred_named(path: Path) -> None:
    write(path, {"text": "a"}, *[{"text": ""}] * (MAX_SKIPPED_SHOWN + 50), {"text": "b"})
    examined = examine(path, on_bad_row="skip")
    assert (examined.rows, examined.skipped_rows) == (2, MAX_SKIPPED_SHOWN + 50)
    assert len(examined.skipped) == MAX_SKIPPED_SHOWN
    assert (examined.skipped[0]["line"], examined.skipped[0]["field"]) == (2, "text")


def test_a_file_whose_rows_are_all_bad_is_refused_even_when_skipping(path: Path) -> None:
    write(path, {"text": ""}, {"text": ""})
    with pytest.raises(BadFile, match="none of the 2 rows is usable") as caught:
        examine(path, on_bad_row="skip")
    assert (caught.value.line, caught.value.field) == (1, "text")


@pytest.mark.parametrize("content", ['{"text": "a"}'.encode("utf-16"), b"\x1f\x8bnot gzip", b'[\n{"text": "a"}\n]'])
def test_trouble_with_the_whole_file_is_never_skipped(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(BadFile):
        examine(path, on_bad_row="skip")


def test_a_line_that_is_too_long_can_be_skipped(path: Path) -> None:
    write(path, {"text": "a"}, {"text": "x" * 5000}, {"text": "b"})
    assert rows_of(path, on_bad_row="skip", max_line_bytes=1000) == [TextRow(text="a"), TextRow(text="b")]


QUICK = settings(max_examples=50, deadline=None)
LINES = st.sampled_from(
    [
        b'{"text": "a"}',
        b'{"text": ""}',
        b'{"messages": []}',
        b'{"messages": [{"role": "assistant", "content": "a"}]}',
        b'{"a": 1}',
        b"",
        b"oops",
        b'{"text": "' + b"x" * 200 + b'"}',
    ]
)


@QUICK
@given(lines=st.lists(LINES, max_size=8))
def test_examining_and_reading_accept_the_same_rows(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / "agree.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        examined = examine(path, on_bad_row="skip", max_line_bytes=100)
    except BadFile:
        return
    reader = RowReader(path, examined.format, on_bad_row="skip", max_line_bytes=100)
    assert [number for number, _ in reader] == list(range(examined.rows))
    assert [skip["line"] for skip in reader.skipped] == [skip["line"] for skip in examined.skipped]
    assert reader.sha256 == examined.sha256


FILLED = st.text(min_size=1).filter(str.strip)
MESSAGE = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["system", "user", "assistant", "tool"]),
    st.text(),
)


@QUICK
@given(rows=st.lists(st.tuples(st.lists(MESSAGE, max_size=4), FILLED), min_size=1, max_size=4))
def test_any_valid_chat_rows_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[list[dict[str, Any]], str]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "chats.jsonl"
    written = [[*before, {"role": "assistant", "content": answer}] for before, answer in rows]
    write(path, *({"messages": messages} for messages in written))
    assert rows_of(path) == [ChatRow(messages=messages) for messages in written]


CHAT_TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    ("row", "field", "kind"),
    [
        ({"messages": CHAT_TURNS, "images": ["cat.png"]}, "images", "multimodal"),
        ({"text": "a sound", "audio": {"path": "a.wav"}}, "audio", "multimodal"),
        ({"messages": [CHAT_TURNS[0], {**CHAT_TURNS[1], "weight": 0}]}, "messages[1].weight", "content"),
    ],
)
def test_what_would_be_trained_wrongly_without_a_word_is_refused(tmp_path, row, field, kind):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(BadFile) as caught:
        examine(path)
    assert (caught.value.field, caught.value.kind) == (field, kind)


def test_an_empty_images_column_is_only_noted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": CHAT_TURNS, "images": []}) + "\n")
    assert examine(path).notes == ("columns not used: images",)
