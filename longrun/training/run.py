"""One run: train what is left of a plan, and commit checkpoints as it goes.

The Runner lives as long as the worker and keeps model and optimizer in memory from file to file; a Session is
one run. Warmth is a cache: what the Session goes on from is always the checkpoint that it was given.
"""

from __future__ import annotations

import gc
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainingArguments

from longrun import checkpoint, disk, wire
from longrun.errors import BadConfig, LongrunError
from longrun.home import FACTS
from longrun.journal import utc_now
from longrun.lineage import Lineage
from longrun.plan import Plan, Recipe
from longrun.training import base_model
from longrun.training.data import Collator, PlannedRows, filled_up
from longrun.training.loss import adds_up, only_where_trained
from longrun.training.masks import IGNORED
from longrun.training.metrics import CHECK_EVERY, Diverged, Losses, Metrics
from longrun.training.order import held_out_rows, training_order
from longrun.training.trainer import InMemory, PlannedTrainer
from longrun.training.world import World, asked_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import TrainerControl, TrainerState

    from longrun.home import Home

# The fewest that a micro-batch has on average. With fewer, what each costs besides is felt (2 ms for the tiny model);
# with more, rows only pad one another. Measured with models of 0.1 to 33 million weights, rows of 17 to 560 tokens.
TOKENS_ON_A_CPU = 256
TELL_S = 0.5  # between progress messages
SAVE_SHARE = 0.02  # of the time may go into checkpoints, at the default interval
SAVE_AT_LEAST_S, SAVE_AT_MOST_S = 60.0, 1800.0  # between them: the most that a kill can cost
LOOK_FOR_ROOM_S = 2.0
ROWS_TOLD = 100_000  # of a skipped file; of a larger one only their number is told
ROOM_MARGIN_BYTES = 32 << 20
# What torch.save says, instead of the system's error.
WRITE_REFUSED = ("PytorchStreamWriter", "inline_container.cc", "iostream error", "cannot be opened", "Parent directory")


class Line(Protocol):
    """What a run needs of its conversation with the daemon."""

    def send(self, message: wire.Message) -> None: ...

    def receive(self, timeout_s: float | None) -> list[wire.Message]: ...


class Silence:
    """The line of a process that is not the first: the first speaks and listens for all."""

    def send(self, message: wire.Message) -> None:
        pass

    def receive(self, timeout_s: float | None) -> list[wire.Message]:  # noqa: ARG002
        return []


class Pulse:
    """Lets the daemon know, now and then, that something long is getting on."""

    def __init__(self, line: Line, doing: str) -> None:
        self._line, self._doing = line, doing
        self._told = 0.0

    def __call__(self, count: int) -> None:  # noqa: ARG002
        if time.monotonic() - self._told > TELL_S:
            self._told = time.monotonic()
            self._line.send(wire.Alive(doing=self._doing))


class DiskFull(LongrunError):
    """The run was asked to stop while there was no room for its checkpoint."""


@dataclass(frozen=True)
class Options:
    """What a worker is started with and keeps for life."""

    per_device: int  # rows at once, at most
    batch_size: int
    dtype: str
    attn_implementation: str
    trust_remote_code: bool
    gradient_checkpointing: bool
    optim: str
    report_to: tuple[str, ...]
    processes: int = 1
    may_be_fewer: bool = False  # rows at once, where that is faster
    use_cpu: bool = False

    def rows_on_a_cpu(self, row_tokens: float) -> int:
        """As many rows a micro-batch as have TOKENS_ON_A_CPU, if each row has `row_tokens`, and divide the batch."""
        enough = range(math.ceil(TOKENS_ON_A_CPU / row_tokens), self.per_device)
        return next((rows for rows in enough if self.batch_size % (rows * self.processes) == 0), self.per_device)

    @classmethod
    def from_json(cls, text: str) -> Options:
        values = json.loads(text)
        return cls(**{**values, "report_to": tuple(values["report_to"])})


