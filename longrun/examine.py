"""What a dropped file holds: its format, its rows, and the first thing that is wrong with it.

`examine` reads a whole file before anything is trained; a RowReader gives the rows again for preparing them.
Both are one generator, so they accept the same rows under the same numbers, and both take the file's hash on
the way: equal hashes prove that the bytes that are trained are the bytes that were examined.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from longrun.errors import BadFile
from longrun.jsonl import EXTRACT_CHARACTERS, MAX_LINE_BYTES, JsonlReader, loads, located
from longrun.rows import ChatRow, CompletionRow, Row, RowFormat, TextRow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MAX_SKIPPED_SHOWN = 100
MAX_COLUMNS_NOTED = 20

# A row is of the first format whose keys it has: chat data often carries a `prompt` or `text` column besides.
_KEYS = {
    RowFormat.MESSAGES: {"messages"},
    RowFormat.PROMPT_COMPLETION: {"prompt", "completion"},
    RowFormat.SHAREGPT: {"conversations"},
    RowFormat.ALPACA: {"instruction", "output"},
    RowFormat.TEXT: {"text"},
}
_COLUMNS = {
    RowFormat.MESSAGES: {"messages", "tools"},
    RowFormat.PROMPT_COMPLETION: {"prompt", "completion", "tools"},
    RowFormat.SHAREGPT: {"conversations", "tools"},
    RowFormat.ALPACA: {"instruction", "input", "output", "system"},
    RowFormat.TEXT: {"text"},
}
_SHAPES = (
    "Write every row as one of "
    '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}, '
    '{"prompt": "2 + 2 =", "completion": " 4"}, '
    '{"text": "Any text."}, '
    '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, '
    '{"instruction": "Translate", "input": "Hallo", "output": "Hello"}'
)

_PLAIN = {"role", "content"}
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
ROWS_BETWEEN_SIGNS = 50_000
_MEDIA = ("image", "audio", "video", "file")


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What is known of a file before it is queued."""

    rows: int
    size_bytes: int  # decompressed
    sha256: str  # of the file's own bytes, in hex
    format: RowFormat
    compression: str  # none, gzip or zstd
    notes: tuple[str, ...]  # what was accepted but is worth a word
    skipped: tuple[dict[str, Any], ...]  # BadFile.reason() of the first MAX_SKIPPED_SHOWN
    skipped_rows: int


def examine(
    path: Path,
    *,
    on_bad_row: str = "reject",
    max_line_bytes: int = MAX_LINE_BYTES,
    alive: Callable[[int], None] = lambda _: None,
) -> Examined:
    """Check every row of a file; BadFile at the first bad one, unless `on_bad_row` is "skip".

    `alive` hears of the rows read so far, now and then.
    """
    reader = RowReader(path, on_bad_row=on_bad_row, max_line_bytes=max_line_bytes)
    for number, _ in reader:
        if number % ROWS_BETWEEN_SIGNS == ROWS_BETWEEN_SIGNS - 1:
            alive(number + 1)
    assert reader.format is not None
    return Examined(
        rows=reader.rows,
        size_bytes=reader.size_bytes,
        sha256=reader.sha256,
        format=reader.format,
        compression=reader.compression,
        notes=reader.notes,
        skipped=tuple(reader.skipped),
        skipped_rows=reader.skipped_rows,
    )


