"""Faults that systems of this kind really had, planted one at a time: a test must see each of them.

    python -m tests.drills.planted                all; exit code 1 when one was missed
    python -m tests.drills.planted NAME ...       these alone
    python -m tests.drills.planted --thorough     what the tests named here miss is tried on all others as well

A fault is an exchange of text in a throw-away copy of the repository, in which the tests that should see it are run.
First they are run in a copy without a fault: a test that fails anyway sees nothing. When the text of a fault is not
found exactly once, or a test has gone, this ends at once: then the code has changed, and the table must follow.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SIDE_BY_SIDE = 2
WHERE = ("unit", "training", "acceptance", "drills")
ALL_TESTS = ["-n", "2", "--dist", "worksteal", "-o", "timeout=600", *(f"tests/{name}" for name in WHERE)]
PASSED, FAILED = 0, 1  # of pytest; anything else means that tests did not run
FAILURE = re.compile(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - (.*))?$", re.MULTILINE)


@dataclass(frozen=True)
class Fault:
    name: str
    file: str
    old: str
    new: str
    test: str  # that should see it, below tests/, as pytest names it

    def planted_in(self, text: str) -> str:
        found = text.count(self.old)
        if found != 1:
            sys.exit(f"planted.py: {self.name!r}: its text is {found} times in {self.file}, not once: mend the table")
        return text.replace(self.old, self.new)


FAULTS = (
    Fault(
        "a refused write is told as solved when it is tried again",
        "longrun/loop.py",
        """free=free)\n        self._context.solved("room")""",
        """free=free)\n        self._context.disk_is_well()""",
        "drills/test_disk.py::test_what_no_file_can_help_rejects_none",
    ),
    Fault(
        "rows one place off",
        "longrun/training/data.py",
        "at = int(self._order[index])",
        "at = int(self._order[index - 1])",
        "training/test_run.py::test_steps_train_exactly_the_slices_of_the_order",
    ),
    Fault(
        "a resume counts the rows of one device",
        "longrun/training/run.py",
        "left = self._order[self.progress.done_steps * batch_size :]",
        "left = self._order[self.progress.done_steps * trainer.args.train_batch_size :]",
        "training/test_run.py::test_every_row_is_trained_once_an_epoch_and_cuts_change_no_bit[accumulation 3-1]",
    ),
    Fault(
        "each epoch rounded up to whole steps",
        "longrun/plan.py",
        "return math.ceil(self.recipe.epochs * self.rows / self.recipe.batch_size)",
        "return self.recipe.epochs * math.ceil(self.rows / self.recipe.batch_size)",
        "unit/test_plan.py",
    ),
    Fault(
        "held-out rows trained",
        "longrun/training/order.py",
        "rows = np.sort(_split(plan)[plan.held_out_rows :])",
        "rows = np.arange(plan.rows)",
        "training/test_order.py",
    ),
    Fault(
        "records read before are not held against what is there",
        "longrun/lineage.py",
        "if digest.digest() == self._digest:",
        "if digest.digest():",
        "unit/test_lineage.py::test_a_lineage_that_took_another_way_shares_nothing_that_differs",
    ),
    Fault(
        "the last batch of a file is not prepared",
        "longrun/training/prepare.py",
        "    while waiting:",
        "    while len(waiting) > 1:",
        "training/test_formats.py::test_every_row_is_prepared_as_if_it_were_alone",
    ),
    Fault(
        "labels one token late",
        "longrun/training/masks.py",
        "labels[first:behind] = tokens.ids[first:behind]",
        "labels[first + 1 : behind] = tokens.ids[first + 1 : behind]",
        "training/test_masks.py::test_a_single_turn_trains_the_answer_and_its_end",
    ),
    Fault(
        "the prompt trained too",
        "longrun/training/data.py",
        '"labels": _padded(samples, "labels", lengths.max(), IGNORED)',
        '"labels": _padded(samples, "input_ids", lengths.max(), IGNORED)',
        "training/test_run.py::test_held_out_rows_are_evaluated_and_never_trained",
    ),
    Fault(
        "rows sorted beyond their step",
        "longrun/training/data.py",
        "step = np.arange(len(self._order)) // batch_size",
        "step = np.arange(len(self._order)) // (2 * batch_size)",
        "training/test_data.py::test_sorted_steps_train_the_same_rows_and_pad_less",
    ),
    Fault(
        "logits made one place off",
        "longrun/training/loss.py",
        "(labels, (0, 1), value=IGNORED)[:, 1:]",
        "(labels, (0, 0), value=IGNORED)[:, 0:]",
        "training/test_loss.py::test_logits_are_made_only_where_a_row_trains_the_next_token",
    ),
    Fault(
        "the Trainer skips rows as well",
        "longrun/training/run.py",
        "ignore_data_skip=True",
        "ignore_data_skip=False",
        "training/test_run.py::test_every_row_is_trained_once_an_epoch_and_cuts_change_no_bit[accumulation 1-1]",
    ),
    Fault(
        "dropout goes on from wherever it was",
        "longrun/training/trainer.py",
        "reseed(self._trainer.conductor.recipe.seed, state.global_step, args.process_index)",
        "pass",
        "training/test_run.py::test_every_row_is_trained_once_an_epoch_and_cuts_change_no_bit[accumulation 1-1]",
    ),
    Fault(
        "the same dropout in every step",
        "longrun/training/trainer.py",
        "reseed(self._trainer.conductor.recipe.seed, state.global_step, args.process_index)",
        "reseed(self._trainer.conductor.recipe.seed, 0, args.process_index)",
        "training/test_run.py::test_each_step_has_randomness_of_its_own",
    ),
    Fault(
        "each part of a step weighs the same",
        "longrun/training/trainer.py",
        "super().training_step(model, inputs, num_items_in_batch)",
        "super().training_step(model, inputs, None)",
        "training/test_run.py::test_each_token_counts_the_same_however_a_step_is_parted",
    ),
    Fault(
        "the learning rate of the checkpoint stays",
        "longrun/training/trainer.py",
        "self._trainer.apply_recipe(state.global_step)",
        "pass",
        "training/test_run.py::test_a_changed_rate_decay_or_beta_takes_effect_at_the_next_file[cold]",
    ),
    Fault(
        "memory trusted after the model was exchanged",
        "longrun/training/trainer.py",
        "if self.in_memory.weights != self.resumes:",
        "if not self.in_memory.weights:",
        "training/test_run.py::test_a_model_that_was_exchanged_is_gone_on_from_as_it_is[warm]",
    ),
    Fault(
        "booked as trained before the commit",
        "longrun/runs.py",
        "done, planned = run.plan.done_steps(run.global_step), run.plan.planned_steps\n",
        "done, planned = run.plan.done_steps(run.global_step), run.plan.planned_steps\n"
        "        if done == planned:\n"
        "            self._context.ledger.move(run.job, JobState.TRAINED)\n",
        "acceptance/test_told_by_the_disk.py::test_a_file_whose_last_step_was_told_and_not_committed_is_gone_on_with",
    ),
    Fault(
        "a checkpoint resumed unverified",
        "longrun/checkpoint.py",
        "return verifier.verify(folder)",
        "return verifier.trust(folder)",
        "unit/test_checkpoint.py",
    ),
    Fault(
        "not synced before it gets its name",
        "longrun/disk.py",
        "            if durable:\n                os.fsync(file.fileno())\n",
        "",
        "unit/test_disk.py",
    ),
    Fault(
        "named before it is written",
        "longrun/disk.py",
        "        shutil.copyfile(source, temporary)\n        sync_file(temporary)\n        rename(temporary, target)\n",
        "        temporary.touch()\n        rename(temporary, target)\n"
        "        shutil.copyfile(source, target)\n        sync_file(target)\n",
        "unit/test_disk.py",
    ),
    Fault(
        "trainer_state.json published first",
        "longrun/checkpoint.py",
        "return [*sorted(names - {TRAINER_STATE}), TRAINER_STATE]",
        "return [TRAINER_STATE, *sorted(names - {TRAINER_STATE})]",
        "unit/test_checkpoint.py",
    ),
    Fault(
        "retention sorts numbers as words",
        "longrun/checkpoint.py",
        "for number in steps(home.model)[max(keep, 1) :]:",
        "for number in sorted(steps(home.model), key=str, reverse=True)[max(keep, 1) :]:",
        "unit/test_checkpoint.py",
    ),
    Fault(
        "the lock of the model let go before training",
        "longrun/training/serve.py",
        "        _work(home, options_json, wire.connect(socket))\n",
        "        channel = wire.connect(socket)\n    _work(home, options_json, channel)\n",
        "acceptance/test_operators.py::test_the_worker_holds_the_lock_of_the_model_that_it_trains",
    ),
    Fault(
        "a removed model comes back",
        "longrun/checkpoint.py",
        "disk.rename_into(staged, staged.name, self._folder)",
        "disk.rename(staged, target)",
        "unit/test_checkpoint.py::test_a_model_restored_at_the_last_moment_is_not_mixed_with_the_one_before",
    ),
    Fault(
        "claimed while it is being written",
        "longrun/inbox.py",
        "        return not writer\n",
        "        return True\n",
        "unit/test_inbox.py",
    ),
    Fault(
        "failed attempts not counted",
        "longrun/runs.py",
        "self._context.ledger.move(run.job, JobState.QUEUED, attempts=attempts)",
        "self._context.ledger.move(run.job, JobState.QUEUED)",
        "acceptance/test_failures.py::test_each_worker_that_a_file_kills_counts_until_the_file_is_given_up",
    ),
    Fault(
        "missing files dropped again as new ones",
        "longrun/recovery.py",
        "if found is None or not archive.claim_again(context.home, job, found):",
        "if found is None or not archive.put(context.home, found):",
        "unit/test_recovery.py",
    ),
    Fault(
        "a file published behind a removal that nobody knows for ours",
        "longrun/checkpoint.py",
        """        ours[name] = _signature(fresh)\n        _note(home, lineage, ours)""",
        """        ours[name] = _signature(fresh)""",
        "unit/test_checkpoint.py",
    ),
    Fault(
        "a queue emptied into rejected by what all its files would fail with",
        "longrun/blame.py",
        "return None if before in (None, WORKED) or before[0] == this[0] else before[1]",
        "return None",
        "unit/test_blame.py",
    ),
    Fault(
        "a drain that leaves a job whose end is not clear",
        "longrun/loop.py",
        "return self._runs.current is None and self._context.ledger.count(JobState.RUNNING) > 0",
        "return False",
        "acceptance/test_failures.py::"
        "test_who_waits_for_the_end_hears_of_a_model_that_was_damaged_after_its_last_commit",
    ),
    Fault(
        "the next file begun while somebody waits to replace the model",
        "longrun/loop.py",
        "            replacing.check_turn(self._context.home)\n",
        "",
        "acceptance/test_surroundings.py::"
        "test_who_waits_to_replace_the_model_has_it_when_a_file_ends_however_many_wait",
    ),
    Fault(
        "the job of another home taken for ours",
        "longrun/lineage.py",
        'return self.outcome == "trained" and self.home in (home, "")',
        'return self.outcome == "trained"',
        "unit/test_lineage.py",
    ),
    Fault(
        "a claim that was cut off is a job before it is durable",
        "longrun/inbox.py",
        "    _make_durable(home, found)\n    return found",
        "    return found",
        "unit/test_inbox.py",
    ),
    Fault(
        "a model published into its own removal",
        "longrun/checkpoint.py",
        "    try:\n        _publish(home, checkpoint)\n    except GONE:",
        "    try:\n        _publish(home, checkpoint)\n    except ():",
        "unit/test_checkpoint.py",
    ),
    Fault(
        "a file rejected for what the system refused",
        "longrun/disk.py",
        "NO_FILES_FAULT = FULL | {errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM}",
        "NO_FILES_FAULT = FULL",
        "training/test_serve.py",
    ),
    Fault(
        "a backup listed before its contents are durable",
        "longrun/store.py",
        "        self._sync()\n        self._mend_sums()\n"
        "        papers = self.folder / manifest.id\n        papers.mkdir()\n"
        "        for name, content in ((SUMS, manifest.to_sums()), (MANIFEST, manifest.to_json().encode())):\n"
        "            disk.write_file(papers / name, content)\n"
        "        disk.rename(papers, self.store.folder(manifest.id))\n",
        "        papers = self.folder / manifest.id\n        papers.mkdir()\n"
        "        for name, content in ((SUMS, manifest.to_sums()), (MANIFEST, manifest.to_json().encode())):\n"
        "            disk.write_file(papers / name, content)\n"
        "        disk.rename(papers, self.store.folder(manifest.id))\n        self._sync()\n",
        "unit/test_backups.py",
    ),
    Fault(
        "the source hashed, not the copy",
        "longrun/disk.py",
        "_hash_range(copy, at, count, digest, on_bytes)",
        "_hash_range(source, at, count, digest, on_bytes)",
        "unit/test_disk.py",
    ),
    Fault(
        "restored without a look at the hash",
        "longrun/backups.py",
        "    if digest != file.sha256:\n",
        "    if not digest:\n",
        "unit/test_backups.py",
    ),
    Fault(
        "pruned what another backup needs",
        "longrun/store.py",
        "for d, size in manifest.digests.items() if d not in needed}",
        "for d, size in manifest.digests.items()}",
        "unit/test_store.py",
    ),
    Fault(
        "a folder that changes is not listed again",
        "longrun/source.py",
        "if {path: (found.st_dev, found.st_ino) for path, found in now.items()} != then:",
        "if now.keys() - then.keys() == {None}:",
        "unit/test_source.py",
    ),
)


def copy_repository(place: Path) -> Path:
    """The files of the repository as they are now, without what a home or a build has left in its folder."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True).stdout
    for name in filter(None, os.fsdecode(listed).split("\0")):
        if (REPOSITORY / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, place / name)
    return place