class Runner:
    def __init__(self, home: Home, options: Options, channel: Line) -> None:
        self._home = home
        self._options = options
        self._channel = channel
        self._trainer: PlannedTrainer | None = None
        self._base = ""
        self._adds_up = False
        self._verifier = checkpoint.Verifier()
        self.device = base_model.find_device(options.dtype, use_cpu=options.use_cpu)
        self._args = _arguments(home, options, self.device)
        self.world = World()
        self.metrics = Metrics(
            home, writes=self.world.leads, tensorboard="tensorboard" in _available(options.report_to)
        )

    def run(self, task: wire.Train) -> wire.Ended:
        """Train the task's plan to its end, or until asked to stop. Raises Diverged, ModelRemoved, BadConfig."""
        started = time.monotonic()
        newest = self._verifier.trust(Path(task.checkpoint)) if task.checkpoint else None
        digest = newest.digest if newest else ""
        warm = self._trainer is not None
        trainer = self._trainer or self._load(task, newest)
        lineage = newest.lineage if newest else Lineage(lineage=task.lineage, base_model=self._base)
        lineage = replace(lineage, optim=self._options.optim)
        facts = json.loads((Path(task.prepared) / FACTS).read_bytes())
        base_model.check_takes(trainer.model, facts, trainer.processing_class)
        trainer.take_at_once(self._rows_at_once(facts["tokens"] / facts["trainable_rows"]), self.world.size)
        with checkpoint.OpenModel(self._home, newest) as model:
            session = Session(self._home, self._channel, task, lineage, model, trainer, self.metrics, self.world)
            trainer.conductor, trainer.resumes = session, digest
            shares = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * self.world.size
            assert shares == session.recipe.batch_size, "a step must train exactly the rows of its slice"
            trainer.train_dataset = session.rows
            trainer.args.max_steps = session.plan.target_step
            trainer.args.max_grad_norm = session.recipe.max_grad_norm
            is_warm = warm and trainer.in_memory.weights == digest
            session.on_begin = lambda: self._tell_started(session, time.monotonic() - started, warm=is_warm)
            trainer.train(resume_from_checkpoint=task.checkpoint)
            self.metrics.flush()
            return session.ended()

    def _rows_at_once(self, row_tokens: float) -> int:
        options = self._options
        if not options.may_be_fewer or not self._adds_up or self.device.name != "cpu":
            return options.per_device
        return options.rows_on_a_cpu(row_tokens)

    def _tell_started(self, session: Session, seconds: float, *, warm: bool) -> None:
        """Said when model and optimizer stand ready: what fails before is no fault of the file."""
        self._channel.send(
            wire.Started(
                job=session.plan.job,
                global_step=session.progress.global_step,
                device=str(self.device),
                seconds=seconds,
                warm=warm,
                rows_at_once=self._args.per_device_train_batch_size,
                adds_up=self._adds_up or self._args.gradient_accumulation_steps == 1,
            )
        )

    def _load(self, task: wire.Train, newest: checkpoint.Checkpoint | None) -> PlannedTrainer:
        """A Trainer with the model of the checkpoint, or with the base model when there is none."""
        options, source = self._options, task.checkpoint or task.base_model
        model = base_model.load_model(
            source,
            dtype=torch.bfloat16 if options.dtype == "bfloat16" else torch.float32,
            attn_implementation=options.attn_implementation,
            trust_remote_code=options.trust_remote_code,
        )
        if newest is None:  # a model carries where it grew from, and outlives that
            self._base = base_model.pinned(task.base_model)
        tokenizer = base_model.load_tokenizer(source, trust_remote_code=options.trust_remote_code)
        collator = Collator(base_model.padding(model, tokenizer))
        trainer = PlannedTrainer(
            model=model,
            args=self._args,
            data_collator=collator,
            processing_class=tokenizer,
        )
        with trainer.accelerator.autocast():
            collator.only_trained = only_where_trained(model)
            # Tried, because the flag that some models carry about it is about their own training scripts.
            self._adds_up = trainer.model_accepts_loss_kwargs = adds_up(model)
        if self.world.size > 1 and not self._adds_up:
            raise BadConfig(
                f"worker.processes = {self.world.size} cannot share the steps of {task.base_model}: its losses of parts"
                " do not add up to the loss of the step",
                hint="set worker.processes to 1",
            )
        trainer.remove_callback(PrinterCallback)
        trainer.in_memory = InMemory(weights=newest.digest if newest else "")
        # Imports and model are here for life: without this each train() spends 0.2 s collecting them.
        gc.collect()
        gc.freeze()
        self._trainer = trainer
        return trainer


