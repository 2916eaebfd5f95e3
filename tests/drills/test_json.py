"""What is JSON and what is not, in the manner of JSONTestSuite; and files mutated in any way."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from longrun.errors import BadFile
from longrun.examine import examine
from tests.drills.campaign import FULL
from tests.lab import chat

FIRST = b'{"text": "a"}\n'

# Values that are JSON: each is read as what Python's parser makes of it. (y_ of JSONTestSuite, those on one line)
# fmt: off
YES = (
    *(b"[]", b"[[] ]", b'[""]', b"{}", b"[null]", b"[1,null,null,null,2]", b" [ 1 ] ", b"\t[1]\r", b"true", b"null"),
    *(b"-0", b"0", b"-1", b"123", b"20e1", b"0e1", b"0e+1", b"1E22", b"1E-2", b"1E+2", b"123e45", b"123.456e78"),
    *(b"123.456789", b"-0.000000000000000000000000001", b"1.5e-400", b"-9223372036854775808", b"9223372036854775807"),
    *(b'"\\u0060\\u012a\\u12AB"', b'"\\ud801\\udc37"', b'"\\ud83d\\ude39\\ud83d\\udc8d"'),
    b'"\\"\\\\\\/\\b\\f\\n\\r\\t"',
    *(b'"\\\\u0000"', b'"\\u0000"', b'"\\""', b'"a/*b*/c/*d//e"', b'"\\\\a"', b'"\\\\n"', b'"\\u0012"', b'"\\uFFFF"'),
    *(b'"asd"', b'"new\\u000Aline"', b'"\xf4\x8f\xbf\xbf"', b'"\xef\xbf\xbf"', b'"\\u0022"', b'"\\uD834\\uDd1e"'),
    *(b'"\xe2\x80\xa8\xe2\x80\xa9"', b'"\x7f"', b'"\xf0\x9b\xbf\xbf"', b'"\\u200B"', b'"\\u2064"', b'"\\uFDD0"'),
    b'" "',
    *(b'"\xe2\x8d\x82\xe3\x88\xb4"', b'{"asd":"sdf", "dfg":"fgh"}', b'{"":0}', b'{"foo\\u0000bar": 42}', b'{"a":[]}'),
    *(b'{ "min": -1.0e+28, "max": 1.0e+28 }', b'{"x":[{"id": "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}]}'),
    *(b"[" * 62 + b"]" * 62, b'{"a":' * 62 + b"1" + b"}" * 62, b"[" + b"[]," * 999 + b"[]]"),
)
# fmt: on
# Text that is no JSON, or not the same to all who read it. (n_, and of i_ what is refused on purpose)
# fmt: off
NO = (
    *(b"[1 true]", b"[a\xe5]", b'["": 1]', b'[""],', b"[,1]", b"[1,,2]", b'["x",,]', b'["x"]]', b'["",]', b'["x"'),
    b"[x",
    *(b"[3[4]]", b"[\xff]", b"[1:2]", b"[,]", b"[-]", b"[   , \"\"]", b'["a",4 ,1,', b"[1,]", b"[1,,]", b"[*]"),
    *(b'[""', b"[1"),
    *(b"[fals]", b"[nul]", b"[tru]", b"[++1234]", b"[+1]", b"[+Inf]", b"[-01]", b"[-1.0.]", b"[-2.]", b"[-NaN]"),
    b"[.-1]",
    *(b"[.2e-3]", b"[0.1.2]", b"[0.3e+]", b"[0.3e]", b"[0.e1]", b"[0E+]", b"[0E]", b"[1.0e+]", b"[1.0e-]", b"[1.0e]"),
    *(b"[1 000.0]", b"[1eE2]", b"[2.e+3]", b"[2.e-3]", b"[2.e3]", b"[9.e+]", b"[Inf]", b"[NaN]", b"[Infinity]"),
    b"[1+2]",
    *(b"[\xef\xbc\x91]", b"[0x1]", b"[0x42]", b"[0e+-1]", b"[-foo]", b"[- 1]", b"[-012]", b"[-.123]", b"[-1x]"),
    b"[1ea]",
    *(b"[1e\xe5]", b"[1.]", b"[.123]", b"[1.2a-3]", b"[1.8011670033376514H-308]", b"[012]", b"-Infinity", b"1e999"),
    *(b'["x", truth]', b"{[", b'{"x", null}', b'{"x"::"b"}', b"{\xf0\x9f\x87\xa8\xf0\x9f\x87\xad}"),
    *(b'{"a":"a" 123}', b"{key: 'v'}"),
    *(b'{"a" b}', b"{:\"b\"}", b'{"a" "b"}', b'{"a":', b'{"a"', b"{1:1}", b"{9999E9999:1}", b"{null:null}"),
    b'{"id":0,,,,,}',
    *(b"{'a':0}", b'{"id":0,}', b'{"a":"b"}/**/', b'{"a":"b"}/**//', b'{"a":"b"}//', b'{"a":"b",,"c":"d"}'),
    b'{a: "b"}',
    *(b'{"a":"a', b'{ "foo" : "bar", "a" }', b'{"a":"b"}#', b" ", b"", b'"\\uD800\\"', b'"\\uD800\\u"'),
    b'"\\uD800\\u1x"',
    *(b'"\\x00"', b'"\\\\\\"', b'"\\\xf0\x9f\x8c\x80"', b'"\\u00A"', b'"\\uD834\\uDd"', b'"\\uD800\\uD800\\x"'),
    b'"\\u\xe5"',
    *(b'"\\a"', b'"\\uqqqq"', b'"\\\xe5"', b"\\u0020\"asd\"", b'[\\n]', b"['single quote']", b"abc", b'"\\'),
    b'"a\x00a"',
    *(b'"new\x0bline"', b'"\t"', b'"\x1f"', b'"\\UA66D"', b"<.>", b"[<null>]", b"[1]x", b"[1]]", b"asd]"),
    *(b"\xc3\xa5", b"[True]"),
    *(b"1]", b'{"x": true,', b"[][]", b"]", b"{\"\":", b"\xe2\x81\xa0", b"\xef\xbb\xbf{}", b"[\"asd]", b"*"),
    *(b'{"a":"b"}#{}', b"[\x0c]"),
    *(b"[\\u000A\"\"]", b'{"a": true} "x"', b"\xef\xbb", b"[1 /* one */]", b"// none", b"0b1", b"1_000"),
    *(b"\xc2\xa01", b"undefined"),
    *(b'{"a":"b","a":"c"}', b'{"a":"b","a":"b"}', b'"\\ud800"', b'"\\uDADA"', b'"\\ud800a"', b'"\\uDd1e\\uD834"'),
    b'"\xed\xa0\x80"',
    *(b"100000000000000000000", b"-9223372036854775809", b"9" * 5000, b"-1e+9999", b'"\xe6\x97\xff"', b'"\xff"'),
    b'"\xc0\xaf"',
    *(b'"\xfc\x83\xbf\xbf\xbf\xbf"', b'"\x81"', b'"\xf4\xbf\xbf\xbf"', b'"\xe0\xff"', b"[" * 64 + b"]" * 64),
    b"[" * 50_000,
)
# fmt: on
CASES = [(True, value) for value in YES] + [(False, value) for value in NO]


def test_values_are_json_or_are_refused_with_line_and_byte(campaign, quick):
    path = quick / "x.jsonl"

    def attempt(case, dice):
        good, value = case
        path.write_bytes(FIRST + b'{"text": "a", "more": ' + value + b"}\n" + FIRST)
        if good:
            assert examine(path).rows == 3
            # As the text of a row the value is kept to the letter.
            path.write_bytes(FIRST + json.dumps({"text": value.decode()}).encode() + b"\n")
            assert examine(path).rows == 2
            return
        problem = refusal(path)
        assert problem.line == 2
        assert problem.hint
        if value.strip():  # nor is it a row
            path.write_bytes(FIRST + value + b"\n")
            assert refusal(path).line == 2

    campaign.run("12: what is not JSON is refused with line and byte", CASES, attempt, small=1000)


def refusal(path):
    try:
        examine(path)
    except BadFile as problem:
        assert path.read_bytes()[: problem.byte].count(b"\n") + 1 == problem.line, "its byte is in another line"
        return problem
    raise AssertionError("it was accepted")


MUTATIONS, AT_ONCE = 200_000, 100
MAX_LINE_BYTES = 5_000
GROWTH_BYTES = 64 << 20  # of a packed file 32 MiB can come at once (jsonl._PIECE_BYTES)
MOST_BYTES = 1 << 20  # of a mutated file
ROWS = (
    chat("Wie heißt du?", 'Longrun \U0001f600 \\ " \n'),
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"text": "any text\u2028 of more lines\r\n", "n": [1, -2.5e3, None, True, {"a": {"b": []}}]},
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {"instruction": "Translate", "input": "Hallo", "output": "Hello", "system": "be kind"},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}]},
)
PACKERS = (bytes, gzip.compress, zstandard.ZstdCompressor().compress)
# fmt: off
TOKENS = (
    *(b"{", b"}", b"[", b"]", b'"', b",", b":", b"\\", b"\\u", b"\\ud800", b"\n", b"\r", b"\0", b"\xff"),
    b"\xef\xbb\xbf",
    *(b"NaN", b"-", b"1e999", b"9" * 25, b"null", b'"text": 1', b'"messages": []', b"[" * 70, b'"content"'),
    b"\x1f\x8b",
    *(b"\x28\xb5\x2f\xfd", b"\xff\xfe", b'"weight": 0', b'"images": [1]', b"x" * MAX_LINE_BYTES),
)
# fmt: on


def seeds():
    found = []
    for row in ROWS:
        for ascii_only in (True, False):
            line = json.dumps(row, ensure_ascii=ascii_only).encode() + b"\n"
            found += [pack(line * count) for pack in PACKERS for count in (1, 5)]
    return found


def mutated(content, others, dice):
    found = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        at, to = sorted((dice.randrange(len(found) + 1), dice.randrange(len(found) + 1)))
        match dice.randrange(7):
            case 0 if at < len(found):
                found[at] ^= 1 << dice.randrange(8)
            case 1:
                del found[at : dice.choice((to, at + 1))]
            case 2:
                times = dice.choice((1, 2, 50)) if to - at < MOST_BYTES // 50 else 1
                found[at:at] = found[at:to] * times
            case 3:
                other = dice.choice(others)
                found[at:to] = other[dice.randrange(len(other)) :]
            case 4:
                found[at:at] = dice.choice(TOKENS)
            case 5:
                del found[to:]
            case _:
                found[at:to] = dice.randbytes(min(to - at, 20))
        del found[MOST_BYTES:]
    return bytes(found)


def test_a_mutated_file_is_read_or_refused_and_nothing_else(campaign, quick):
    path, grown = quick / "x.jsonl", seeds()

    def attempt(_, dice):
        before = forget_peak()
        for _ in range(AT_ONCE):
            content = mutated(dice.choice(grown), grown, dice)
            if dice.random() < 0.3:  # what was mutated is packed, so that it is more than a broken stream
                content = dice.choice(PACKERS)(content)
            campaign.note("mutations")
            path.write_bytes(content)
            try:
                found = examine(path, on_bad_row=dice.choice(("reject", "skip")), max_line_bytes=MAX_LINE_BYTES)
            except BadFile as problem:
                assert problem.why
                assert json.dumps(problem.reason())
                campaign.note("refused")
            else:
                assert found.rows
        assert peak_bytes() - before < GROWTH_BYTES

    cases = range(MUTATIONS // AT_ONCE)
    campaign.run("12: a mutated file is read or refused, in little memory", cases, attempt, small=3)


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_an_endless_line_is_refused_in_little_memory(quick, packed):
    """In full of a gigabyte, whether or not it is packed."""
    path = quick / f"x.jsonl{packed}"
    opened = {"": open, ".gz": gzip.open, ".zst": zstandard.open}[packed]
    with opened(path, "wb") as file:
        file.write(b'{"text": "')
        for _ in range(1024 if FULL else 160):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n')
    before = forget_peak()
    with pytest.raises(BadFile) as problem:
        examine(path, on_bad_row="reject", max_line_bytes=MAX_LINE_BYTES)
    reason = problem.value.reason()
    assert (reason["kind"], reason.get("line")) == ("too_long", 1) or (packed and reason["kind"] == "compression")
    assert peak_bytes() - before < GROWTH_BYTES


def forget_peak():
    """What is resident now, from where the peak is counted anew (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def peak_bytes():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024
