"""`train.py --plan`: what a file would be trained for, without touching anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longrun import by_hand, checkpoint, config, disk, status
from longrun.errors import BadFile, ExitCode
from longrun.examine import examine
from longrun.plan import make_plan
from longrun.training.base_model import load_tokenizer
from longrun.training.masks import Encoder
from longrun.training.prepare import count
from longrun.wording import counted

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from longrun.home import Home
    from longrun.lineage import InProgress


def say_plan(home: Home, files: list[Path], flags: Mapping[str, Any]) -> int:
    """Print the plan of each file, each on top of the one before; FAILURE if one would be rejected."""
    settings = config.load(home.settings, flags=flags)
    newest = _newest(home)
    if newest is not None:
        config.check_model(settings, newest.lineage, home.root)
    before = status.before(home)
    begun = newest.lineage.in_progress if newest and (before.begun or newest.lineage.is_foreign(home.id)) else None
    step = before.step
    tokenizer = load_tokenizer(
        str(newest.path) if newest else settings.model.base_model,
        trust_remote_code=settings.model.trust_remote_code,
    )
    encoder = Encoder(tokenizer, max_length=settings.train.max_length)
    code = ExitCode.OK
    if before.begun:
        print(f"after {before.begun}, which is begun and comes first, to global step {step}")  # noqa: T201
    contents = [disk.hash_file(file) for file in files]
    trained = by_hand.trained_already(home, contents, newest.lineage if newest else None)
    for file, is_trained in zip(files, trained, strict=True):
        if is_trained:
            print(f"{file}: it was trained by this command before it was cut off, and is not trained again")  # noqa: T201
            continue
        try:
            step = _say_one(file, settings, encoder, step, begun)
        except BadFile as error:
            print(f"{file}: would be rejected: {error}")  # noqa: T201
            code = ExitCode.FAILURE
    return code


def _say_one(file: Path, settings: config.Settings, encoder: Encoder, step: int, begun: InProgress | None) -> int:
    inbox = settings.inbox
    found = examine(file, on_bad_row=inbox.on_bad_row, max_line_bytes=inbox.max_line_bytes)
    if begun and begun.plan.sha256 == found.sha256:
        left = begun.plan.planned_steps - begun.done_steps
        print(f"{file}: the model is in the middle of it, {left} of its steps are left")  # noqa: T201
        print(begun.plan.sentence)  # noqa: T201
        return max(step, begun.plan.target_step)
    tally = count(file, found.format, inbox.on_bad_row, inbox.max_line_bytes, encoder)
    plan = make_plan(
        job=0,
        name=file.name,
        sha256=found.sha256,
        trainable_rows=tally.trainable_rows,
        base_step=step,
        recipe=settings.recipe,
    )
    truncated, untrainable = tally.truncated_rows, tally.untrainable_rows
    cut = f", {counted(truncated, 'row')} cut at {encoder.max_length} tokens" if truncated else ""
    left_out = f", {counted(untrainable, 'row')} without a token to learn from" if untrainable else ""
    if tally.refused_rows:
        left_out += f", {counted(tally.refused_rows, 'bad row')} skipped, the first: {tally.refused_first}"
    print(  # noqa: T201
        f"{file}: {counted(found.rows, 'row')} ({found.format}), {counted(plan.recipe.epochs, 'epoch')},"
        f" {counted(plan.held_out_rows, 'row')} held out,"
        f" effective batch {plan.recipe.batch_size}, from global step {step}{cut}{left_out}"
    )
    print(plan.sentence)  # noqa: T201
    return plan.target_step


def _newest(home: Home) -> checkpoint.Checkpoint | None:
    """The newest checkpoint that verifies; nothing is set aside here."""
    verifier = checkpoint.Verifier()
    for number in checkpoint.steps(home.model):
        try:
            return verifier.verify(checkpoint.folder_of(home.model, number))
        except checkpoint.Damaged:
            continue
    return None
