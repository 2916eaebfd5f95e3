"""The rows of a plan as the Trainer takes them, in the plan's order and no other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset as Arrow
from torch.utils.data import Dataset

from longrun.home import ROWS
from longrun.training.masks import IGNORED

if TYPE_CHECKING:
    from numpy.typing import NDArray

Sample = dict[str, Any]  # input_ids, labels: lists of int; row: int


NO_ROW = -1


class PlannedRows(Dataset[Sample]):
    """Prepared rows, picked by `order`. Maps the file into memory; reads a row when it is asked for.

    Where the order says NO_ROW stands a row in which nothing is trained: it fills the last step up so that every
    process has a share of it, and no row is trained twice.
    """

    def __init__(self, prepared: Path, order: NDArray[np.int64]) -> None:
        self._rows = Arrow.from_file(str(prepared / ROWS))
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Sample:
        row = int(self._order[index])
        sample: Sample = self._rows[row] if row != NO_ROW else {"input_ids": [0], "labels": [IGNORED], "row": NO_ROW}
        return sample


def filled_up(order: NDArray[np.int64], batch_size: int) -> NDArray[np.int64]:
    """The order with NO_ROW added to a multiple of the batch."""
    return np.pad(order, (0, -len(order) % batch_size), constant_values=NO_ROW)


class Collator:
    """Pads to the longest row of a batch. No randomness: a resumed run must build the same batches.

    `rows` stays a list of row numbers (from 0), so that no copy to a device is needed to account for them.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id

    def __call__(self, samples: list[Sample]) -> dict[str, Any]:
        longest = max(len(sample["input_ids"]) for sample in samples)
        return {
            "input_ids": self._padded(samples, "input_ids", longest, self._pad),
            "labels": self._padded(samples, "labels", longest, IGNORED),
            "attention_mask": torch.tensor(
                [[1] * len(s["input_ids"]) + [0] * (longest - len(s["input_ids"])) for s in samples]
            ),
            "rows": [sample["row"] for sample in samples if sample["row"] != NO_ROW],
        }

    def _padded(self, samples: list[Sample], key: str, longest: int, filler: int) -> torch.Tensor:
        return torch.tensor([s[key] + [filler] * (longest - len(s[key])) for s in samples])
