"""The rows of a plan as the Trainer takes them: each step's rows and no others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset as Arrow
from torch.utils.data import Dataset

from longrun import disk
from longrun.errors import LongrunError
from longrun.home import ROWS
from longrun.training.loss import where_trained
from longrun.training.masks import IGNORED

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

Sample = dict[str, Any]  # input_ids, labels: integers, shape (tokens,); row: int


NO_ROW = -1
NOTHING = np.zeros(1, dtype=np.int32)


class DamagedRows(LongrunError):
    """The prepared rows are not what was prepared; their file still is, and can be prepared again."""


class PlannedRows(Dataset[Sample]):
    """Prepared rows, picked by `order`. Maps the file into memory; reads a row when it is asked for.

    Where the order says NO_ROW stands a row in which nothing is trained: it fills the last step up so that every
    process has a share of it, and no row is trained twice.
    """

    def __init__(self, prepared: Path, order: NDArray[np.int64]) -> None:
        """DamagedRows when they are not there, or fewer than the order asks for."""
        try:
            table = Arrow.from_file(str(prepared / ROWS)).data
        except (OSError, pa.ArrowInvalid) as error:
            if getattr(error, "errno", None) in disk.NO_FILES_FAULT:
                raise
            raise DamagedRows(f"{prepared / ROWS} cannot be read: {error}") from error
        if table.num_rows <= order.max(initial=NO_ROW):
            raise DamagedRows(f"{prepared / ROWS} has {table.num_rows} rows, and row {order.max()} is planned")
        self._input_ids, self._labels, self._rows = (table.column(name) for name in ("input_ids", "labels", "row"))
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Sample:
        at = int(self._order[index])
        if at == NO_ROW:
            return {"input_ids": NOTHING, "labels": NOTHING + IGNORED, "row": NO_ROW}
        return {
            "input_ids": self._input_ids[at].values.to_numpy(),
            "labels": self._labels[at].values.to_numpy(),
            "row": self._rows[at].as_py(),
        }

    def sort_steps(self, batch_size: int) -> None:
        """Put the longest first within each step of `batch_size` rows.

        Micro-batches then have rows of similar length, and little is padded. Which rows a step trains stays as it was.
        """
        tokens = pc.list_value_length(self._input_ids).to_numpy()
        length = np.where(self._order == NO_ROW, 0, tokens[self._order])
        step = np.arange(len(self._order)) // batch_size
        self._order = self._order[np.lexsort((-length, step))]


def filled_up(order: NDArray[np.int64], batch_size: int) -> NDArray[np.int64]:
    """The order with NO_ROW added to a multiple of the batch."""
    return np.pad(order, (0, -len(order) % batch_size), constant_values=NO_ROW)


class Collator:
    """Pads to the longest row of a batch. No randomness: a resumed run must build the same batches.

    `rows` stays a list of row numbers (from 0), so that no copy to a device is needed to account for them.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id
        self.only_trained = False  # ask for logits only where a row of the batch has a token to train

    def __call__(self, samples: list[Sample]) -> dict[str, Any]:
        lengths = np.array([len(sample["input_ids"]) for sample in samples])
        batch: dict[str, Any] = {
            "input_ids": _padded(samples, "input_ids", lengths.max(), self._pad),
            "labels": _padded(samples, "labels", lengths.max(), IGNORED),
            "attention_mask": torch.from_numpy((np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)),
        }
        if self.only_trained:
            batch |= where_trained(batch["labels"])
        return {**batch, "rows": [sample["row"] for sample in samples if sample["row"] != NO_ROW]}


def _padded(samples: list[Sample], key: str, longest: int, filler: int) -> torch.Tensor:
    block = np.full((len(samples), longest), filler, dtype=np.int64)
    for line, sample in zip(block, samples, strict=True):
        line[: len(sample[key])] = sample[key]
    return torch.from_numpy(block)
