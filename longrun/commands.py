"""What operators type: the commands of daemon.py but `run`, `demo` and `doctor`.

At the top stands only what `status` needs, of Longrun and of the standard library, so that it answers at once.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from longrun import disk, locks, requests, status
from longrun.errors import BadFile, BadModel, ExitCode, LongrunError, NotRunning
from longrun.wording import counted, printable, unpinned

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from longrun.config import Settings
    from longrun.home import Home
    from longrun.missing import Missing

TAIL_LINES = 40
NOTHING_MISSING = "nothing is missing: every file trained here is in the model, or waits to train again"
LOOK_S = 0.2
NAMES_TOLD = 100
NAMES_SHOWN = 5


def say(text: str = "") -> None:
    print(text, flush=True)  # noqa: T201


def show_status(home: Home, *, as_json: bool) -> int:
    """The daemon's state; exit code 3 when it does not run."""
    home.check()
    facts = status.read(home)
    if not facts["current"]:  # else the note's steps belong together
        facts["global_step"] = status.published_step(home)
    facts |= status.of_model(home)
    facts["rejected"] = sum(1 for _ in home.rejected.glob("*.reason.json"))  # those that were dropped again are not
    if facts["state"] == "stopped":
        facts |= _missing_now(home)
    if as_json:
        say(json.dumps(facts, indent=1, ensure_ascii=True))
    else:
        for line in _status_lines(facts, _hint(home, facts["state"])):
            say(printable(line))
    return ExitCode.NOT_RUNNING if facts["state"] == "stopped" else ExitCode.OK


def _hint(home: Home, state: str) -> str:
    """What a person may not expect of this state, or may want to type in it."""
    if state == "stopped" and not home.state.is_dir():
        return "no daemon has ever run here; --home or LONGRUN_HOME names another folder"
    if state == "stopped" and requests.pending(home, requests.PAUSE) is not None:
        return "the next daemon will start paused, until `daemon.py resume`"
    return "by the operator; `daemon.py resume` goes on" if state == "paused" else ""


def _missing_now(home: Home) -> dict[str, Any]:
    """The model may have been restored or deleted since the daemon left; where that cannot be told, its note stands."""
    from longrun import missing

    try:
        jobs = missing.jobs(home)
    except LongrunError:
        return {}
    return {"missing": [job.name for job in jobs[:NAMES_TOLD]], "missing_files": len(jobs)}


def _status_lines(facts: dict[str, Any], hint: str) -> Iterator[str]:
    pid = f" (pid {facts['pid']})" if facts["pid"] else ""
    yield f"home         {facts['home']}"
    yield f"state        {facts['state']}{pid}{f': {hint}' if hint else ''}"
    if "stale_s" in facts:
        yield f"             has not answered for {facts['stale_s']} s: it may hang"
    yield f"global step  {facts['global_step']}"
    if facts["base_model"]:
        yield f"base model   {facts['base_model']}"
    current = facts["current"]
    if current:
        left = f", {current['eta_s']:.0f} s left" if current["eta_s"] else ""
        doing = "" if current.get("started", True) else ", the model is being loaded"
        steps = f"{current['done_steps']} of {current['planned_steps']} steps"
        yield f"training     {current['file']}: {steps}{left}{doing}"
        yield f"             from global step {current['base_step']} to {current['target_step']}"
    elif begun := facts["begun"]:
        steps = f"{begun['done_steps']} of {begun['planned_steps']} steps"
        yield f"begun        {begun['file']}: {steps} are in the model, and the rest comes first"
    yield f"queue        {facts['queued']}" + (f": {_first(facts['queue'], facts['queued'])}" if facts["queue"] else "")
    settling, left = facts.get("settling", []), facts.get("left", [])
    for name in settling[:NAMES_SHOWN]:
        written = name in facts.get("being_written", [])
        yield f"             inbox/{name} {'is still being written' if written else 'arrives'}"
    yield from _more(settling)
    for name in left[:NAMES_SHOWN]:
        yield f"             inbox/{name} is left alone; the log says why"
    yield from _more(left)
    yield f"trained      {facts['trained']}"
    yield f"rejected     {facts['rejected']}" + ("  (rejected/*.reason.json say why)" if facts["rejected"] else "")
    if facts["missing"]:
        names = _first(facts["missing"], facts["missing_files"])
        why = "trained here, but not in the model; `daemon.py missing` tells more"
        yield f"missing      {facts['missing_files']}: {names} ({why})"
    for problem in facts["problems"]:
        yield f"problem      {problem}"


