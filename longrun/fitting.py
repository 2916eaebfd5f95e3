"""How many rows a device takes at once: as set, or as few as an out of memory has taught.

Whatever the answer, a step trains exactly batch_size rows, shared evenly by all processes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from longrun.errors import BadModel
from longrun.wording import counted

if TYPE_CHECKING:
    from longrun.context import Context

LEARNT = "rows that fit a device"  # the ledger's fact: {situation: rows}


def rows_at_once(context: Context, batch_size: int) -> int:
    settings = context.settings
    wanted = settings.train.per_device_train_batch_size or batch_size
    limit = min(wanted, int(_learnt(context).get(_situation(context, batch_size), wanted)))
    return _even_share(batch_size, settings.worker.processes, limit)


def make_smaller(context: Context, batch_size: int, tried: int, attempts: int) -> None:
    """Half as many rows at once as were tried, and one before the last attempt; remembered over restarts."""
    if tried == 1:
        return
    last = attempts + 1 >= context.settings.worker.max_attempts
    limit = 1 if last else max(1, tried // 2)
    rows = _even_share(batch_size, context.settings.worker.processes, limit)
    context.ledger.set_fact(LEARNT, json.dumps(_learnt(context) | {_situation(context, batch_size): rows}))
    context.say(
        "smaller batches",
        f"from now on {counted(rows, 'row')} at once on a device; a step still trains {batch_size} rows",
        level="warning",
    )


def _learnt(context: Context) -> dict[str, int]:
    learnt: dict[str, int] = json.loads(context.ledger.fact(LEARNT) or "{}")
    return learnt


def _situation(context: Context, batch_size: int) -> str:
    """What the lesson holds for; in another situation more may fit.

    Whoever changes one of these may do so because of the lesson.
    """
    model, train = context.settings.model, context.settings.train
    besides = (
        model.dtype,
        model.attn_implementation,
        train.optim,
        train.gradient_checkpointing,
        train.per_device_train_batch_size,
        context.settings.worker.processes,
    )
    return f"{batch_size} x {train.max_length} tokens, {model.base_model}, {' '.join(map(str, besides))}"


def _even_share(batch_size: int, processes: int, limit: int) -> int:
    """The most rows at once, at most `limit`, with which every process trains the same number of a step's rows."""
    shares = [rows for rows in range(1, limit + 1) if batch_size % (rows * processes) == 0]
    if not shares:
        raise BadModel(
            f"worker.processes = {processes} cannot share the batch of {batch_size} rows of the file that was begun",
            hint="set worker.processes to a divisor until that file is trained",
        )
    return shares[-1]