def failure_of(place: Path, tests: list[str]) -> str | None:
    """The first test that fails there and what it says, or None; when tests cannot be run at all, this program ends."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider"]
    # The copy, not what is installed.
    environment = {**os.environ, "PYTHONPATH": str(place), "COLUMNS": "300"}
    command += ["--basetemp", str(place / "tmp"), *tests]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    failure = FAILURE.search(done.stdout)
    if done.returncode == PASSED:
        return None
    if done.returncode != FAILED or failure is None:
        sys.exit(f"planted.py: tests did not run in {place.name}:\n{done.stdout}\n{done.stderr}")
    return f"{failure[1]}  ({(failure[2] or 'error').strip()[:120]})"


def attempt(fault: Fault, folder: Path, *, thorough: bool) -> bool:
    """Plant the fault in a copy of its own and say who sees it; whether anybody does."""
    place = copy_repository(folder / fault.name.replace(" ", "-"))
    path = place / fault.file
    path.write_text(fault.planted_in(path.read_text()))
    started = time.monotonic()
    seen = failure_of(place, [f"tests/{fault.test}"])
    if seen is None and thorough:
        seen = failure_of(place, ALL_TESTS)
    seconds = time.monotonic() - started
    shutil.rmtree(place, ignore_errors=True)
    say(f"{'MISSED' if seen is None else 'caught'}  {seconds:6.1f} s  {fault.name}{f': {seen}' if seen else ''}")
    return seen is not None


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def main() -> int:
    parser = argparse.ArgumentParser(prog="planted.py", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a fault, or the beginning of its name")
    parser.add_argument("--thorough", action="store_true", help="try all tests before a fault counts as missed")
    args = parser.parse_args()
    chosen = [fault for fault in FAULTS if not args.names or fault.name.startswith(tuple(args.names))]
    for fault in FAULTS:
        fault.planted_in((REPOSITORY / fault.file).read_text())
    if not chosen:
        parser.error(f"there is no such fault; there are: {', '.join(fault.name for fault in FAULTS)}")
    with tempfile.TemporaryDirectory(prefix="longrun-planted-") as name, ThreadPoolExecutor(SIDE_BY_SIDE) as threads:
        folder = Path(name)
        tests = sorted({f"tests/{fault.test}" for fault in chosen})
        if failing := failure_of(copy_repository(folder / "without-a-fault"), tests):
            sys.exit(f"planted.py: fails without any fault: {failing}")
        seen = list(threads.map(lambda fault: attempt(fault, folder, thorough=args.thorough), chosen))
    say(f"planted: {len(seen)} faults, {seen.count(False)} missed")
    return 1 if False in seen else 0


if __name__ == "__main__":
    sys.exit(main())