def _arguments(home: Home, options: Options, device: base_model.Device) -> TrainingArguments:
    """The one TrainingArguments of this process: a second would reset accelerate's state under the Trainer."""
    # Only when asked for: newer versions of transformers call it by another name, and warn.
    rarely: dict[str, Any] = {"gradient_checkpointing": True} if options.gradient_checkpointing else {}
    return TrainingArguments(
        output_dir=str(home.staging),
        per_device_train_batch_size=options.per_device,
        gradient_accumulation_steps=options.batch_size // (options.per_device * asked_size()),
        max_steps=1,  # set for each run
        optim=options.optim,
        **rarely,
        bf16=device.bf16 and options.dtype != "bfloat16",
        use_cpu=device.name == "cpu",
        train_sampling_strategy="sequential",
        ignore_data_skip=True,
        auto_find_batch_size=False,
        remove_unused_columns=False,
        save_strategy="no",  # the Session says when
        save_total_limit=None,  # our own retention never deletes the resume target
        logging_strategy="no",
        logging_nan_inf_filter=False,
        dataloader_pin_memory=device.name != "cpu",
        disable_tqdm=True,
        report_to=[name for name in _available(options.report_to) if name != "tensorboard"] or "none",
    )


def _available(report_to: tuple[str, ...]) -> list[str]:
    """Those of the Trainer's integrations that are wanted and installed."""
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    installed = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    return [name for name in report_to if name in installed]


