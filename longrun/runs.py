"""Runs: one attempt at a job by the worker, from the plan to the committed end.

A run may end at its target, stopped on purpose, with its model gone, for want of disk or of what it is trained with,
by the file's own fault (NaN, a token the model has not), or by a death of the worker or damage to the prepared rows.
Only the last two count as an attempt, and only when they saved nothing new; out of memory does not, as long as fewer
rows at once can be tried. In every case the next run goes on from the newest verified checkpoint.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from longrun import blame, checkpoint, disk, fitting, wire
from longrun.context import TRAINING
from longrun.errors import BadFile, BadModel, CannotTrain, ModelRemoved
from longrun.job import Job, JobState
from longrun.plan import Plan, Recipe, make_plan
from longrun.wording import counted
from longrun.worker import Child

if TYPE_CHECKING:
    from longrun.checkpoint import Checkpoint
    from longrun.context import Context
    from longrun.lineage import InProgress, Lineage


DEVICE = "device"  # in the ledger: cuda, once it was trained on
FIXES = {
    "crash": "the end of logs/worker.log tells more",
    "hang": "if one step may take so long, raise worker.step_timeout_s",
    "out of memory": "free memory on the device, or set a smaller max_length, or gradient_checkpointing = true",
}


@dataclass
class Run:
    """The run in progress."""

    job: Job
    plan: Plan
    message: wire.Train
    situation: fitting.Situation  # in which it began
    model: checkpoint.OpenModel
    start_step: int
    saved_step: int
    global_step: int
    sent: bool = False
    started: bool = False
    rows_at_once: int = 0
    stopping: str = ""  # why it was asked to stop
    waiting: wire.Waiting | None = None
    loss: float | None = None
    steps_per_s: float = 0.0

    def facts(self) -> dict[str, Any]:
        """For status."""
        return {
            "file": self.job.name,
            "job": self.job.number,
            "base_step": self.plan.base_step,
            "planned_steps": self.plan.planned_steps,
            "target_step": self.plan.target_step,
            "done_steps": self.plan.done_steps(self.global_step),
            "saved_step": self.saved_step,
            "started": self.started,
            "loss": self.loss,
            "steps_per_s": round(self.steps_per_s, 3),
            "eta_s": self.eta_s and round(self.eta_s, 1),
        }

    @property
    def eta_s(self) -> float | None:
        return (self.plan.target_step - self.global_step) / self.steps_per_s if self.steps_per_s else None


class Runs:
    def __init__(self, context: Context) -> None:
        self._context = context
        self.worker = Child(context.home, "worker")
        self.current: Run | None = None
        self._held = ""  # the lineage that the worker has in memory
        self._idle_since = 0.0
        self._deaths = 0
        self._skipped = 0  # number of the job that is to be skipped, until that is booked

    # -- starting

    def warm_up(self, now: float, recipe: Recipe | None = None) -> None:
        """Start the worker's imports while the first file is still being prepared.

        A job that was begun keeps its recipe, whatever the settings say by now.
        """
        settings = self._context.settings
        options = self._options(recipe or settings.recipe)
        if self.worker.running and self.worker.options != options and self.current is None:
            self.worker.kill()
        if not self.worker.running:
            disk.remove_file(self._context.home.last_word)
            self._context.say("starting", "the training process is starting")
            self.worker.start(options, now, processes=settings.worker.processes)

    def start(self, job: Job, newest: Checkpoint | None, facts: dict[str, Any], now: float) -> None:
        """Plan the job on top of `newest`, say the plan, and give it to the worker."""
        home_id = self._context.home_id
        here = newest.lineage.progress_of(home_id, job.number, job.sha256) if newest else None
        try:
            plan = self._own(here.plan, job) if here else self._new_plan(job, newest, facts)
        except BadFile as error:
            self._context.reject(job, error.reason())
            return
        if here and plan.rows + plan.held_out_rows != facts["trainable_rows"]:
            self._context.reject(job, _other_rows(plan, facts["trainable_rows"]))
            return
        step = newest.global_step if newest else 0
        if self.worker.used and (newest is None or newest.lineage.lineage != self._held):
            self.worker.kill()  # a new model begins from its base, another has a configuration and tokenizer of its own
        self.warm_up(now, plan.recipe)
        model = checkpoint.OpenModel(self._context.home, newest)
        if newest is not None:
            self._tell_what_was_begun(job, newest.lineage)
        self._tell_plan(job, plan, newest)
        job = self._context.ledger.move(job, JobState.RUNNING)
        self._skipped = 0 if self._skipped == job.number else self._skipped  # it has ended whole since, and comes again
        self._context.hold_model(TRAINING)
        message = self._message(job, plan, newest)
        self._held = newest.lineage.lineage if newest else message.lineage
        self.current = Run(
            job=job,
            plan=plan,
            message=message,
            situation=fitting.situation(self._context, plan.recipe),
            model=model,
            start_step=step,
            saved_step=step,
            global_step=step,
        )
        self._keep_going(self.current, now)

    def _new_plan(self, job: Job, newest: Checkpoint | None, facts: dict[str, Any]) -> Plan:
        return make_plan(
            job=job.number,
            name=job.name,
            sha256=job.sha256,
            trainable_rows=facts["trainable_rows"],
            base_step=newest.global_step if newest else 0,
            recipe=self._context.settings.recipe,
            home=self._context.home_id,
        )

    def _own(self, plan: Plan, job: Job) -> Plan:
        """The plan of a job in progress, which another home may have begun, as the plan of this home's job."""
        return replace(plan, home=self._context.home_id, job=job.number, name=job.name)

    def _message(self, job: Job, plan: Plan, newest: Checkpoint | None) -> wire.Train:
        train = self._context.settings.train
        return wire.Train(
            plan=plan.to_dict(),
            prepared=str(self._context.home.prepared(job.number)),
            checkpoint=str(newest.path) if newest else None,
            lineage=uuid.uuid4().hex,
            base_model=self._context.base_model(newest),
            save_steps=train.save_steps,
            save_total_limit=train.save_total_limit,
            logging_steps=train.logging_steps,
            row_log=self._context.settings.log.rows,
        )

    def _tell_what_was_begun(self, job: Job, lineage: Lineage) -> None:
        """What a person may not expect of a model that was restored, or copied here, in the middle of a file."""
        begun = lineage.in_progress
        if begun is None:
            return
        home_id = self._context.home_id
        foreign = lineage.is_foreign(home_id)
        if lineage.progress_of(home_id, job.number, job.sha256) is None:
            was = self._context.ledger.get(begun.plan.job)
            if foreign or (was is not None and was.state is JobState.TRAINED):
                self._tell_left(job, begun, foreign=foreign)
        elif foreign:
            text = (
                f"going on where the model is in the middle of these bytes, begun in another home as {begun.plan.name}"
            )
            self._context.say("adopted", f"{job.name}: {text}", job=job.number)

    def _tell_left(self, job: Job, begun: InProgress, *, foreign: bool) -> None:
        steps = f"{begun.done_steps} of its {begun.plan.planned_steps} steps"
        way_out = " To train that first: `daemon.py stop --now`, `daemon.py retry --missing`, and start again"
        self._context.say(
            "left in the middle",
            f"the model is in the middle of {begun.plan.name}: it has {steps}, and the rest is left out now that"
            f" {job.name} is trained.{'' if foreign else way_out}",
            level="warning",
            file=begun.plan.name,
            done_steps=begun.done_steps,
        )

    def _tell_plan(self, job: Job, plan: Plan, newest: Checkpoint | None) -> None:
        say, recipe = self._context.say, plan.recipe
        say(
            "planning",
            f"{job.name}: {counted(plan.rows, 'row')} x {counted(recipe.epochs, 'epoch')},"
            f" {counted(plan.held_out_rows, 'row')} held out,"
            f" effective batch {recipe.batch_size}, learning rate {recipe.learning_rate:g},"
            f" from {newest.path.name if newest else 'the base model ' + self._context.base_model(None)}",
            job=job.number,
        )
        say(
            "planned",
            plan.sentence,
            job=job.number,
            file=job.name,
            plan=plan.to_dict(),
            target_step=plan.target_step,
        )
        done = plan.done_steps(newest.global_step) if newest else 0
        if done:
            left = plan.planned_steps - done
            say("resuming", f"{job.name}: {done} steps are done already, {left} are left", job=job.number)

    def _options(self, recipe: Recipe) -> tuple[str, ...]:
        """What a worker is started with and cannot change later."""
        settings = self._context.settings
        fixed = {
            "per_device": fitting.rows_at_once(self._context, recipe),
            "may_be_fewer": not settings.train.per_device_train_batch_size,
            "batch_size": recipe.batch_size,
            "dtype": settings.model.dtype,
            "attn_implementation": settings.model.attn_implementation,
            "trust_remote_code": settings.model.trust_remote_code,
            "gradient_checkpointing": settings.train.gradient_checkpointing,
            "optim": settings.train.optim,
            "report_to": settings.train.report_to,
            "processes": settings.worker.processes,
            "use_cpu": settings.train.use_cpu,
        }
        return ("--options", json.dumps(fixed))

    # -- stopping

    def stop(self, why: str, now: float, note: str = "") -> None:
        """Ask for the end of the run at the next step boundary, after a checkpoint. A skip is not taken back.

        `note` is told with it.
        """
        run = self.current
        if run is None or run.stopping in (why, "skip"):
            return
        run.stopping = why
        self._skipped = run.job.number if why == "skip" else self._skipped
        if run.started:
            self.worker.send(wire.Stop(why=why), now)
            when = f"at the next step boundary, after a checkpoint{note}"
            self._context.say("asked", f"{why}: the training of {run.job.name} ends {when}")
        elif why != "skip" or run.saved_step == run.plan.base_step:  # nothing new to save, no rows to name
            self.worker.kill()
            self._over(run)
            self._end_stopped(run, why, [])

    def abandon(self) -> None:
        """Leave at once. Nothing is lost but the steps since the last checkpoint."""
        self.worker.kill()
        if self.current is not None:
            self._over(self.current)

    def check_model(self) -> None:
        """Drop the run when its model was removed: the old one must not come back."""
        if self.current is not None:
            self._lost_model(self.current)

    def _lost_model(self, run: Run) -> bool:
        """Whether the model was removed under the run, which is over then. A removal is nobody's failed attempt."""
        try:
            run.model.glance()
        except ModelRemoved as gone:
            self._model_removed(run, str(gone))
            return True
        return False

    # -- hearing

    def hear(self, now: float, *, standing_still: bool = False) -> None:
        """Take up what the worker says. `standing_still`: no file begins for now, though some may wait."""
        run = self.current
        if not self.worker.running:
            return
        try:
            for message in self.worker.receive(now):
                self._apply(message, now)
        except wire.Closed:
            how = self.worker.kill()
            last_word = self._last_word()
            if run is not None and last_word is not None:
                self._failed(run, last_word)
            else:
                self._died(how)
            return
        if run is not None and run is self.current:
            self._keep_going(run, now)
        elif run is None:
            self._release_when_idle(now, standing_still=standing_still)

    def _last_word(self) -> wire.Failed | None:
        """Of a process that has brought the first one down with it, as when only its device is full."""
        try:
            said = wire.decode(self._context.home.last_word.read_bytes())
        except (OSError, ValueError):
            return None
        return said if isinstance(said, wire.Failed) else None

    def _keep_going(self, run: Run, now: float) -> None:
        if self.worker.ready and not run.sent:
            self._check_device(run)
            run.sent = True
            self.worker.send(run.message, now)
        limit_s = self._patience_s(run)
        if self.worker.hangs(now, limit_s):
            self.worker.kill()
            self._died(f"no progress for {limit_s:g} s", kind="hang")

    def _check_device(self, run: Run) -> None:
        """A GPU that is gone, as after an update of its driver, must not go unnoticed: a CPU would train for weeks."""
        known, device = self._context.ledger.fact(DEVICE), self.worker.device
        if known is None or device.startswith(known) or self._context.settings.train.use_cpu:
            return
        self.worker.kill()
        self._over(run)
        self._wait_again(run, f"the worker has {device}")
        raise CannotTrain(
            f"this home was trained on a GPU, and now the worker has {device}",
            hint="`nvidia-smi` tells whether the driver works; to go on on the CPU, set use_cpu = true below [train]",
        )

    def _patience_s(self, run: Run) -> float:
        limits = self._context.settings.worker
        return limits.step_timeout_s if run.started else limits.start_timeout_s

    @property
    def waits_for_disk(self) -> bool:
        return self.current is not None and self.current.waiting is not None

    def overdue(self, now: float) -> bool:
        """Whether the worker has work and makes no progress: the system's watchdog is not reassured then."""
        return self.current is not None and self.worker.silent_s(now) > self._patience_s(self.current)

    def _apply(self, message: wire.Message, now: float) -> None:
        run = self.current
        if run is None or getattr(message, "job", run.job.number) != run.job.number:
            return
        match message:
            case wire.Started():
                self._started(run, message, now)
            case wire.Progress():
                self._progress(run, message)
            case wire.Saved():
                self._saved(run, message)
            case wire.Waiting():
                self._waits(run, message)
            case wire.Ended():
                self._idle_since = now
                self._ended(run, message)
            case wire.Failed():
                self.worker.kill()
                self._failed(run, (self._last_word() if message.kind == "crash" else None) or message)

    def _started(self, run: Run, message: wire.Started, now: float) -> None:
        run.started, run.rows_at_once = True, message.rows_at_once
        self._deaths = 0
        self._context.solved("worker")
        if message.device.startswith("cuda") and self._context.ledger.fact(DEVICE) is None:
            self._context.ledger.set_fact(DEVICE, "cuda")
        how = "kept in memory" if message.warm else f"loaded in {message.seconds:.1f} s"
        rows = counted(message.rows_at_once, "row")
        self._context.say(
            "started",
            f"{run.job.name}: training on {message.device}, at most {rows} at once, model {how}",
            job=run.job.number,
            rows_at_once=message.rows_at_once,
            warm=message.warm,
            worker_pid=self.worker.pid,
        )
        if not message.adds_up and not message.warm:
            self._context.say(
                "uneven loss",
                f"{run.job.name}: micro-batches of {rows} count the same in a step, whether they have few tokens or"
                " many, because the loss of this model cannot be split by tokens;"
                f" per_device_train_batch_size = {run.plan.recipe.batch_size} trains a step in one piece, where memory"
                " allows",
                level="warning",
                job=run.job.number,
            )
        if run.stopping:
            self.worker.send(wire.Stop(why=run.stopping), now)

    def _progress(self, run: Run, message: wire.Progress) -> None:
        run.waiting = None
        self._context.solved("room")
        run.global_step, run.loss, run.steps_per_s = message.global_step, message.loss, message.steps_per_s
        done, planned = run.plan.done_steps(run.global_step), run.plan.planned_steps
        loss = "" if message.loss is None else f", loss {message.loss:.4f}"
        eta = f", {run.eta_s:.0f} s left" if run.eta_s else ""
        self._context.journal.progress(
            name=run.job.name,
            done=done,
            planned=planned,
            loss=message.loss,
            text=f"{run.job.name}: step {done} of {planned} (global step {run.global_step}){loss},"
            f" learning rate {message.learning_rate:g}, {message.steps_per_s:.2f} steps/s{eta}",
        )

    def _saved(self, run: Run, message: wire.Saved) -> None:
        run.saved_step = run.global_step = message.global_step
        run.waiting = None
        if run.job.attempts:  # they were before this
            run.job = self._context.ledger.note(run.job, attempts=0)
        self._context.disk_is_well()
        blame.note_works(self._context, self._trained_with(run))
        folder = checkpoint.folder_of(self._context.home.model, message.global_step)
        try:
            saved = self._context.verifier.trust(folder)
        except (checkpoint.Damaged, OSError):
            return  # removed already, or about to be found damaged: the next look at the model decides
        run.model.close()
        run.model = checkpoint.OpenModel(self._context.home, saved)
        self._context.seen = saved
        self._context.say(
            "saved",
            f"{folder.name} saved ({message.size_bytes / 1e6:.1f} MB in {message.seconds:.2f} s)",
            job=run.job.number,
            global_step=message.global_step,
            seconds=round(message.seconds, 3),
            size_bytes=message.size_bytes,
        )

    def _waits(self, run: Run, message: wire.Waiting) -> None:
        run.waiting = message
        self._context.problem(
            "room",
            f"paused: disk. The next checkpoint needs {message.need_bytes / 1e6:.0f} MB,"
            " and less than that is free; training goes on by itself when there is room",
        )

    # -- ending

    def _over(self, run: Run) -> None:
        self.current = None
        run.model.close()
        self._context.let_go_model(TRAINING)
        self._context.journal.progress_over()

    def _ended(self, run: Run, message: wire.Ended) -> None:
        if self._lost_model(run):
            return
        self._over(run)
        try:
            newest = self._context.newest()  # the disk is believed, not the message
        except BadModel:
            return  # perhaps it is being removed: the job is left running, and settled when that is clear
        if newest is None:
            self._context.ledger.move(run.job, JobState.QUEUED)
        elif self._context.finish_if_trained(run.job, newest):
            return
        elif message.stopped:
            self._end_stopped(run, "skip" if run.stopping == "skip" else message.stopped, message.rows_trained)
        else:
            self._retry(run, "the worker said it was done, but no verified checkpoint says so", "crash")

    def _end_stopped(self, run: Run, why: str, rows_trained: list[int]) -> None:
        done = run.plan.done_steps(run.global_step)
        if why == "skip":
            count = min(done * run.plan.recipe.batch_size, run.plan.rows)
            how_far = f"after {done} of {run.plan.planned_steps} steps; {count} of {run.plan.rows} rows were trained"
            self._end_skipped(run.job, how_far, steps=done, rows_trained=rows_trained)
            return
        self._context.ledger.move(run.job, JobState.QUEUED)
        self._context.say(
            "stopped",
            f"{run.job.name}: ended by {why} after {done} of {run.plan.planned_steps} steps (global step"
            f" {run.global_step}); the rest is trained when training goes on",
            job=run.job.number,
        )

    def _end_skipped(self, job: Job, how_far: str, **facts: Any) -> None:
        self._context.reject(job, {"kind": "skipped", "why": f"skipped by the operator {how_far}", **facts})
        self._skipped = 0

    def take_up(self, job: Job, newest: Checkpoint | None) -> None:
        """Book how a run ended that could not be booked then: back into the queue, unless the job was skipped."""
        if job.number != self._skipped:
            self._context.ledger.move(job, JobState.QUEUED)
            return
        here = newest.lineage.progress_of(self._context.home_id, job.number, job.sha256) if newest else None
        steps = here.done_steps if here else 0
        self._end_skipped(job, f"while it failed; the model has its first {steps} steps", steps=steps)

    def _failed(self, run: Run, failure: wire.Failed) -> None:
        if self._lost_model(run):
            return
        if failure.kind == "model removed":
            self._model_removed(run, failure.why)
            return
        self._over(run)
        if failure.kind == "diverged":
            reason = {
                "kind": "diverged",
                "why": failure.why,
                "step": failure.global_step,
                "rows": failure.rows,
            }
            self._context.reject(run.job, reason | {"fix": failure.hint})
        elif failure.kind == "token":
            self._give_up(run, failure.why, failure.kind, failure.hint)
        elif failure.kind == "disk":
            self._wait_again(run, failure.why)
            raise disk.Refused(failure.why)
        elif failure.kind == "base model":
            self._wait_again(run, failure.why)
            raise CannotTrain(failure.why, hint=failure.hint)
        elif failure.kind == "prepared rows":
            disk.remove_tree(self._context.home.prepared(run.job.number), self._context.home.staging)
            self._retry(run, f"{failure.why}; it is prepared again", "crash")
        elif not run.started:
            self._died_at_start(run, failure.why)
        else:
            self._retry(run, failure.why, failure.kind)

    def _died(self, how: str, kind: str = "crash") -> None:
        run = self.current
        if run is not None:
            if self._lost_model(run):
                return
            self._over(run)
        if run is None or not run.started:
            self._died_at_start(run, how)
        else:
            self._retry(run, f"the worker died ({how})" if kind == "crash" else how, kind)

    def _died_at_start(self, run: Run | None, how: str) -> None:
        """Before model and optimizer stood ready: no file is at fault, so none pays for it with an attempt."""
        if run is not None and self._wait_again(run, how):
            self._context.say("retry", f"{run.job.name}: the worker did not get ready ({how})", level="warning")
        self._deaths += 1
        if self._deaths >= self._context.settings.worker.max_attempts:
            self._deaths = 0
            raise CannotTrain(
                f"the worker cannot start ({how}): {self.worker.last_words()}",
                hint=f"{self.worker.log} tells more, `daemon.py doctor` may tell why; if loading is only slow,"
                " raise worker.start_timeout_s",
            )

    def _retry(self, run: Run, why: str, kind: str) -> None:
        """Count the attempt, unless it got further than the one before; after too many, give the file up.

        One that ran out of memory with more rows at once than one has tried those, and not the file.
        How far it got is read from the disk: the worker may have died between a commit and its word of it.
        """
        saved_step = self._saved_step(run, why)
        if saved_step is None:
            return
        if run.stopping:
            self._context.ledger.move(run.job, JobState.QUEUED)
            return
        attempts = 0 if saved_step > run.start_step else run.job.attempts
        limit = self._context.settings.worker.max_attempts
        no_memory, failed = kind == "out of memory", ""
        if not (no_memory and fitting.make_smaller(self._context, run.situation, run.rows_at_once)):
            attempts += 1
            failed = f" attempt {attempts} of {limit} failed,"
        if attempts >= limit:
            if no_memory:
                fitting.forget(self._context, run.situation)
            self._give_up(run, why, kind, FIXES[kind], after=f"; given up after {counted(attempts, 'attempt')}")
            return
        self._context.ledger.move(run.job, JobState.QUEUED, attempts=attempts)
        self._context.say(
            "retry",
            f"{run.job.name}: {why};{failed} going on from the newest verified checkpoint",
            level="warning",
            job=run.job.number,
            kind=kind,
        )

    def _wait_again(self, run: Run, why: str) -> bool:
        """Put the job back into the queue, for it is not to blame; False when it is over all the same."""
        if self._saved_step(run, why) is None:
            return False
        self._context.ledger.move(run.job, JobState.QUEUED)
        return True

    def _saved_step(self, run: Run, why: str) -> int | None:
        """The global step of the newest checkpoint, after a run that failed; None when that ends the job: the model
        has it whole, or it was to be skipped.
        """
        newest = self._context.newest()
        saved_step = newest.global_step if newest else 0
        if self._context.finish_if_trained(run.job, newest):
            return None
        if run.stopping == "skip":
            saved = run.plan.done_steps(saved_step)
            self._end_skipped(run.job, f"while it failed ({why}); the model has its first {saved} steps", steps=saved)
            return None
        return saved_step

    def _give_up(self, run: Run, why: str, kind: str, fix: str, *, after: str = "") -> None:
        """Reject the file, unless all tells of what it is trained with: then the next ones would only follow it."""
        other = blame.alike(self._context, self._trained_with(run), run.job)
        if other is None:
            self._context.reject(run.job, {"kind": kind, "why": why + after, "fix": fix})
            return
        self._context.ledger.move(run.job, JobState.QUEUED, attempts=0)
        raise CannotTrain(
            f"{run.job.name}: {why}, as {other} before it, and nothing was ever trained with this model, these settings"
            " and libraries",
            hint=f"{fix}. If the file is at fault, delete {self._context.home.claimed(run.job.number)}",
        )

    def _trained_with(self, run: Run) -> str:
        return blame.training(run.situation.words, self.worker.device)

    def _model_removed(self, run: Run, why: str) -> None:
        self.worker.kill()
        self._over(run)
        then = "will start again from the model that is there then, else from the base model at step 0"
        if run.stopping == "skip":
            then = "was to be skipped, and is"
            self._end_skipped(run.job, "while the model went; the one that is there then has none of it", steps=0)
        else:
            self._context.ledger.move(run.job, JobState.QUEUED)
        self._context.model_removed(f"{why}: {run.job.name} {then}", job=run.job.number)

    def _release_when_idle(self, now: float, *, standing_still: bool) -> None:
        limit_s = 60 * self._context.settings.worker.idle_release_minutes
        idle = self.worker.ready and (standing_still or not self._context.waiting(limit=1))
        if idle and now - max(self._idle_since, self.worker.heard_at) > limit_s:
            self.worker.kill()
            self._context.say("released", "the worker was idle; its memory is released")


def _other_rows(plan: Plan, trainable_rows: int) -> dict[str, Any]:
    """Why a begun file cannot be gone on with: the order of its rows would mean other rows than before."""
    return {
        "kind": "changed",
        "why": f"it was begun with {plan.rows + plan.held_out_rows} trainable rows, and prepared again it has"
        f" {trainable_rows}: settings or libraries have changed since",
        "fix": "take the change back and retry, or drop the file again to train it whole",
    }