class RowReader:
    """Iterates over (row, Row), rows counted from 0 and only the accepted ones; made for one pass.

    The other facts are complete when the iteration is. Of an examined file the format is known, and after the last row
    `sha256` must equal the one that was examined.
    """

    def __init__(
        self,
        path: Path,
        row_format: RowFormat | None = None,
        *,
        on_bad_row: str = "reject",
        max_line_bytes: int = MAX_LINE_BYTES,
    ) -> None:
        self.format = row_format  # None: that of the first row that has one
        self.rows = 0
        self.skipped: list[dict[str, Any]] = []
        self.skipped_rows = 0
        self._format_line: int | None = None
        self._on_bad_row = on_bad_row
        self._columns_not_used: set[str] = set()
        self._jsonl = JsonlReader(path, max_line_bytes=max_line_bytes)

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        for line, byte, found in self._jsonl:
            try:
                row = self._row(line, byte, found)
            except BadFile as problem:
                self._refuse(problem)
                continue
            self.rows += 1
            yield self.rows - 1, row
        if self.rows == 0:
            raise self._no_rows()

    @property
    def sha256(self) -> str:
        return self._jsonl.sha256

    @property
    def size_bytes(self) -> int:
        return self._jsonl.size_bytes

    @property
    def compression(self) -> str:
        return self._jsonl.compression

    @property
    def notes(self) -> tuple[str, ...]:
        columns = ", ".join(sorted(self._columns_not_used)[:MAX_COLUMNS_NOTED])
        return (*self._jsonl.notes, *([f"columns not used: {columns}"] if columns else []))

    def _row(self, line: int, byte: int, found: dict[str, Any] | BadFile) -> Row:
        if isinstance(found, BadFile):
            raise found
        try:
            row_format = self._same_format(line, found)
            _refuse_media(found)
            row = _READERS[row_format](found)
        except BadFile as problem:
            raise located(problem, line, byte) from None
        # Bounded, because a file may invent new names in every row.
        if not found.keys() <= _COLUMNS[row_format] and len(self._columns_not_used) < MAX_COLUMNS_NOTED:
            self._columns_not_used.update(found.keys() - _COLUMNS[row_format])
        return row

    def _same_format(self, line: int, found: dict[str, Any]) -> RowFormat:
        row_format = _detect(found)
        if self.format is None:
            self.format, self._format_line = row_format, line
        if row_format is not self.format:
            other = "the file" if self._format_line is None else f"line {self._format_line}"
            why = f"{other} is {self.format}, line {line} is {row_format}"
            hint = "Put each format in a file of its own"
            raise BadFile(why, kind="format", extract=_shown(found), hint=hint)
        return row_format

    def _refuse(self, problem: BadFile) -> None:
        if self._on_bad_row != "skip":
            raise problem
        self.skipped_rows += 1
        if len(self.skipped) < MAX_SKIPPED_SHOWN:
            self.skipped.append(problem.reason())

    def _no_rows(self) -> BadFile:
        if not self.skipped:
            return BadFile("the file has 0 rows", kind="empty", hint="Write one JSON object a line")
        first = self.skipped[0]
        return BadFile(
            f"{first['why']} (none of the {self.skipped_rows} rows is usable; this is the first)",
            kind=first["kind"],
            line=first["line"],
            byte=first["byte"],
            field=first.get("field"),
            extract=first.get("extract"),
            hint=first.get("fix", ""),
        )


def _detect(found: dict[str, Any]) -> RowFormat:
    for row_format, keys in _KEYS.items():
        if found.keys() >= keys:
            return row_format
    columns = ", ".join(sorted(found)) or "none"
    why = f"no known row format has these columns: {columns}"[: 3 * EXTRACT_CHARACTERS]
    raise BadFile(why, kind="format", extract=_shown(found), hint=_SHAPES)


def _refuse_media(found: dict[str, Any]) -> None:
    """A row with pictures or sound beside its text: trained without them it would teach to answer unseen."""
    for column, value in found.items():
        if value and _holds_media(column):
            hint = "Vision and audio rows are not supported: leave them out"
            raise _bad(column, "holds more than text; only text can be trained", value, hint, kind="multimodal")


@lru_cache(maxsize=1024)  # the columns of a file are few, and its rows are not
def _holds_media(column: str) -> bool:
    return column.lower().rstrip("s") in ("image", "video", "audio")


# One reader a format


def _messages_row(found: dict[str, Any]) -> Row:
    messages = _messages(found["messages"], "messages")
    _check_trains(messages, "messages")
    return ChatRow(messages=messages, tools=_tools(found))