class Session:
    """One run, as the Trainer's conductor."""

    def __init__(
        self,
        home: Home,
        channel: Line,
        task: wire.Train,
        lineage: Lineage,
        model: checkpoint.OpenModel,
        trainer: PlannedTrainer,
        metrics: Metrics,
        world: World,
    ) -> None:
        self._world = world
        self.plan = Plan.from_dict(task.plan)
        self._home, self._channel, self._task = home, channel, task
        self._model, self._trainer, self._metrics = model, trainer, metrics
        self._before, self.progress = lineage.begun(self.plan, utc_now())
        self._order = training_order(self.plan)
        prepared = Path(task.prepared)
        batch_size = self.plan.recipe.batch_size
        left = self._order[self.progress.done_steps * batch_size :]
        self.rows = PlannedRows(prepared, filled_up(left, batch_size) if world.size > 1 else left)
        if trainer.args.per_device_train_batch_size < batch_size:
            self.rows.sort_steps(batch_size)
        self._held_out = PlannedRows(prepared, held_out_rows(self.plan))
        on_cpu = trainer.args.device.type == "cpu"
        self._losses = Losses(
            world, self.progress.loss_sum, self.progress.last_loss, check_every=1 if on_cpu else CHECK_EVERY
        )
        self.on_begin: Callable[[], None] = lambda: None
        self._alive = Pulse(channel, "training")
        self._stop = ""
        self._eval_loss: float | None = None
        self._logged_at = self.progress.global_step
        self._logged_sum = self._losses.sum
        self._began = self._told = self._saved = time.monotonic()
        self._began_step = self.progress.global_step
        metrics.begin(lineage.lineage, self.progress.global_step)

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    # -- each step

    def began(self) -> None:
        now = time.monotonic()
        self._began = self._told = self._saved = now  # loading took its time; training begins here
        self.on_begin()

    def trained(self, loss: torch.Tensor, rows: list[int]) -> None:
        self._losses.add(loss, rows)
        self._alive(len(rows))  # a step of many micro-batches may be long

    def step_ended(self, state: TrainerState, control: TrainerControl) -> None:
        """What follows a step: account for it, tell it, and decide on stopping, evaluating and saving."""
        step = state.global_step
        rows = self._losses.end_step(step)
        if self._task.row_log:
            rows = self._world.gather(rows)
            self._metrics.write_rows(step, lineage=self._before.lineage, job=self.plan.job, rows=rows)
        at_end = step == self.plan.target_step
        self._listen()
        if step % self._task.logging_steps == 0 or at_end or step == self._began_step + 1:
            self._log(step)
        self._tell(step, always=at_end or step == self._began_step + 1)
        if at_end:
            self._eval_loss = self._evaluate(step)
        self._stop, save = self._world.share((self._stop, self._is_time_to_save(step)))
        control.should_training_stop = at_end or bool(self._stop)
        control.should_save = control.should_training_stop or save

    def _listen(self) -> None:
        for message in self._channel.receive(0):
            if isinstance(message, wire.Stop):
                self._stop = message.why

    def _log(self, step: int) -> None:
        self._losses.read()
        steps = step - self._logged_at
        if steps:
            mean = (self._losses.sum - self._logged_sum) / steps
            self._logged_at, self._logged_sum = step, self._losses.sum
            self._report(step, loss=mean, learning_rate=self._trainer.rate_used)

    def _tell(self, step: int, *, always: bool) -> None:
        now = time.monotonic()
        if always or now - self._told >= TELL_S:
            self._told = now
            self._channel.send(
                wire.Progress(
                    job=self.plan.job,
                    global_step=step,
                    loss=self._losses.last,
                    learning_rate=self._trainer.rate_used,
                    steps_per_s=(step - self._began_step) / (now - self._began),
                )
            )

    def _report(self, step: int, **values: float) -> None:
        self._metrics.write(step, **values)
        if self._trainer.args.report_to:
            self._trainer.log(dict(values))  # to the integrations besides TensorBoard

    # -- evaluating

    def _evaluate(self, step: int) -> float | None:
        """Mean loss per trained token over the held-out rows; None when there are none."""
        if not len(self._held_out):
            return None
        total, count = 0.0, 0
        model, args = self._trainer.model_wrapped, self._trainer.args
        model.eval()
        loader: DataLoader[Any] = DataLoader(
            self._held_out,
            batch_size=args.per_device_train_batch_size,
            collate_fn=self._trainer.data_collator,
        )
        with torch.no_grad():
            for batch in loader:
                batch.pop("rows")
                inputs = {name: tensor.to(args.device) for name, tensor in batch.items()}
                tokens = int((inputs["labels"][:, 1:] != IGNORED).sum())
                total += float(model(**inputs).loss) * tokens
                count += tokens
                self._channel.send(wire.Alive(doing="evaluating"))
        loss = total / count
        self._report(step, eval_loss=loss)
        return loss

    # -- saving

    def _is_time_to_save(self, step: int) -> bool:
        if self._task.save_steps:
            return step % self._task.save_steps == 0
        wanted = (self._trainer.save_s or 0.0) / SAVE_SHARE
        return time.monotonic() - self._saved > min(max(wanted, SAVE_AT_LEAST_S), SAVE_AT_MOST_S)

    def save(self, write: Callable[[], None]) -> None:
        """Commit a checkpoint of this step. Without room for it training stands still here; nothing is lost."""
        self._losses.read()
        self._check_weights()
        step = self._trainer.state.global_step
        lineage = self._lineage_at(step)
        self._wait_for_room()
        while True:
            started = time.monotonic()
            digest = self._world.share(self._save_once(write, lineage))
            if digest is not None:
                break
            self._wait_for_room(at_least_once=True)  # what is free is not always ours: quotas
        self._trainer.in_memory = InMemory(digest, digest)
        self._saved = time.monotonic()
        self._trainer.save_s = took_s = self._saved - started
        size = disk.tree_bytes(checkpoint.folder_of(self._home.model, step)) if self._world.leads else 0
        self._channel.send(wire.Saved(job=self.plan.job, global_step=step, seconds=took_s, size_bytes=size))

    def _save_once(self, write: Callable[[], None], lineage: Lineage) -> str | None:
        """The digest of the committed checkpoint; None when there turned out to be no room for it."""
        staged = self._home.staging / f"checkpoint-{lineage.global_step}"
        alive = Pulse(self._channel, "saving")
        try:
            if self._world.leads:
                for remains in self._home.staging.glob("checkpoint-*"):  # of a worker that died over it
                    disk.remove_tree(remains, self._home.staging)
            write()
            if self._world.leads:
                keep = self._task.save_total_limit
                return self._model.commit(staged, lineage, keep=keep, on_bytes=alive).digest
        except (OSError, RuntimeError, SafetensorError) as error:
            if self._was_for_want_of_room(error):
                disk.remove_tree(staged, self._home.staging)
                return None
            if _tells_of_a_file(error):
                raise disk.Refused(f"{staged.name} cannot be written: {error}") from error
            raise
        return None

    def _lineage_at(self, step: int) -> Lineage:
        self.progress = replace(
            self.progress,
            done_steps=self.plan.done_steps(step),
            loss_sum=self._losses.sum,
            last_loss=self._losses.last,
        )
        if step < self.plan.target_step:
            return self._before.at(self.progress)
        return self._before.ended(self.progress, outcome="trained", finished_at=utc_now(), eval_loss=self._eval_loss)

    def _check_weights(self) -> None:
        """A checkpoint never holds a weight that is not a number, whatever the losses were."""
        if not all(bool(torch.isfinite(weight).all()) for weight in self._trainer.weights()):
            done = self.plan.done_steps(self._trainer.state.global_step) - 1
            rows = self._order[done * self.recipe.batch_size :][: self.recipe.batch_size]
            raise Diverged("a weight became nan or inf", self._trainer.state.global_step, self._row_numbers(rows))

    def _wait_for_room(self, *, at_least_once: bool = False) -> None:
        need = self._need_bytes() if self._world.leads else 0
        while at_least_once or disk.free_bytes(self._home.staging) < need:
            at_least_once = False
            self._channel.send(wire.Waiting(job=self.plan.job, need_bytes=need))
            for message in self._channel.receive(LOOK_FOR_ROOM_S):
                if isinstance(message, wire.Stop):
                    raise DiskFull("asked to stop while there is no room for a checkpoint")
        self._world.share(None)  # the others wait here, where no time limit is, and not at the writing

    def _need_bytes(self) -> int:
        """Weights, and for each trained one the two moments of Adam; the published copy shares its blocks."""
        weights = self._trainer.weights()
        copies = [3 if weight.requires_grad else 1 for weight in weights]
        sizes = [weight.numel() * weight.element_size() for weight in weights]
        return sum(size * count for size, count in zip(sizes, copies, strict=True)) + ROOM_MARGIN_BYTES

    def _was_for_want_of_room(self, error: Exception) -> bool:
        """torch and safetensors hide the error number; what tells is that there is no room now."""
        number = getattr(error, "errno", None)
        return number in disk.FULL or disk.free_bytes(self._home.staging) < self._need_bytes()

    # -- the end

    def ended(self) -> wire.Ended:
        self._listen()  # a skip may have come while the checkpoint was written
        step = self._trainer.state.global_step
        trained = self._order[: self.plan.done_steps(step) * self.recipe.batch_size]
        stopped = self._stop if step < self.plan.target_step else ""
        told = stopped == "skip" and len(trained) <= ROWS_TOLD
        rows = sorted({row + 1 for row in self._row_numbers(trained)}) if told else []
        return wire.Ended(job=self.plan.job, global_step=step, stopped=stopped, rows_trained=rows)

    def _row_numbers(self, indices: Any) -> list[int]:
        rows = PlannedRows(Path(self._task.prepared), indices)
        return [rows[position]["row"] for position in range(len(rows))]


def _tells_of_a_file(error: Exception) -> bool:
    """Whether it is torch's or safetensors' word for a write that the system refused."""
    return isinstance(error, SafetensorError) or any(words in str(error) for words in WRITE_REFUSED)
