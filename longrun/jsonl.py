"""Bytes to objects, strictly: what two readers could understand differently is refused, never guessed.

    file -> gzip or zstd taken off -> lines split at 0x0A -> UTF-8 -> JSON object

One pass and constant memory: the hash of the file's own bytes is taken on the way, a line is never held
beyond `max_line_bytes`, and a compressed stream is given up as soon as it grows out of proportion.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import re
import zlib
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

from longrun.errors import BadFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_DEPTH = 64
MAX_RATIO = 200  # decompressed to compressed; text reaches 3 to 20, a bomb or one row repeated gets here
RATIO_FROM_BYTES = 1024 * 1024  # below this much output a ratio says nothing
EXTRACT_CHARACTERS = 80

_READ_BYTES = 1024 * 1024
# Four bytes of zstd can hold 128 KiB of output, so one piece can make 32 MiB before its ratio is seen.
_PIECE_BYTES = 1024

_BOM = b"\xef\xbb\xbf"
_FOREIGN_STARTS = (  # longest first: the mark of UTF-32 LE begins with that of UTF-16 LE
    (b"\xff\xfe\0\0", "UTF-32LE"),
    (b"\0\0\xfe\xff", "UTF-32BE"),
    (b"{\0\0\0", "UTF-32LE"),
    (b"\0\0\0{", "UTF-32BE"),
    (b"\xff\xfe", "UTF-16LE"),
    (b"\xfe\xff", "UTF-16BE"),
    (b"{\0", "UTF-16LE"),
    (b"\0{", "UTF-16BE"),
)
_CR_BETWEEN_ROWS = re.compile(rb"}[ \t]*\r\s*\{")
_EXTRA_DATA = "not JSON: Extra data"  # a whole object, then more
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD]")  # four times as fast as two substring searches
_BRACKET = re.compile(r"[\[\]{}]")

_HINT_ARRAY = "Write one object a line: jq -c '.[]' FILE > NEW.jsonl"
_HINT_PRETTY = "Write each object on one line: jq -c . FILE > NEW.jsonl"
_HINT_INCOMPLETE = "The copy seems cut off: copy the file again, or remove its last line"
_HINT_PACKED = "Compress and copy the file again; `gzip -t` or `zstd -t` tests it"


class JsonlReader:
    """The objects of one file, in order; made for one pass.

    Iterating gives (line, byte, object). A line that is no good gives (line, byte, BadFile) instead, because
    an iterator that raises cannot go on and the caller may want to. Trouble with the whole file is raised.
    `sha256`, `size_bytes`, `compression` and `notes` are complete after the last line.
    """

    def __init__(self, path: Path, *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self.sha256 = ""  # of the file's own bytes, still compressed
        self.size_bytes = 0  # decompressed
        self.compression = "none"
        self.notes: list[str] = []
        self._path = path
        self._max_line_bytes = max_line_bytes

    def __iter__(self) -> Iterator[tuple[int, int, dict[str, Any] | BadFile]]:
        with self._path.open("rb", buffering=0) as file:
            source = _Decompressed(file)
            yield from self._objects(io.BufferedReader(source, _READ_BYTES))
        self.sha256 = source.digest.hexdigest()
        self.compression = source.compression
        if self.compression != "none":
            self.notes.append(f"{self.compression} compressed")

    def _objects(self, stream: io.BufferedReader) -> Iterator[tuple[int, int, dict[str, Any] | BadFile]]:
        first = True
        for line, byte, raw in self._lines(stream):
            if raw.isspace():
                continue
            if first:
                _check_one_object_a_line(raw, line, byte)
            try:
                found: dict[str, Any] | BadFile = self._object(raw, first=first)
            except BadFile as problem:
                found = located(problem, line, byte)
            yield line, byte, found
            first = False

    def _object(self, raw: bytes, *, first: bool) -> dict[str, Any]:
        if self._goes_on(raw):
            raise self._too_long(raw)
        try:
            value = loads(_decode(raw))
        except BadFile as problem:
            raise _explained(problem, raw, first=first) from None
        if not isinstance(value, dict):
            raise BadFile("is not a JSON object", kind="json", extract=_shown(raw), hint=_HINT_ARRAY)
        return value

    def _lines(self, stream: io.BufferedReader) -> Iterator[tuple[int, int, bytes]]:
        """(line, byte, its bytes with the newline); of a line that is too long, only the beginning."""
        byte = 0
        for line in itertools.count(1):
            raw = stream.readline(self._max_line_bytes + 1)
            if not raw:
                break
            if line == 1:
                raw = self._without_mark(raw)
            if raw.endswith(b"\r\n"):
                self._note("lines end in CRLF")
            yield line, byte, raw
            byte += len(raw)
            if self._goes_on(raw):
                byte += _skip_line(stream)
        self.size_bytes = byte

    def _without_mark(self, raw: bytes) -> bytes:
        for start, encoding in _FOREIGN_STARTS:
            if raw.startswith(start):
                why = f"the file is {encoding}, not UTF-8"
                hint = f"Convert it: iconv -f {encoding} -t UTF-8 FILE > NEW.jsonl"
                raise BadFile(why, kind="encoding", line=1, byte=0, hint=hint)
        if not raw.startswith(_BOM):
            return raw
        self._note("starts with a UTF-8 byte order mark")
        # As many blanks, so that every byte keeps its number.
        return b" " * len(_BOM) + raw[len(_BOM) :]

    def _goes_on(self, raw: bytes) -> bool:
        return len(raw) > self._max_line_bytes and not raw.endswith(b"\n")

    def _too_long(self, raw: bytes) -> BadFile:
        if _CR_BETWEEN_ROWS.search(raw):
            return _cr_only()
        why = f"the line is longer than {self._max_line_bytes} bytes"
        return BadFile(why, kind="too_long", extract=_shown(raw), hint="Split the row into shorter ones")

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)


def _skip_line(stream: io.BufferedReader) -> int:
    skipped_bytes = 0
    while rest := stream.readline(_READ_BYTES):
        skipped_bytes += len(rest)
        if rest.endswith(b"\n"):
            break
    return skipped_bytes


def _check_one_object_a_line(raw: bytes, line: int, byte: int) -> None:
    """An array or an indented object is no JSONL file at all, whatever its later lines may look like."""
    start = raw[:EXTRACT_CHARACTERS].lstrip()
    if start.startswith(b"["):
        why = "the file is one JSON array, not one object a line"
        raise BadFile(why, kind="array", line=line, byte=byte, extract=_shown(raw), hint=_HINT_ARRAY)
    if start in (b"{\n", b"{\r\n"):
        why = "the file is indented JSON, not one object a line"
        raise BadFile(why, kind="pretty", line=line, byte=byte, extract=_shown(raw), hint=_HINT_PRETTY)


def _explained(problem: BadFile, raw: bytes, *, first: bool) -> BadFile:
    """The likelier cause behind text that is not JSON, where the line itself betrays one."""
    if problem.kind not in ("json", "encoding"):
        return problem
    if b"\0" in raw:
        byte = raw.index(b"\0")
        hint = "The file was not fully written, or is not text: write it again"
        return BadFile("a NUL byte", kind="nul", byte=byte, extract=_shown(raw[:byte]), hint=hint)
    if _CR_BETWEEN_ROWS.search(raw):
        return _cr_only()
    if _is_cut(problem, raw):
        why = f"the last line is not complete ({problem.why})"
        # The byte is where the line starts: cut there, the file is whole again.
        return BadFile(why, kind="incomplete", extract=problem.extract, hint=_HINT_INCOMPLETE)
    if first and raw.endswith(b"\n") and _stops_at_the_end(problem, raw):
        why = "the object goes on after the end of its line"
        return BadFile(why, kind="pretty", extract=problem.extract, hint=_HINT_PRETTY)
    return problem


def _is_cut(problem: BadFile, raw: bytes) -> bool:
    """The start of an object, with nothing after it: a copy that stopped, or a writer that died."""
    if raw.endswith(b"\n") or not raw.lstrip().startswith(b"{"):
        return False
    return problem.why != _EXTRA_DATA and (problem.kind == "json" or _stops_at_the_end(problem, raw))


def _stops_at_the_end(problem: BadFile, raw: bytes) -> bool:
    # A character of UTF-8 has up to four bytes, so one that is cut starts in the last three.
    last = 3 if problem.kind == "encoding" else 0
    return problem.byte is not None and problem.byte >= len(raw.rstrip()) - last


def _cr_only() -> BadFile:
    hint = "Convert it: tr '\\r' '\\n' < FILE > NEW.jsonl"
    return BadFile("lines end in CR only, not in LF", kind="line_ends", hint=hint)


def located(problem: BadFile, line: int, byte: int) -> BadFile:
    """The same refusal with its place in the file; until now its byte counted from the start of the line."""
    return BadFile(
        problem.why,
        kind=problem.kind,
        line=line,
        byte=byte + (problem.byte or 0),
        field=problem.field,
        extract=problem.extract,
        hint=problem.hint,
    )


# Text to values


def loads(text: str) -> Any:
    """One JSON value, strictly. A BadFile from here has no line; its byte counts from the start of `text`."""
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(text)
    try:
        value = _decode_json(text)
    except json.JSONDecodeError as error:
        # Of text that ends too early, the parser names the end of the blanks behind it: in a file, the next line.
        position = min(error.pos, len(text.rstrip(" \t\r\n")))
        byte = len(text[:position].encode())
        why = f"not JSON: {error.msg.removesuffix(' at')}"
        hint = "Write one complete JSON object a line, with a JSON library"
        raise BadFile(why, kind="json", byte=byte, extract=_around(text, position), hint=hint) from None
    if _SURROGATE.search(text):
        _check_surrogates(value)
    return value


def _check_depth(text: str) -> None:
    """Before parsing, because the parser answers depth with the stack."""
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        if depth > MAX_DEPTH:
            raise BadFile(f"nested deeper than {MAX_DEPTH}", kind="value", hint="Flatten the row")


def _check_surrogates(value: Any) -> None:
    """Half a character parses, but no tokenizer or file can take it. Joined pairs are gone after parsing."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        lone = f"\\u{ord(error.object[error.start]):04x}"
        hint = "Write the whole character, or U+FFFD in its place"
        raise BadFile(f"{lone} is half a character", kind="value", extract=lone, hint=hint) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # A hook costs a quarter of the parser's speed (330 of 440 MB/s are left); nothing else sees duplicates.
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _duplicate([key for key, _ in pairs])
    return found