def _prompt_completion_row(found: dict[str, Any]) -> Row:
    prompt, completion = found["prompt"], found["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return CompletionRow(prompt=prompt, completion=_text(found, "completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        read = _messages(prompt, "prompt")
        trained = _messages(completion, "completion")
        _check_trains(trained, "completion")
        return ChatRow(messages=read + trained, tools=_tools(found), train_from=len(read))
    hint = "Make both strings, or both lists of messages"
    raise _bad("completion", f"is {_kind(completion)} while prompt is {_kind(prompt)}", completion, hint)


def _text_row(found: dict[str, Any]) -> Row:
    return TextRow(text=_text(found, "text"))


def _sharegpt_row(found: dict[str, Any]) -> Row:
    turns = _filled_list(found["conversations"], "conversations")
    messages = [_turn(turn, f"conversations[{index}]") for index, turn in enumerate(turns)]
    _check_trains(messages, "conversations")
    return ChatRow(messages=messages, tools=_tools(found))


def _alpaca_row(found: dict[str, Any]) -> Row:
    instruction, output = _text(found, "instruction"), _text(found, "output")
    more, system = _optional_text(found, "input"), _optional_text(found, "system")
    messages = [
        {"role": "user", "content": f"{instruction}\n\n{more}" if more else instruction},
        {"role": "assistant", "content": output},
    ]
    return ChatRow(messages=[{"role": "system", "content": system}, *messages] if system else messages)


_READERS: dict[RowFormat, Callable[[dict[str, Any]], Row]] = {
    RowFormat.MESSAGES: _messages_row,
    RowFormat.PROMPT_COMPLETION: _prompt_completion_row,
    RowFormat.TEXT: _text_row,
    RowFormat.SHAREGPT: _sharegpt_row,
    RowFormat.ALPACA: _alpaca_row,
}


# Messages


def _messages(value: Any, field: str) -> list[dict[str, Any]]:
    messages = _filled_list(value, field)
    return [
        message if _is_plain(message) else _message(message, f"{field}[{index}]")
        for index, message in enumerate(messages)
    ]


def _is_plain(message: Any) -> bool:
    """Whether there is nothing to look for in it, as in nearly all messages there are."""
    return (
        isinstance(message, dict)
        and message.keys() == _PLAIN
        and isinstance(message["content"], str)
        and message["role"] in _ROLES
    )


def _message(found: Any, field: str) -> dict[str, Any]:
    """The message with its content as one string and its tool calls as objects; other keys as they are."""
    if not isinstance(found, dict):
        hint = 'Write {"role": ..., "content": ...}'
        raise _bad(field, f"is {_kind(found)}, not an object", found, hint)
    message: dict[str, Any] = found
    role = message.get("role")
    if role not in _ROLES:
        raise _bad(f"{field}.role", f"is {_shown(role)}, not a known role", role, f"Use one of {', '.join(_ROLES)}")
    if message.get("weight", 1) != 1:
        hint = "Leave the row out, or end it before this turn"
        raise _bad(f"{field}.weight", "is not 1, and turns cannot be weighted", message["weight"], hint)
    calls = message.get("tool_calls")
    content = message.get("content")
    if isinstance(content, str) and not calls:
        return message
    if calls:
        message = {**message, "tool_calls": _tool_calls(calls, role, f"{field}.tool_calls")}
    if content is None and calls:
        return message
    return {**message, "content": _content(content, f"{field}.content")}


def _content(content: Any, field: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part(part, f"{field}[{index}]") for index, part in enumerate(content))
    hint = "Write a string; only an assistant message with tool_calls may do without"
    why = "is missing" if content is None else f"is {_kind(content)}, not a string"
    raise _bad(field, why, content, hint)


def _part(part: Any, field: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(kind, str) and any(medium in kind for medium in _MEDIA):
        hint = "Vision and audio rows are not supported: leave them out"
        raise _bad(field, f"holds {kind}; only text can be trained", part, hint, kind="multimodal")
    raise _bad(field, "is not a text part", part, 'Write {"type": "text", "text": "..."}')


def _tool_calls(calls: Any, role: str, field: str) -> list[dict[str, Any]]:
    if role != "assistant":
        raise _bad(field, f"stands in a message of role {role}", calls, "Only the assistant calls tools")
    return [_tool_call(call, f"{field}[{index}]") for index, call in enumerate(_filled_list(calls, field))]


def _tool_call(call: Any, field: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        hint = 'Write {"type": "function", "function": {"name": "...", "arguments": {...}}}'
        raise _bad(field, "names no function", call, hint)
    arguments = _arguments(function.get("arguments"), f"{field}.function.arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def _arguments(arguments: Any, field: str) -> dict[str, Any]:
    """As an object, since chat templates write a string out as a string in a string."""
    value = _parsed(arguments, field) if isinstance(arguments, str) else arguments
    if not isinstance(value, dict):
        hint = "Write an object, or a string that holds one as JSON"
        raise _bad(field, f"is {_kind(value)}, not an object", arguments, hint)
    return value


def _tools(found: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = found.get("tools")
    value = _parsed(tools, "tools") if isinstance(tools, str) and tools else tools
    if value and not (isinstance(value, list) and all(isinstance(tool, dict) for tool in value)):
        hint = 'Write a list [{"type": "function", "function": {...}}], or a string that holds one as JSON'
        raise _bad("tools", "is not a list of objects", tools, hint)
    return value or None


def _turn(turn: Any, field: str) -> dict[str, Any]:
    if not isinstance(turn, dict) or "from" not in turn:
        return _message(turn, field)
    speaker = turn["from"]
    if speaker == "function_call":
        hint = "Write the row as messages with tool_calls"
        raise _bad(f"{field}.from", "function_call turns are not supported", speaker, hint)
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        hint = f"Use one of {', '.join(_SHAREGPT_ROLES)}"
        raise _bad(f"{field}.from", "is not a known speaker", speaker, hint)
    value = turn.get("value")
    if not isinstance(value, str):
        raise _bad(f"{field}.value", f"is {_kind(value)}, not a string", value, "Write a string")
    return {"role": _SHAREGPT_ROLES[speaker], "content": value}


def _check_trains(messages: list[dict[str, Any]], field: str) -> None:
    for message in messages:
        if message["role"] == "assistant" and (message.get("tool_calls") or message["content"].strip()):
            return
    hint = "Add the assistant's answer, or leave the row out"
    raise _bad(field, "has no assistant message to train", messages, hint)


# Values


def _filled_list(value: Any, field: str) -> list[Any]:
    if not isinstance(value, list):
        raise _bad(field, f"is {_kind(value)}, not a list", value, "Write a list of objects")
    if not value:
        raise _bad(field, "is an empty list", value, "Fill it, or leave the row out")
    return value


def _text(found: dict[str, Any], field: str) -> str:
    text = found[field]
    if not isinstance(text, str):
        raise _bad(field, f"is {_kind(text)}, not a string", text, "Write a string")
    if not text:
        raise _bad(field, "is empty", text, "Fill it, or leave the row out")
    return text


def _optional_text(found: dict[str, Any], field: str) -> str:
    return _text(found, field) if found.get(field) not in (None, "") else ""


def _parsed(text: str, field: str) -> Any:
    try:
        return loads(text)
    except BadFile as problem:
        why = f"is a string that holds no JSON: {problem.why}"
        raise _bad(field, why, text, "Write the value itself") from None


def _bad(field: str, why: str, value: Any, hint: str, *, kind: str = "content") -> BadFile:
    return BadFile(why, kind=kind, field=field, extract=_shown(value), hint=hint)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:EXTRACT_CHARACTERS]


def _kind(value: Any) -> str:
    """A value's type in JSON's words."""
    names = {str: "a string", bool: "a boolean", dict: "an object", list: "a list", type(None): "null"}
    return names.get(type(value), "a number")