def _first(names: list[str], count: int) -> str:
    """The first of so many names."""
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if count > NAMES_SHOWN else "")


def _more(names: list[str]) -> Iterator[str]:
    if len(names) > NAMES_SHOWN:
        yield "             and more of these"


def show_missing(home: Home, *, as_json: bool) -> int:
    """The files that were trained here and are not in the model, with what is needed to decide about them."""
    from longrun import missing

    home.check()
    found = missing.look(home)
    if as_json:
        say(json.dumps([_missing_facts(home, lost) for lost in found], indent=1, ensure_ascii=True))
    elif not found:
        say(NOTHING_MISSING)
    else:
        for line in _missing_lines(home, found):
            say(printable(line))
    return ExitCode.OK


def _missing_facts(home: Home, lost: Missing) -> dict[str, Any]:
    record = lost.record
    return {
        "job": lost.job.number,
        "name": lost.job.name,
        "rows": lost.job.rows,
        "base_step": record and record.base_step,
        "target_step": record and record.target_step,
        "finished_at": record and record.finished_at,
        "file": str(lost.file.relative_to(home.root)) if lost.file else None,
        "done_steps": lost.done_steps,
    }


def _missing_lines(home: Home, found: list[Missing]) -> Iterator[str]:
    width = max(len("file"), *(len(printable(lost.job.name)) for lost in found))
    yield f"{'job':>5}  {'file':<{width}}  {'rows':>7}  {'steps':>13}  {'trained (UTC)':<19}  where it is now"
    for lost in found:
        record = lost.record
        steps = f"{record.base_step + 1}-{record.target_step}" if record else "?"
        when = record.finished_at[:19].replace("T", " ") if record else "?"
        file = f"{printable(lost.job.name):<{width}}  {lost.job.rows:>7}"
        yield f"{lost.job.number:>5}  {file}  {steps:>13}  {when:<19}  {_place(home, lost)}"
    yield "`daemon.py retry --missing` trains them again, in this order"
    yield "`backup_manager.py list` shows what can be restored"


def _place(home: Home, lost: Missing) -> str:
    """Where the file is, and what the model has of it."""
    place = str(lost.file.relative_to(home.root)) if lost.file else _why_lost(home, lost)
    planned = f" of {lost.record.planned_steps}" if lost.record else ""
    return f"{place}; the model has its first {lost.done_steps}{planned} steps" if lost.done_steps else place


def _why_lost(home: Home, lost: Missing) -> str:
    if (home.trained / lost.job.name).exists():
        return f"nowhere: trained/{lost.job.name} has other bytes by now"
    return "nowhere: it is gone from trained/"


def pause(home: Home) -> int:
    home.check()
    home.make()
    requests.make(home, requests.PAUSE)
    running = locks.holder(home.daemon_lock) is not None
    say(
        "pausing at the next step boundary, after a checkpoint; `daemon.py resume` goes on"
        if running
        else "no daemon is running; the next one will start paused, until `daemon.py resume`"
    )
    return ExitCode.OK


def resume(home: Home) -> int:
    if not requests.clear(home, requests.PAUSE):
        say("it was not paused")
    elif locks.holder(home.daemon_lock) is None:
        say("the next daemon will train")
    else:
        say("training goes on")
    return ExitCode.OK