def _duplicate(keys: list[str]) -> BadFile:
    twice = Counter(keys).most_common(1)[0][0][:EXTRACT_CHARACTERS]
    why = f"the key {json.dumps(twice)} appears twice in one object"
    return BadFile(why, kind="value", hint="Keep one of the two")


def _int64(digits: str) -> int:
    # The length first: int() refuses thousands of digits with an error of its own.
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise _unfit("the integer does not fit in 64 bits", digits)
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise _unfit("the number is too large", digits)
    return number


def _no_constant(name: str) -> NoReturn:
    raise _unfit(f"{name} is not JSON", name)


def _unfit(why: str, literal: str) -> BadFile:
    hint = "Write it as a string or null, or leave the column out"
    return BadFile(why, kind="value", extract=literal[:EXTRACT_CHARACTERS], hint=hint)


_decode_json = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_int64, parse_float=_finite, parse_constant=_no_constant
).decode


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = raw[error.start : error.start + 4].hex(" ")
        why = f"not UTF-8: {error.reason} ({bad})"
        hint = "Convert it to UTF-8, e.g. iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW.jsonl"
        shown = _shown(raw[max(0, error.start - EXTRACT_CHARACTERS // 2) :])
        raise BadFile(why, kind="encoding", byte=error.start, extract=shown, hint=hint) from None


def _around(text: str, position: int) -> str:
    start = max(0, min(position, len(text)) - EXTRACT_CHARACTERS // 2)
    return text[start : start + EXTRACT_CHARACTERS].strip()


def _shown(raw: bytes) -> str:
    return raw[: 4 * EXTRACT_CHARACTERS].decode("utf-8", "replace")[:EXTRACT_CHARACTERS].strip()


# Compression


class _Decoder(Protocol):
    """What zlib and zstandard have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class _Codec(NamedTuple):
    name: str
    decoder: Callable[[], _Decoder]
    error: type[Exception]


def _codec(start: bytes) -> _Codec | None:
    """By the first bytes: a name is only what someone called the file."""
    if start.startswith(b"\x1f\x8b"):
        return _Codec("gzip", lambda: zlib.decompressobj(wbits=31), zlib.error)
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        import zstandard

        return _Codec("zstd", lambda: zstandard.ZstdDecompressor().decompressobj(), zstandard.ZstdError)
    return None


class _Decompressed(io.RawIOBase):
    """The bytes of a file with its compression taken off; `digest` is of the bytes before that."""

    def __init__(self, file: io.FileIO) -> None:
        self.digest = hashlib.sha256()
        self.compression = "none"
        self._file = file
        self._chunks = self._decompressed()
        self._held = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._held:
            self._held = memoryview(next(self._chunks, b""))
        part = self._held[: len(buffer)]
        buffer[: len(part)] = part
        self._held = self._held[len(part) :]
        return len(part)

    def _decompressed(self) -> Iterator[bytes]:
        chunks = self._own_bytes()
        first = next(chunks, b"")
        chunks = itertools.chain([first] if first else [], chunks)
        codec = _codec(first)
        if codec is None:
            yield from chunks
        else:
            self.compression = codec.name
            yield from _decompress(chunks, codec)

    def _own_bytes(self) -> Iterator[bytes]:
        while chunk := self._file.read(_READ_BYTES):
            self.digest.update(chunk)
            yield chunk


def _decompress(chunks: Iterator[bytes], codec: _Codec) -> Iterator[bytes]:
    """All members or frames of the stream, one after the other, as gzip and zstd themselves read them."""
    decoder = codec.decoder()
    taken_bytes = given_bytes = 0
    for piece in _pieces(chunks):
        taken_bytes += len(piece)
        rest = piece
        while rest:
            decoder = codec.decoder() if decoder.eof else decoder
            try:
                out = decoder.decompress(rest)
            except codec.error as error:
                why = f"the {codec.name} stream is damaged: {error}"
                raise BadFile(why, kind="compression", hint=_HINT_PACKED) from None
            rest = decoder.unused_data
            given_bytes += len(out)
            _check_ratio(taken_bytes, given_bytes)
            if out:
                yield out
    if not decoder.eof:
        why = f"the {codec.name} stream stops before its end"
        raise BadFile(why, kind="incomplete", hint="The copy seems cut off: copy the file again")


def _pieces(chunks: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        for start in range(0, len(chunk), _PIECE_BYTES):
            yield chunk[start : start + _PIECE_BYTES]


def _check_ratio(taken_bytes: int, given_bytes: int) -> None:
    if given_bytes >= RATIO_FROM_BYTES and given_bytes > MAX_RATIO * taken_bytes:
        why = f"it decompresses to more than {MAX_RATIO} times its size"
        raise BadFile(why, kind="compression", hint="If that is right, drop the file uncompressed")
