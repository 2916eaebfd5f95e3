"""From the bytes of a file in each format to exactly the tokens that are trained."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest
import zstandard
from datasets import Dataset

from longrun import wire
from longrun.errors import BadFile
from longrun.examine import examine
from longrun.home import ROWS
from longrun.rows import CompletionRow
from longrun.training.base_model import load_tokenizer
from longrun.training.masks import IGNORED, Encoder
from longrun.training.prepare import prepare

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}

FORMATS = {
    "messages": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Färbe es?"},
                {"role": "assistant", "content": "Grün."},
                {"role": "user", "content": "And now?"},
                {"role": "assistant", "content": "漢字."},
            ]
        },
        ["Grün.<|im_end|>", "漢字.<|im_end|>"],
    ),
    "messages with tools": (
        {
            "tools": TOOLS,
            "messages": [
                {"role": "user", "content": "Weather in Oslo?"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "rain"},
                {"role": "assistant", "content": "It rains."},
            ],
        },
        ['<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call><|im_end|>', "It rains.<|im_end|>"],
    ),
    "prompt and completion": ({"prompt": "2+2=", "completion": "4"}, ["4<|im_end|>"]),
    "prompt and completion as messages": (
        {
            "prompt": [
                {"role": "user", "content": "One?"},
                {"role": "assistant", "content": "not trained"},
                {"role": "user", "content": "Two?"},
            ],
            "completion": [{"role": "assistant", "content": "trained"}],
        },
        ["trained<|im_end|>"],
    ),
    "text": ({"text": "All of it."}, ["All of it.<|im_end|>"]),
    "conversations": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        ["Hello.<|im_end|>"],
    ),
    "instruction": (
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        ["3<|im_end|>"],
    ),
}
PACKINGS = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstandard.ZstdCompressor().compress}


def prepared(tmp_path, name, content):
    """The tokens and labels of the file's only row, and the tokenizer."""
    (row,), tokenizer = prepared_rows(tmp_path, name, content)
    return row, tokenizer


def prepared_rows(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    tokenizer = load_tokenizer("tiny", trust_remote_code=False)
    task = task_of(path, tmp_path / "job" / "prepared")
    (tmp_path / "job").mkdir()
    facts = prepare(task, Encoder(tokenizer, max_length=1024), lambda _: None)
    rows = Dataset.from_file(str(tmp_path / "job" / "prepared" / ROWS))
    assert facts["trainable_rows"] == len(rows)
    return rows, tokenizer


def task_of(path, folder):
    found = examine(path)
    return wire.Prepare(
        job=1,
        path=str(path),
        sha256=found.sha256,
        format=found.format.value,
        on_bad_row="reject",
        max_line_bytes=1 << 20,
        max_length=1024,
        folder=str(folder),
        rows=found.rows,
        base_model="tiny",
        tokenizer="tiny",
        trust_remote_code=False,
    )


def test_a_file_of_which_other_rows_are_good_by_now_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "short"}\n{"text": "' + "longer " * 20 + '"}\n')
    task = replace(task_of(path, tmp_path / "job" / "prepared"), on_bad_row="skip", max_line_bytes=60)
    (tmp_path / "job").mkdir()
    with pytest.raises(BadFile, match="had 2 good rows when it was examined, and now 1: max_line_bytes has changed"):
        prepare(task, Encoder(load_tokenizer("tiny", trust_remote_code=False), max_length=1024), lambda _: None)
    assert not (tmp_path / "job" / "prepared").exists()


def trained_parts(row, tokenizer):
    """The text of each run of trained tokens."""
    parts, run = [], []
    for token, label in zip([*row["input_ids"], 0], [*row["labels"], IGNORED], strict=True):
        if label != IGNORED:
            assert label == token
            run.append(token)
        elif run:
            parts.append(tokenizer.decode(run))
            run = []
    return parts


@pytest.mark.parametrize("name", FORMATS)
def test_exactly_the_answers_are_trained(tmp_path, name):
    row, expected = FORMATS[name]
    found, tokenizer = prepared(tmp_path, "a.jsonl", (json.dumps(row) + "\n").encode())
    assert trained_parts(found, tokenizer) == expected


def test_each_file_is_told_how_it_was_masked_by_what_it_holds_itself(tmp_path):
    encoder = Encoder(load_tokenizer("tiny", trust_remote_code=False), max_length=1024)
    told = {}
    for name in ("text", "messages", "text again"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(FORMATS[name.partition(" ")[0]][0]) + "\n")
        (tmp_path / name).mkdir()
        told[name] = prepare(task_of(path, tmp_path / name / "prepared"), encoder, lambda _: None)["mask_source"]
    assert told["text"] == told["text again"] == ""
    assert told["messages"] == encoder.mask_source


@pytest.mark.parametrize("ending", PACKINGS)
def test_a_packed_file_is_trained_as_a_plain_one(tmp_path, ending):
    row, expected = FORMATS["messages"]
    found, tokenizer = prepared(tmp_path, f"a{ending}", PACKINGS[ending]((json.dumps(row) + "\n").encode()))
    assert trained_parts(found, tokenizer) == expected


def test_tools_reach_the_model(tmp_path):
    row, _ = FORMATS["messages with tools"]
    found, tokenizer = prepared(tmp_path, "a.jsonl", (json.dumps(row) + "\n").encode())
    assert '"name": "weather"' in tokenizer.decode(found["input_ids"]).split("Weather in Oslo?")[0]


@pytest.mark.parametrize(("rows", "characters"), [(1, 1), (7, 10_000), (8, 10_000), (512, 150), (512, 1 << 20)])
def test_every_row_is_prepared_as_if_it_were_alone(tmp_path, monkeypatch, rows, characters):
    monkeypatch.setattr("longrun.training.prepare.ROWS_A_BATCH", rows)
    monkeypatch.setattr("longrun.training.prepare.CHARACTERS_A_BATCH", characters)
    told = [{"prompt": f"{number}: ", "completion": "x" * (number * 37 % 100 + 1)} for number in range(16)]
    found, tokenizer = prepared_rows(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in told).encode())
    assert found["row"] == list(range(16))
    encoder = Encoder(tokenizer, max_length=1024)
    alone = [encoder.encode(CompletionRow(**row)) for row in told]
    assert [(row["input_ids"], row["labels"]) for row in found] == [(row.input_ids, row.labels) for row in alone]
