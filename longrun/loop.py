"""The daemon's loop: the one place that knows the order of things.

A life in three verbs: `_start`, `tick` until it says "leave", `_leave`. A tick is a list of calls, none of which
waits; the longest reads a checkpoint that this process has not seen yet, or files that are to be taken back. Whatever
it was doing when the process dies, the next start finds the same situation on disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import sqlite3
import time
from typing import TYPE_CHECKING, Any

from longrun import archive, by_hand, checkpoint, disk, inbox, missing, process, replacing, requests, status
from longrun.errors import BadConfig, BadModel, CannotTrain, Locked, LongrunError, ModelRemoved
from longrun.job import FINAL, WAITING, Job, JobState
from longrun.preparation import Preparation
from longrun.recovery import Recovery
from longrun.runs import Runs
from longrun.scheduled import Scheduled

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType

    from longrun.checkpoint import Checkpoint
    from longrun.context import Context

TICK_S = 0.5
IDLE_TICK_S = 2.0  # news rings; only operators' requests have to be looked for
REMOVAL_GRACE_S = 5.0  # an `rm -rf` under way is given this long before its remains are judged
ROOM_BYTES = 64 << 20  # kept free beyond what the next checkpoint needs
SQLITE_PASSES = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
LOOKS_WHEN_DRAINING = 3  # at what a person must mend
QUEUE_SHOWN = 100


class Daemon:
    def __init__(self, context: Context, *, drain: bool = False, files: list[Path] | None = None) -> None:
        self._context = context
        self._drain = drain
        self._by_hand = files  # instead of the inbox
        self._contents: list[str] = []  # SHA-256 of the files, by hand
        self._skipped_before = False  # one of them, before this command was cut off
        self._inbox = inbox.Inbox(context.home, context.settings.inbox, context.say)
        self._bell = inbox.Bell(context.home, self._ring, context.say)
        self._preparation = Preparation(context)
        self._runs = Runs(context)
        self._recovery = Recovery(context)
        self._scheduled = Scheduled(context)
        self._notifier = context.notifier
        self._asked: dict[str, dict[str, Any]] = {}  # requests, as they were when the round began
        self._signals = 0
        self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._taking_back = False  # what `retry --missing` asked for is not all in the queue yet
        # Times are monotonic seconds.
        self._scanned_at = 0.0
        self._next_scan = 0.0
        self._idle_since: float | None = None
        self._paused = False  # by the operator
        self._trouble = ""  # "disk", "model" or "worker": training stands still and tries again by itself
        self._troubles = (0, 0)  # how many jobs had ended, and how often trouble came since
        self._untidy = False
        self._check_lock_at = 0.0
        self._try_again_at = 0.0  # after trouble
        self._bad_model_since: float | None = None
        self._told: dict[str, Any] = {}
        self._told_at = 0.0

    def run(self) -> bool:
        """Work until asked to leave or, draining, until nothing is left.

        Whether all went well: no file was rejected and, by hand, none was left for later.
        """
        with self._signals_handled():
            try:
                self._start()
                while not self.tick(time.monotonic()):
                    self._wait()
            except Exception as error:
                why = str(error) if isinstance(error, OSError | LongrunError) else repr(error)
                self._context.say(
                    "failed", f"cannot go on: {why}. The next start finds everything as it is", level="error"
                )
                raise
            finally:
                self._leave()
        unfinished = self._by_hand is not None and (bool(self._context.waiting(limit=1)) or self._has_orphans)
        with contextlib.suppress(OSError, sqlite3.Error):  # the next start does it
            by_hand.forget_ended(self._context.ledger)
        good = self._context.rejected_now == 0 and not self._hopeless and not self._inbox_is_shut
        return good and not unfinished and not self._skipped_before

    # -- start and end

    def _start(self) -> None:
        context = self._context
        what = f"watches {context.home.inbox}" if self._by_hand is None else f"trains in {context.home.root}"
        context.say("start", f"Longrun {what}", pid=os.getpid(), home=str(context.home.root))
        self._recover()
        if self._by_hand is None:
            by_hand.forget_ended(context.ledger)
        else:
            context.only = self._admit_by_hand(self._by_hand)
        self._notifier.say("READY=1")

    def _recover(self) -> None:
        """Bring folders and ledger in line after whatever ended the last daemon."""
        context = self._context
        disk.empty_folder(context.home.staging)
        self._tidy()
        with contextlib.suppress(BadModel, Locked, ModelRemoved):  # the first tick tells
            context.newest()
        newest = context.seen
        if newest is not None:
            where = f"global step {newest.global_step} ({newest.path.name}, verified)"
            context.say("resume", f"the model is at {where}", global_step=newest.global_step)
            context.ledger.learn(missing.forgotten(newest.lineage, context.home_id, self._is_booked))
            self._tidy()  # their folders may be there still

    def _is_booked(self, number: int) -> bool:
        """Whether the ledger knows how the job ended, or still can: an older one may wait for a file put away since."""
        job = self._context.ledger.get(number)
        return job is not None and (job.state in FINAL or bool(archive.claimed_files(self._context.home, number)))

    def _tidy(self) -> None:
        """Finish what was cut off between a move and its record, or between a record and its move."""
        with self._inbox_that_may_go():
            self._context.ledger.claim(inbox.unrecorded(self._context.home, self._is_recorded))
            self._put_away_finished()
            self._untidy = False

    def _is_recorded(self, number: int) -> bool:
        """Whether the ledger knows the job, or will: its file is being copied."""
        return number == self._inbox.copying or self._context.ledger.get(number) is not None

    def _put_away_finished(self) -> None:
        context = self._context
        for folder in sorted(context.home.jobs.iterdir()):
            job = context.ledger.get(int(folder.name)) if folder.name.isdecimal() else None
            if job is not None and job.state in FINAL:
                context.put_away(job)

    def _admit_by_hand(self, paths: list[Path]) -> set[int]:
        """Jobs for files named on the command line.

        The same files again, after that command was cut off, are the same jobs: those, too, that were trained by then.
        """
        ledger = self._context.ledger
        self._contents = [disk.hash_file(path) for path in paths]
        by_hand.forget_ended(ledger, but=self._contents)
        jobs = by_hand.jobs_of(ledger, self._contents) or self._unfinished(paths, self._contents)
        for at, path in enumerate(paths):
            jobs[at] = self._go_on_with(jobs[at]) or self._copy_in(path)
            by_hand.note(ledger, self._contents, jobs)
        return set(jobs)

    def _unfinished(self, paths: list[Path], contents: list[str]) -> list[int]:
        """For each of the files a job that waits with its name and content, as one that was cut off; else 0."""
        names = {path.name for path in paths}
        waiting = [job for job in self._context.ledger.in_state(*WAITING, JobState.RUNNING) if job.name in names]
        numbers: dict[str, list[int]] = {}
        for job in waiting:
            numbers.setdefault(self._content_of(job), []).append(job.number)
        return [(numbers.get(content) or [0]).pop(0) for content in contents]

    def _go_on_with(self, number: int) -> int:
        """The number of a job that is not to be begun anew; else 0."""
        job = self._context.ledger.get(number)
        if job is None:
            return 0
        if job.state is JobState.REJECTED:
            if json.loads(job.reason)["kind"] != "skipped":
                return 0
            self._skipped_before = True
            text = f"{job.name} was skipped in this command before it was cut off, and is not trained again"
            self._context.say("skipped already", text, job=number, file=job.name)
        if job.state is JobState.TRAINED:
            newest = self._context.seen
            known = newest is not None or not self._context.home.model.exists()
            if known and self._context.record_of(job, newest) is None:
                return 0  # another model, or none, is there now
            text = f"{job.name} was trained by this command before it was cut off, and is not trained again"
            self._context.say("trained already", text, job=number, file=job.name)
        return number

    def _content_of(self, job: Job) -> str:
        """SHA-256 of the job's file; of one that was not examined yet, read now."""
        claimed = archive.claimed_files(self._context.home, job.number)
        return job.sha256 or (disk.hash_file(claimed[0]) if claimed else "")

    def _copy_in(self, path: Path) -> int:
        number = self._next_number()
        folder = self._context.home.claimed(number)
        folder.mkdir(parents=True)
        disk.copy_file(path, folder / path.name)
        disk.sync_tree(self._context.home.job(number))
        disk.sync_folder(self._context.home.jobs)
        self._context.ledger.claim([inbox.claimed_job(number, path.name)])
        return number

    def _leave(self) -> None:
        self._notifier.say("STOPPING=1")
        self._bell.stop()
        if (run := self._runs.current) is not None:
            steps = f"the steps of {run.job.name} since global step {run.saved_step}"
            text = f"leaving without a checkpoint: {steps} are done again by the next start"
            self._context.say("left at once", text, level="warning")
        with contextlib.suppress(OSError):  # the next start removes what is left of it
            self._inbox.abandon()
        self._runs.abandon()
        self._preparation.preparer.kill()
        self._scheduled.abandon()
        with contextlib.suppress(OSError):  # the next start clears it; why this one ends must not be hidden
            requests.clear(self._context.home, requests.STOP)
        with contextlib.suppress(OSError, sqlite3.Error):
            status.write(self._context.home, self._facts())
        self._context.say("end", "Longrun has stopped")

    # -- the tick

    def tick(self, now: float) -> bool:
        """One round; True means leave. What no file is to blame for makes training stand still until it is mended."""
        ended = self._context.ended_now
        try:
            # Between two looks at the model it may go, or a restore may take it: the next tick begins afresh.
            with contextlib.suppress(ModelRemoved, Locked):
                self._asked = requests.made(self._context.home)
                self._round(now)
        except (OSError, sqlite3.OperationalError) as error:
            if not _may_pass(error):
                raise
            self._stand_still(now, "disk", error)
        except BadModel as error:
            self._stand_still(now, "model", error)
        except CannotTrain as error:
            self._stand_still(now, "worker", error)
        self._tell_status(now)
        if self._context.ended_now > ended:  # a file is the largest thing that comes and goes
            process.return_free_memory()  # not before the next one trains: it takes milliseconds
        return self._finished(now)

    def _round(self, now: float) -> None:
        """A run that ends is settled, and its backup begun, before a restore may have the model."""
        with self._context.model_held() if self._runs.current else contextlib.nullcontext():
            self._do_round(now)

    def _stay_alone(self, now: float) -> None:
        """Somebody may have removed the lock as stale; LongrunError when another daemon has started since."""
        if now < self._check_lock_at:
            return
        self._check_lock_at = now + status.RENEW_S
        try:
            self._context.lock.keep()
        except Locked as other:
            why = f"{self._context.home.daemon_lock} was removed, and another has taken its place: {other.message}"
            raise LongrunError(why) from None

    def _do_round(self, now: float) -> None:
        self._stay_alone(now)
        self._runs.hear(now, standing_still=self._paused or self._trouble == "model")
        self._preparation.hear(now)
        self._obey(now)
        self._context.reload_settings(self._context.seen)
        self._runs.check_model()
        over = now >= self._try_again_at
        if over and self._untidy:
            self._tidy()
        self._recovery.look(now, idle=self._runs.current is None)
        self._claim_settled(now)
        if over:
            self._scheduled.tick(now, self._context.seen, between_files=self._runs.current is None)
            self._go_on(now)
            if self._taking_back:
                self._ring()  # the rest of it at once
            if self._runs.current is None and not self._context.waiting(limit=1):
                for kind in ("room", "disk", "worker"):
                    self._context.solved(kind, "no file waits for that any more")
            self._trouble = self._trouble if self._runs.waits_for_disk else ""
        if not self._runs.overdue(now):
            self._notifier.ping(now)

    def _go_on(self, now: float) -> None:
        """Settle, prepare and train; while the model is being restored or reset, the next file waits for it."""
        try:
            self._resolve_orphans(now)
            self._taking_back = self._takes_back and self._recovery.take_back()
            self._preparation.next(now, self._context.seen)
            self._train_next(now)
        except Locked as held:
            self._context.problem("restore", f"the next file waits: {held.message}", level="warning")
        else:
            self._context.solved("restore")

    def _stand_still(self, now: float, trouble: str, error: Exception) -> None:
        kind = "room" if isinstance(error, disk.NoRoom) else trouble
        self._context.problem(kind, f"paused: {trouble}. {error}")
        self._trouble = trouble
        if trouble != "disk":
            since_ended, looks = self._troubles
            ended = self._context.ended_now
            self._troubles = (ended, looks + 1 if since_ended == ended else 1)
        self._untidy = True  # it may have struck between a move and its record
        self._try_again_at = now + self._context.settings.worker.retry_s

    def _obey(self, now: float) -> None:
        """What operators and signals ask for: the run ends at its next step boundary, after a checkpoint."""
        run = self._runs.current
        paused = requests.PAUSE in self._asked
        if paused != self._paused:
            self._paused = paused
            self._context.say("paused" if paused else "resumed", "paused by the operator" if paused else "resumed")
        if self._leaving_now:
            return
        if self._leaving:
            self._runs.stop("stop", now, "; a second signal leaves at once" if self._signals else "")
        elif paused:
            self._runs.stop("pause", now)
        skip = self._asked.get(requests.SKIP)
        if skip is not None:
            requests.clear(self._context.home, requests.SKIP)
            if run is not None and run.job.number == skip.get("job"):
                self._runs.stop("skip", now)

    @property
    def _leaving(self) -> bool:
        return self._signals > 0 or requests.STOP in self._asked

    @property
    def _leaving_now(self) -> bool:
        return self._signals > 1 or bool(self._asked.get(requests.STOP, {}).get("now"))

    # -- files in

    def _claim_settled(self, now: float) -> None:
        if self._scans and now >= self._next_scan:
            self._next_scan = now + self._context.settings.inbox.scan_s
            with self._inbox_that_may_go():
                self._take_in(now)
                self._context.solved("inbox")

    def _take_in(self, now: float) -> None:
        self._context.home.inbox.mkdir(exist_ok=True)
        self._bell.check()
        self._inbox.settings = self._context.settings.inbox
        if self._inbox.copying is not None:
            self._context.ledger.claim(self._inbox.go_on_copying())
            self._next_scan = now
            return
        settled = self._inbox.scan(now)
        if settled:
            self._context.ledger.claim(self._inbox.claim(settled, self._next_number()))
        self._scanned_at = now
        more = len(settled) > self._inbox.at_once or self._inbox.copying is not None
        self._next_scan = now if more else now + self._inbox.next_look(now)

    @contextlib.contextmanager
    def _inbox_that_may_go(self) -> Iterator[None]:
        """People remove and replace the inbox at any moment: the next look makes it anew, or tells why it cannot."""
        place = self._context.home.inbox
        try:
            yield
        except OSError as error:
            if error.filename != os.fspath(place):
                raise
            self._untidy = True  # it may have gone between a move and its record
            if error.errno != errno.ENOENT:
                why = f"cannot take files from {place}: {error.strerror}. Make it a folder that can be read and written"
                self._context.problem("inbox", why)

    @property
    def _scans(self) -> bool:
        """Whether files are taken in: not by hand, and not onto a full disk."""
        return self._by_hand is None and not (self._trouble == "disk" and time.monotonic() < self._try_again_at)

    def _next_number(self) -> int:
        """A job number that neither ledger, folders nor model know."""
        home = self._context.home
        folders = [int(folder.name) for folder in home.jobs.iterdir() if folder.name.isdecimal()]
        seen = self._context.seen
        in_model = [record.job for record in seen.lineage.files] if seen else []
        return max([self._context.ledger.highest_number(), *folders, *in_model]) + 1

    # -- training

    def _resolve_orphans(self, now: float) -> None:
        """A running job without a run: the last daemon, or a full disk, came between it and the ledger."""
        if self._runs.current is None:
            for job in self._context.ledger.in_state(JobState.RUNNING):
                usable, newest = self._look_at_model(now)
                if usable and not self._context.finish_if_trained(job, newest):
                    self._runs.take_up(job, newest)

    def _train_next(self, now: float) -> None:
        """Start the first waiting job once its tokens are there; jobs never overtake each other."""
        if self._runs.current is not None or self._paused or self._leaving or self._taking_back:
            return
        if self._context.waiting(limit=1):
            replacing.check_turn(self._context.home)
            with self._context.model_held():  # what is looked at is what will be trained
                self._train_first(now)

    def _train_first(self, now: float) -> None:
        usable, newest = self._look_at_model(now)
        if not usable:
            return
        self._check_settings(newest)
        self._runs.warm_up(now)
        # Once more, now that it is known what the model is in the middle of.
        first = next(iter(self._context.waiting(limit=1)), None)
        if first is None or first.state is not JobState.QUEUED or self._context.finish_if_trained(first, newest):
            return
        facts = self._preparation.prepared_facts(first, newest)
        if facts is not None:
            self._check_room(newest)
            self._runs.start(first, newest, facts, now)

    def _check_settings(self, newest: Checkpoint | None) -> None:
        """CannotTrain when the settings in force are not for this model: it may have been restored under them."""
        try:
            self._context.check_settings(newest)
        except BadConfig as error:
            raise CannotTrain(error.message, hint=error.hint) from None

    def _look_at_model(self, now: float) -> tuple[bool, Checkpoint | None]:
        """Whether the model can be gone on from, and its newest verified checkpoint (None: from the base model).

        BadModel is believed only when it has lasted longer than an `rm -rf current_model/` takes between two
        files; the remains of one that met a commit are cleared away.
        """
        try:
            newest = self._context.newest()
        except BadModel:
            self._bad_model_since = self._bad_model_since or now
            if now - self._bad_model_since < REMOVAL_GRACE_S:
                return False, None
            if not checkpoint.clear_remains(self._context.home, self._context.lived):
                raise
            newest = self._context.newest()
        self._bad_model_since = None
        self._context.solved("model")
        return True, newest

    def _check_room(self, newest: Checkpoint | None) -> None:
        """NoRoom when the next checkpoint would not fit; better to stand still before than in the middle."""
        need = ROOM_BYTES + (disk.tree_bytes(newest.path) if newest else 0)
        free = disk.free_bytes(self._context.home.staging)
        if free < need:
            raise disk.NoRoom("the next checkpoint", self._context.home.root, need=need, free=free)
        self._context.solved("room")

    # -- telling

    def _tell_status(self, now: float) -> None:
        due = now - self._told_at
        if due < TICK_S:
            return
        facts = self._facts()
        if facts != self._told or due > status.RENEW_S:
            self._told, self._told_at = facts, now
            with contextlib.suppress(OSError):  # a full disk must not stop the daemon from waiting for room
                status.write(self._context.home, facts)

    def _facts(self) -> dict[str, Any]:
        ledger, home = self._context.ledger, self._context.home
        run = self._runs.current
        states = (*WAITING,) if run else (JobState.RUNNING, *WAITING)  # without a run: it was left, and is gone on with
        return {
            "state": self._state(),
            "pid": os.getpid(),
            "home": str(home.root),
            "global_step": run.global_step if run else status.published_step(home),
            "current": run.facts() if run else None,
            "queue": [job.name for job in ledger.in_state(*states, limit=QUEUE_SHOWN)],
            "queued": ledger.count(*states),
            "settling": self._inbox.settling[:QUEUE_SHOWN],
            "left": self._inbox.left_alone[:QUEUE_SHOWN],
            "being_written": self._inbox.being_written[:QUEUE_SHOWN],
            "preparing": self._preparation.doing,
            "trained": ledger.count(JobState.TRAINED),
            "rejected": ledger.count(JobState.REJECTED),
            "missing": [job.name for job in self._context.missing[:QUEUE_SHOWN]],
            "missing_files": len(self._context.missing),
            "problems": list(self._context.problems.values()),
            "worker_pid": self._runs.worker.pid,
            "preparer_pid": self._preparation.preparer.pid,
        }

    def _state(self) -> str:
        run = self._runs.current
        if self._leaving:
            return "stopping"
        if run is not None and run.waiting is None:
            return "pausing" if run.stopping == "pause" else "training"
        if self._trouble or run is not None:
            return f"paused: {self._trouble or 'disk'}"
        if self._paused:
            return "paused"
        return "preparing" if self._context.waiting(limit=1) else "idle"

    # -- waiting and leaving

    def _finished(self, now: float) -> bool:
        if self._leaving_now:
            return True
        if self._leaving:
            return self._runs.current is None
        return self._drain and (self._nothing_left(now) or self._hopeless)

    @property
    def _hopeless(self) -> bool:
        """Draining, somebody waits for the end: what only a person can mend is said by leaving."""
        since_ended, looks = self._troubles
        stuck = since_ended == self._context.ended_now and looks >= LOOKS_WHEN_DRAINING
        return stuck and self._runs.current is None

    def _nothing_left(self, now: float) -> bool:
        """Of the inbox that is true only after a look at it: not everywhere does it ring when a file comes."""
        if not self._idle:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since, self._next_scan = now, now
        looked = self._by_hand is not None or self._inbox_is_shut or self._scanned_at > (self._idle_since or now)
        return self._idle and looked

    @property
    def _inbox_is_shut(self) -> bool:
        return "inbox" in self._context.problems

    @property
    def _idle(self) -> bool:
        arrived = self._by_hand is not None or self._inbox_is_shut or not self._inbox.settling
        busy = self._runs.current is not None or self._has_orphans or self._taking_back or self._scheduled.busy
        return arrived and not busy and not self._untidy and not self._context.waiting(limit=1)

    @property
    def _has_orphans(self) -> bool:
        """Whether a run has ended, and it is not clear yet how: its model is damaged, or being removed."""
        return self._runs.current is None and self._context.ledger.count(JobState.RUNNING) > 0

    @property
    def _takes_back(self) -> bool:
        """By hand, only what was named is trained: the request waits for the next daemon."""
        return self._by_hand is None and not self._leaving

    def _wait(self) -> None:
        """Until something happens: news from a child, a bell, a signal, or the next thing that is due."""
        tick_s = TICK_S if self._runs.current is not None else IDLE_TICK_S
        now = time.monotonic()
        due_s = self._next_scan - now if self._scans else tick_s
        if self._told_at + TICK_S > now:  # what came since status was told is told as soon as it may be
            due_s = min(due_s, self._told_at + TICK_S - now)
        timeout_s = max(0.0, min(tick_s, due_s))
        ends = [self._wake[0], *self._runs.worker.filenos(), *self._preparation.preparer.filenos()]
        ready, _, _ = select.select(ends, [], [], timeout_s)
        if self._wake[0] in ready:
            os.read(self._wake[0], 4096)
            self._next_scan = min(self._next_scan, time.monotonic() + 0.01)

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake[1], b"!")

    @contextlib.contextmanager
    def _signals_handled(self) -> Iterator[None]:
        """First signal: leave after a checkpoint. Second: leave at once. SIGIO belongs to the lease probe."""

        def count(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            self._signals += 1
            self._ring()

        wanted = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it for us
            wanted.append(signal.SIGHUP)
        former = {number: signal.signal(number, count) for number in wanted}
        former[signal.SIGIO] = signal.signal(signal.SIGIO, signal.SIG_IGN)
        try:
            yield
        finally:
            # Asked to leave, it ends with its own exit code, however often it is asked: a handler would not see to
            # that, because Python takes those away before it ends.
            for number, handler in former.items():
                signal.signal(number, signal.SIG_IGN if self._signals else handler)


def _may_pass(error: OSError | sqlite3.OperationalError) -> bool:
    """Whether it passes, or a person mends it, while the daemon waits."""
    if isinstance(error, OSError):
        return error.errno in disk.FULL
    kind = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the lowest byte of an extended code
    return kind in SQLITE_PASSES
