"""What a step is made of: its rows, together with those of their length."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from longrun.home import ROWS
from longrun.training import data, prepare
from longrun.training.data import NO_ROW, Collator, DamagedRows, PlannedRows, filled_up
from longrun.training.run import Options


@pytest.fixture
def lengths(tmp_path):
    """Tokens of each row of a prepared file at tmp_path."""
    lengths = np.random.default_rng(1).integers(2, 60, size=1000)
    rows = ([int(at)] * int(length) for at, length in enumerate(lengths))
    prepare._write(tmp_path / ROWS, ((row, row, at) for at, row in enumerate(rows)))
    return lengths


def test_a_last_step_is_filled_up_with_rows_that_train_nothing(tmp_path, lengths):
    order = filled_up(np.arange(10, 21), 4)
    assert order.tolist() == [*range(10, 21), NO_ROW]
    assert set(PlannedRows(tmp_path, order)[11]["labels"].tolist()) == {-100}


@pytest.mark.parametrize(("number", "is_theirs"), [(errno.EMFILE, False), (errno.EIO, True)])
def test_rows_that_cannot_be_read_are_damaged_unless_no_file_can_be(tmp_path, lengths, monkeypatch, number, is_theirs):
    def refused(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(data.Arrow, "from_file", refused)
    with pytest.raises(DamagedRows if is_theirs else OSError):
        PlannedRows(tmp_path, np.arange(3))


def test_sorted_steps_train_the_same_rows_and_pad_less(tmp_path, lengths):
    order = filled_up(np.random.default_rng(2).permutation(len(lengths))[:-3], 16)
    planned, rows = PlannedRows(tmp_path, order), PlannedRows(tmp_path, order)
    rows.sort_steps(16)
    padded = {"as planned": 0, "sorted": 0}
    for step in range(len(order) // 16):
        slices = [[each[at] for at in range(step * 16, (step + 1) * 16)] for each in (planned, rows)]
        assert sorted(s["row"] for s in slices[0]) == sorted(s["row"] for s in slices[1])
        for name, samples in zip(padded, slices, strict=True):
            padded[name] += sum(Collator(0)(samples[at : at + 4])["input_ids"].numel() for at in range(0, 16, 4))
    assert padded["sorted"] < 1.2 * lengths.sum() < 1.5 * lengths.sum() < padded["as planned"]


def test_a_row_that_fills_up_trains_nothing_and_is_not_accounted_for(tmp_path, lengths):
    rows = PlannedRows(tmp_path, np.array([3, NO_ROW]))
    batch = Collator(9)([rows[0], rows[1]])
    assert batch["rows"] == [3]
    assert (batch["labels"][1] == -100).all()
    assert batch["input_ids"].tolist()[0] == [3] * lengths[3]
    assert batch["attention_mask"].sum(dim=1).tolist() == [lengths[3], 1]


@pytest.mark.parametrize(
    ("row_tokens", "most", "batch_size", "processes", "found"),
    [
        (600, 8, 8, 1, 1),
        (200.5, 8, 8, 1, 2),
        (90, 8, 8, 1, 4),  # three would not do: they do not divide the batch
        (10, 8, 8, 1, 8),
        (10, 2, 8, 1, 2),  # learnt from an out of memory
        (200, 4, 8, 2, 2),
        (200, 7, 7, 1, 7),
    ],
)
def test_a_micro_batch_on_a_cpu_has_256_tokens_where_the_batch_allows(row_tokens, most, batch_size, processes, found):
    options = Options(
        per_device=most,
        batch_size=batch_size,
        dtype="auto",
        attn_implementation="auto",
        trust_remote_code=False,
        gradient_checkpointing=False,
        optim="adamw_torch",
        report_to=(),
        processes=processes,
        may_be_fewer=True,
    )
    assert options.rows_on_a_cpu(row_tokens) == found