def stop(home: Home, *, now: bool) -> int:
    """Ask the daemon to leave and wait until it has."""
    _check_running(home)
    requests.make(home, requests.STOP, now=now)
    say("stopping at once" if now else "stopping at the next step boundary, after a checkpoint ...")
    try:
        while locks.holder(home.daemon_lock) is not None:
            time.sleep(LOOK_S)
    except KeyboardInterrupt:
        say("the daemon leaves all the same; `daemon.py status` tells when it has")
        raise
    say("stopped")
    return ExitCode.OK


def skip(home: Home) -> int:
    """End the training of the running file, and of no other."""
    _check_running(home)
    current = status.read(home)["current"]
    if not current:
        raise LongrunError("cannot skip: no file is being trained", hint="see `daemon.py status`")
    requests.make(home, requests.SKIP, job=current["job"])
    say(f"skipping {printable(current['file'])} at the next step boundary; rejected/ will say which rows were trained")
    return ExitCode.OK


def _check_running(home: Home) -> None:
    if locks.holder(home.daemon_lock) is None:
        raise NotRunning(f"no daemon runs on {home.root}", hint="start it with `python daemon.py run`")


def retry(home: Home, names: list[str]) -> int:
    """Put rejected files, or copies of trained ones, into the inbox again: each trains as a new job."""
    for name in names:
        _retry_one(home, name)
    return ExitCode.OK


def _retry_one(home: Home, name: str) -> None:
    from longrun import archive

    try:
        target = archive.drop_again(home, name)
    except FileNotFoundError:
        near = sorted(path.name for path in home.rejected.glob("*") if not path.name.endswith(archive.REASON))
        raise LongrunError(
            f"cannot retry {name}: it is neither in rejected/ nor in trained/",
            hint=f"rejected: {', '.join(near[:5]) or 'nothing'}",
        ) from None
    say(f"inbox/{printable(target.name)} will train from its first row")


def retry_missing(home: Home) -> int:
    """Have the missing files trained again as the jobs they were; FAILURE if the bytes of one are gone."""
    from longrun import missing

    found = missing.look(home)
    if not found:
        say(NOTHING_MISSING)
        return ExitCode.OK
    there = [lost for lost in found if lost.file]
    if there:
        requests.make(home, requests.RETRY, jobs=[lost.job.number for lost in there])
        running = locks.holder(home.daemon_lock) is not None
        say(f"{len(there)} will train again, {'in' if running else 'by the next daemon, in'} this order:")
    for lost in there:
        rest = f", from step {lost.done_steps + 1} of it" if lost.done_steps else ""
        say(f"    {printable(lost.job.name)} ({counted(lost.job.rows, 'row')}{rest})")
    gone = [lost for lost in found if not lost.file]
    for lost in gone:
        say(printable(f"{lost.job.name} cannot be trained again: {_why_lost(home, lost).removeprefix('nowhere: ')}"))
    return ExitCode.FAILURE if gone else ExitCode.OK


def reset(home: Home, flags: dict[str, Any], *, yes: bool) -> int:
    """Back the model up, verified, and remove it: the next file trains from the base model at step 0."""
    import shlex

    from longrun import config
    from longrun.backups import back_up
    from longrun.manifest import BackupType
    from longrun.replacing import alone_with_model
    from longrun.store import Store
    from longrun.worker import PROGRAM

    settings = config.load(home.settings, flags=flags)
    store = Store(settings.backup.folder(home.root))
    step = status.published_step(home)
    if not home.model.is_dir() and locks.holder(home.training_lock) is None:
        raise LongrunError(f"cannot reset {home.root}: there is no {home.model.name}/", hint="nothing is to be done")
    if not yes:
        _ask(f"Back up the model at global step {step} and begin anew? [y/N] ")
    home.make()
    hint = "`daemon.py stop` or `daemon.py pause` first, or wait until no file is being trained"
    with alone_with_model(home, "reset", hint=hint):
        saved = back_up(store, home.model, BackupType.PRE_RECOVERY, reason="reset")
        another = _another_base(home, settings)
        disk.remove_tree(home.model.resolve(), home.staging)
    for fault in saved.manifest.faults:
        say(f"the model was INCOMPLETE, and is stored as it was: {printable(fault)}")
    say(f"backup {saved.manifest.id} is verified; the model is removed, the next file trains from the base model")
    if another:
        say(printable(another))
    say("`daemon.py retry --missing` trains all files again that were trained to their end, in their order")
    words = ["python3", str(PROGRAM.with_name("backup_manager.py")), "restore", saved.manifest.id]
    say(f"to have the model back: {shlex.join([*words, '--home', str(home.root)])}")
    return ExitCode.OK


