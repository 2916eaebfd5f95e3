"""How many rows a device takes at once: as set, or as few as an out of memory has taught.

Whatever the answer, a step trains exactly batch_size rows, shared evenly by all processes.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longrun.errors import CannotTrain
from longrun.wording import counted

if TYPE_CHECKING:
    from longrun.context import Context
    from longrun.plan import Recipe

LEARNT = "rows that fit a device"  # the ledger's fact: {situation: (rows, seconds since the epoch)}
FORGOTTEN_S = 86_400.0  # perhaps somebody else had taken the memory: to try again costs a start of the worker a day


def rows_at_once(context: Context, recipe: Recipe) -> int:
    settings = context.settings
    wanted = settings.train.per_device_train_batch_size or recipe.batch_size
    learnt, _ = _learnt(context).get(situation(context, recipe).words, (wanted, 0))
    return _even_share(recipe.batch_size, settings.worker.processes, min(wanted, learnt))


@dataclass(frozen=True)
class Situation:
    """What takes memory. A run is judged by that in which it began: while it goes on, settings may become others."""

    words: str
    batch_size: int
    processes: int


def make_smaller(context: Context, situation: Situation, tried: int) -> bool:
    """Half as many rows at once as were tried, remembered over restarts; False when it was one."""
    if tried <= 1:  # 0 before the model was there
        return False
    rows = _even_share(situation.batch_size, situation.processes, tried // 2)
    context.ledger.set_fact(LEARNT, json.dumps(_learnt(context) | {situation.words: (rows, time.time())}))
    context.say(
        "smaller batches",
        f"for a day {counted(rows, 'row')} at once on a device, then more are tried again;"
        f" a step still trains {situation.batch_size} rows",
        level="warning",
    )
    return True


def forget(context: Context, situation: Situation) -> None:
    """Take the lesson back: where one row did not fit, the file was to blame, and the next ones are not held to it."""
    learnt = _learnt(context)
    learnt.pop(situation.words, None)
    context.ledger.set_fact(LEARNT, json.dumps(learnt))


def _learnt(context: Context) -> dict[str, tuple[int, float]]:
    """What was learnt lately; a clock that was ahead is no reason to remember for longer."""
    learnt: dict[str, tuple[int, float]] = json.loads(context.ledger.fact(LEARNT) or "{}")
    return {what: lesson for what, lesson in learnt.items() if abs(time.time() - lesson[1]) < FORGOTTEN_S}


def situation(context: Context, recipe: Recipe) -> Situation:
    """What a lesson holds for: in another situation more may fit.

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
    words = f"{recipe.batch_size} x {recipe.max_length} tokens, {model.base_model}, {' '.join(map(str, besides))}"
    return Situation(words, recipe.batch_size, context.settings.worker.processes)


def _even_share(batch_size: int, processes: int, limit: int) -> int:
    """The most rows at once, at most `limit`, with which every process trains the same number of a step's rows."""
    shares = [rows for rows in range(1, limit + 1) if batch_size % (rows * processes) == 0]
    if not shares:
        raise CannotTrain(
            f"worker.processes = {processes} cannot share the batch of {batch_size} rows of the file that was begun",
            hint=f"set worker.processes to a divisor of {batch_size} until that file is trained",
        )
    return shares[-1]
