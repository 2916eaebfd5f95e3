"""From a claimed file to tokens on disk: read strictly again, apply the template, mask, tokenise.

Rows go to an Arrow stream that the trainer maps into memory, so a file's size never becomes memory. The
folder is complete or absent, and its facts say which bytes and which settings the tokens came from.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from longrun import disk
from longrun.errors import BadFile
from longrun.examine import RowReader
from longrun.home import FACTS, ROWS
from longrun.rows import ChatRow, Row, RowFormat
from longrun.training.masks import Encoder
from longrun.wording import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from concurrent.futures import Future

    from longrun import wire
    from longrun.training.masks import Draft, Encoded

T = TypeVar("T")

ROWS_A_BATCH = 256
CHARACTERS_A_BATCH = 1 << 20  # one row more, at most, so that long rows do not become memory
ROWS_WRITTEN_AT_ONCE = 512
MOST_THREADS = 4  # a third of the work is Python's, which does one thing at a time
SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "row": pa.int64(),  # number in the file, from 0, of the rows that were accepted
    }
)


@dataclass
class Tally:
    rows: int = 0
    trainable_rows: int = 0
    truncated_rows: int = 0
    untrainable_rows: int = 0  # no token to learn from is left: not trained, and said so
    untrainable_first: int | None = None  # its row number, from 1
    refused_rows: int = 0  # by the chat template, and left out as on_bad_row says
    refused_first: str = ""  # its row, and why
    rendered_rows: int = 0  # by the chat template
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    highest_token: int = 0

    def refuse(self, problem: BadFile) -> None:
        self.rows += 1
        self.refused_rows += 1
        self.refused_first = self.refused_first or f"{problem.field}: {problem.why}"

    def count(self, number: int, encoded: Encoded) -> bool:
        """Book one row; whether it is trained."""
        self.rows += 1
        self.truncated_rows += encoded.truncated
        if not encoded.trained_tokens:
            self.untrainable_rows += 1
            self.untrainable_first = self.untrainable_first or number + 1
            return False
        self.trainable_rows += 1
        self.tokens += len(encoded.input_ids)
        self.trained_tokens += encoded.trained_tokens
        self.longest = max(self.longest, len(encoded.input_ids))
        self.highest_token = max(self.highest_token, max(encoded.input_ids))
        return True


def prepare(task: wire.Prepare, encoder: Encoder, alive: Callable[[str], None]) -> dict[str, Any]:
    """Write the prepared rows of the task's file; the facts about them, as they are written beside them.

    BadFile when a row cannot be masked exactly (and bad rows are not skipped), or when the bytes are no longer those
    that were examined.
    """
    folder = Path(task.folder)
    fresh = folder.with_name("preparing")
    for remains in (fresh, folder):
        disk.remove_tree(remains, folder.parent)
    fresh.mkdir()
    tally = Tally()
    reader = RowReader(
        Path(task.path),
        RowFormat(task.format),
        on_bad_row=task.on_bad_row,
        max_line_bytes=task.max_line_bytes,
    )
    _write(fresh / ROWS, _encoded(reader, encoder, tally, task.on_bad_row, alive))
    if reader.sha256 != task.sha256:
        raise BadFile("its bytes changed after it was claimed", kind="changed", hint="drop the file again")
    if reader.rows != task.rows:
        raise BadFile(
            f"it had {counted(task.rows, 'good row')} when it was examined, and now {reader.rows}: max_line_bytes has"
            " changed since",
            kind="changed",
            hint="take the change back, or drop the file again to train what is good by it",
        )
    facts = {
        "sha256": task.sha256,
        "max_length": task.max_length,
        "cut_at": encoder.max_length,
        "base_model": task.base_model,
        "base_files": task.base_files,
        "on_bad_row": task.on_bad_row,
        **vars(tally),
        "mask_source": encoder.mask_source if tally.rendered_rows else "",
    }
    (fresh / FACTS).write_text(json.dumps(facts), encoding="utf-8")
    disk.sync_tree(fresh)
    disk.rename(fresh, folder)
    return facts


def count(path: Path, row_format: RowFormat, on_bad_row: str, max_line_bytes: int, encoder: Encoder) -> Tally:
    """What preparing the file would find, without writing anything."""
    tally = Tally()
    reader = RowReader(path, row_format, on_bad_row=on_bad_row, max_line_bytes=max_line_bytes)
    deque(_encoded(reader, encoder, tally, on_bad_row, lambda _: None), maxlen=0)
    return tally


def _encoded(
    reader: RowReader, encoder: Encoder, tally: Tally, on_bad_row: str, alive: Callable[[str], None]
) -> Iterator[tuple[list[int], list[int], int]]:
    """Input ids, labels and number of each row that is trained.

    Batches are tokenised side by side, which takes little Python, while others are read and written out.
    """
    threads = min(os.cpu_count() or 1, MOST_THREADS) if encoder.takes_threads else 1
    told = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        batches = _batches(reader, encoder, tally, on_bad_row)
        asked = (pool.submit(_tokenise, encoder, batch) for batch in batches)
        for encoded in _asked_ahead(asked, threads):
            for number, row in encoded:
                if tally.count(number, row):
                    yield row.input_ids, row.labels, number
            if time.monotonic() - told > 1:
                told = time.monotonic()
                alive(f"{number + 1} rows tokenised")


def _batches(reader: RowReader, encoder: Encoder, tally: Tally, on_bad_row: str) -> Iterator[list[tuple[int, Draft]]]:
    """Rows as text, a batch at a time; the last one is not full."""
    batch: list[tuple[int, Draft]] = []
    characters = 0
    for number, row in reader:
        tally.rendered_rows += isinstance(row, ChatRow)
        try:
            batch.append((number, _draft(encoder, number, row)))
        except BadFile as problem:
            if on_bad_row != "skip":
                raise
            tally.refuse(problem)
            continue
        characters += sum(map(len, batch[-1][1].texts))
        if len(batch) == ROWS_A_BATCH or characters > CHARACTERS_A_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _draft(encoder: Encoder, number: int, row: Row) -> Draft:
    try:
        return encoder.draft(row)
    except BadFile as error:
        field = f"row {number + 1}" + (f", {error.field}" if error.field else "")
        kind = "template" if isinstance(row, ChatRow) else error.kind
        raise BadFile(error.why, kind=kind, field=field, extract=error.extract, hint=error.hint) from None


def _tokenise(encoder: Encoder, batch: list[tuple[int, Draft]]) -> list[tuple[int, Encoded]]:
    numbers, drafts = zip(*batch, strict=True)
    return list(zip(numbers, encoder.tokenise(drafts), strict=True))


def _asked_ahead(results: Iterable[Future[T]], many: int) -> Iterator[T]:
    """Each result in its turn, when so many more have been asked for."""
    waiting: deque[Future[T]] = deque()
    for result in results:
        waiting.append(result)
        if len(waiting) > many:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _write(path: Path, rows: Iterator[tuple[list[int], list[int], int]]) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as stream:
        batch: list[tuple[list[int], list[int], int]] = []
        for row in rows:
            batch.append(row)
            if len(batch) == ROWS_WRITTEN_AT_ONCE:
                stream.write_batch(_to_batch(batch))
                batch.clear()
        if batch:
            stream.write_batch(_to_batch(batch))


def _to_batch(rows: list[tuple[list[int], list[int], int]]) -> pa.RecordBatch:
    input_ids, labels, numbers = zip(*rows, strict=True)
    return pa.record_batch([_lists(input_ids), _lists(labels), pa.array(numbers, pa.int64())], schema=SCHEMA)


def _lists(rows: Sequence[list[int]]) -> pa.ListArray:
    """What pa.array makes of them, in half the time: it asks each number anew what it is."""
    values = array("i")
    for row in rows:
        values.fromlist(row)
    offsets = pa.array(accumulate(map(len, rows), initial=0), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(np.frombuffer(values, np.int32)))