def _another_base(home: Home, settings: Settings) -> str:
    """What to know where the next model would begin from another base model than this one; "" where it would not."""
    from longrun import config, missing

    try:
        lineage = missing.published_lineage(home)
    except BadModel:
        return ""  # nobody can tell
    if lineage is None or not config.is_other_base(settings, lineage, home.root):
        return ""
    base = unpinned(lineage.base_model)
    running = locks.holder(home.daemon_lock) is not None
    return (
        f"it grew from {base}, and the settings name {settings.model.base_model}: to begin from {base} again, set"
        f' base_model = "{base}" below [model] in longrun.toml before the next file is trained'
        + ("; the daemon that runs goes by its --base-model, if it was given one" if running else "")
    )


def _ask(question: str) -> None:
    """Go on only after a yes from a person."""
    if not sys.stdin.isatty():
        raise LongrunError("cannot ask: there is no terminal", hint="--yes does it without asking")
    try:
        answer = input(question)
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise LongrunError("nothing was changed")


def put(home: Home, files: list[Path]) -> int:
    """Copy files into the inbox so that they appear there whole."""
    from longrun import archive

    for file in files:
        archive.check_accepted(file, "put")
    home.check()
    disk.make_folder(home.inbox)
    for file in files:
        say(printable(str(archive.put(home, file))))
    if locks.holder(home.daemon_lock) is None:
        say(f"no daemon is running in {home.root}: `daemon.py run` there trains what is in its inbox")
    return ExitCode.OK


def check(home: Home, file: Path, flags: dict[str, Any]) -> int:
    """Examine a file as the daemon would, without training it."""
    from longrun import archive, config
    from longrun.examine import examine
    from longrun.plan import make_plan

    archive.check_accepted(file, "check")
    settings = config.load(home.settings, flags=flags)
    before = status.before(home)
    try:
        found = examine(file, on_bad_row=settings.inbox.on_bad_row, max_line_bytes=settings.inbox.max_line_bytes)
        plan = make_plan(
            job=0,
            name=file.name,
            sha256=found.sha256,
            trainable_rows=found.rows,
            base_step=before.step,
            recipe=settings.recipe,
        )
    except BadFile as error:
        say(f"{file}: would be rejected: {printable(str(error))}")
        if error.extract:
            say(f"    {printable(error.extract)}")
        return ExitCode.FAILURE
    say(f"{file}: good. {counted(found.rows, 'row')} ({found.format}), {counted(found.size_bytes, 'byte')}")
    for note in found.notes:
        say(f"    {printable(note)}")
    for problem in found.skipped:
        say(f"    skipped: line {problem.get('line')}: {printable(problem['why'])}")
    for remark in before.remarks:
        say(f"    {printable(remark)}")
    say(plan.sentence + " unless rows turn out to have no token to learn from")
    return ExitCode.OK


def logs(home: Home, *, follow: bool) -> int:
    """The end of the log; with `follow`, what comes too, over rotations."""
    import subprocess

    if not home.log.exists():
        raise LongrunError(f"there is no log yet at {home.log}", hint="start the daemon with `python daemon.py run`")
    command = ["tail", "-n", str(TAIL_LINES), *(["-F"] if follow else []), str(home.log)]
    with contextlib.suppress(KeyboardInterrupt):
        subprocess.run(command, check=False)
    return ExitCode.OK
