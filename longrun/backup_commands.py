"""What backup_manager.py does, command by command. Standard library only, but for archives, URLs and the bar.

A command imports what it alone needs: half of the time that `list` takes is Python's, for imports.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from longrun import config
from longrun.errors import BadBackup, ExitCode
from longrun.home import Home, find_home
from longrun.manifest import BackupType, Manifest
from longrun.replacing import alone_with_model
from longrun.retention import Keep
from longrun.store import LATEST, Store, telling
from longrun.wording import counted, printable, unpinned

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from longrun.backups import Saved
    from longrun.transfer import Remote

NAME = "backup_manager.py"


def do(args: argparse.Namespace) -> int:
    """Do what was asked for; the exit code."""
    return _COMMANDS[args.command](args, _home(args))


def _home(args: argparse.Namespace) -> Home:
    """--home or LONGRUN_HOME, else the home that SOURCE is the model of, else the current directory."""
    if args.command == "backup" and args.source and args.home is None and "LONGRUN_HOME" not in os.environ:
        beside = Path(os.path.abspath(args.source)).parent  # noqa: PTH100 - not through the link that a model may be
        if (beside / "state").is_dir():
            return Home(beside)
    return find_home(args.home)


def _store(args: argparse.Namespace, home: Home) -> Store:
    if args.store and _is_url(args.store):
        raise BadBackup(
            f"cannot {args.command} with the store {args.store}: only `list` and `verify` look at a URL directly",
            hint="keep backups in a folder; `export ID URL` and `import URL` copy them",
        )
    if args.store:
        return Store(config.expanded(args.store).resolve())
    home.check()
    return Store(config.load(home.settings, only="backup").backup.folder(home.root))


def _keep(args: argparse.Namespace, home: Home) -> Keep:
    """Retention as the home says; of a store that is named without a home, the defaults."""
    return config.load(home.settings, only="backup").backup.keep if home.settings.exists() or not args.store else Keep()


def _backup(args: argparse.Namespace, home: Home) -> int:
    from longrun import backups

    store = _store(args, home)
    with Bar(args.json) as bar:
        saved = backups.back_up(
            store,
            Path(args.source or home.model),
            BackupType(args.type),
            reason=args.reason,
            follow=args.follow,
            on_start=bar.start,
            on_bytes=bar.add,
        )
    manifest = saved.manifest
    source = Path(manifest.source)
    place = home.root / f"{source.name}-restored" if manifest.is_checkpoint else source
    again = _restore_command(args, home, manifest.id, place)
    facts = manifest.facts() | {
        "store": str(store.root),
        "new_bytes": saved.new_bytes,
        "healed": len(saved.healed),
        "seconds": round(saved.seconds, 3),
        "restore": again,
    }
    is_another = not manifest.is_checkpoint and home.model.exists() and source != home.model.resolve()
    _say(args, facts, _saved_lines(saved, again, f"it is {source}, and not {home.model}" if is_another else ""))
    if not manifest.complete:
        raise BadBackup(f"{source} is stored, but it is not a whole model", hint="keep it until you have a better one")
    return ExitCode.OK


def _saved_lines(saved: Saved, again: str, remark: str) -> Iterator[str]:
    manifest = saved.manifest
    step = "of no known step" if manifest.global_step is None else f"at global step {manifest.global_step}"
    yield (
        f"backup {manifest.id} is complete and verified: a model {step}"
        if manifest.complete
        else (f"backup {manifest.id} is stored and verified, but the model in it is INCOMPLETE:")
    )
    yield from (f"    {line}" for line in (*manifest.faults, *([remark] if remark else [])))
    yield (
        f"    {counted(len(manifest.files), 'file')}, {_size(manifest.size_bytes)};"
        f" {_size(saved.new_bytes)} newly stored, in {saved.seconds:.1f} s"
    )
    if saved.healed:
        yield f"    {len(saved.healed)} damaged contents in the store are whole again"
    yield f"to restore it: {again}"


def _restore_command(args: argparse.Namespace, home: Home, backup: str, place: Path) -> str:
    """What to type from here to have the backup in this place."""
    words = [*_program(), "restore", backup]
    if place != home.model.resolve():
        words.append(str(place))
    if args.store:
        words += ["--store", args.store]
    if home.root != find_home(None).root:
        words += ["--home", str(home.root)]
    return shlex.join(words)


def _program() -> list[str]:
    """How this program is called from here."""
    there = Path(__file__).resolve().parent.parent / NAME
    return ["python3", NAME if there.parent == Path.cwd() else str(there)]


def _list(args: argparse.Namespace, home: Home) -> int:
    catalogue = _catalogue(args, home)
    found = [backup for backup in catalogue.all() if args.type in (None, backup.type)]
    unreadable = sorted(set(catalogue.ids()) - {backup.id for backup in catalogue.all()})
    bases = {backup.base_model for backup in found}
    _say(
        args,
        {"store": catalogue.place, "backups": [backup.facts() for backup in found], "unreadable": unreadable},
        [
            *(_line(backup, base=len(bases) > 1) for backup in found),
            *(f"{backup}  DAMAGED: see `verify`" for backup in unreadable),
        ]
        or ["there are no backups"],
    )
    return ExitCode.OK


def _catalogue(args: argparse.Namespace, home: Home) -> Store | Remote:
    if args.store and _is_url(args.store):
        from longrun import transfer

        return transfer.Remote(args.store)
    return Store.open(_store(args, home).root)


def _is_url(text: str) -> bool:
    return "://" in text


def _line(backup: Manifest, *, base: bool = False) -> str:
    """The backup on one line; with `base`, what the model in it grew from."""
    when = datetime.fromisoformat(backup.created).astimezone().strftime("%Y-%m-%d %H:%M")
    step = "step ?" if backup.global_step is None else f"step {backup.global_step}"
    told = [_grown(backup)] if base and backup.base_model else []
    told += [backup.reason] if backup.reason else []
    told += [] if backup.complete else [f"INCOMPLETE: {backup.faults[0]}"]
    return f"{backup.id}  {when}  {step:<12} {_size(backup.size_bytes):>9}  {'; '.join(told)}".rstrip()


def _grown(backup: Manifest) -> str:
    return f"grown from {unpinned(backup.base_model or '')}"


def _verify(args: argparse.Namespace, home: Home) -> int:
    catalogue = _catalogue(args, home)
    wanted = [catalogue.find(args.id).id] if args.id else None
    with contextlib.ExitStack() as stack:
        if isinstance(catalogue, Store):
            stack.enter_context(telling("verify"))
            stack.enter_context(catalogue.using("verify"))
        looked_at = catalogue.all() if wanted is None else [catalogue.read(backup) for backup in wanted]
        sizes = {digest: size for backup in looked_at for digest, size in backup.digests.items()}
        bar = stack.enter_context(Bar(args.json or args.quick))
        bar.start(sum(sizes.values()))
        damage = catalogue.damage(wanted, quick=args.quick, on_bytes=bar.add)
    how = "manifests and sizes" if args.quick else "every byte"
    lines = [f"DAMAGED  {found}" for found in damage]
    lines += dict.fromkeys(found.fix for found in damage if found.fix)
    if not damage:
        what = f"{counted(len(looked_at), 'backup')}, {counted(len(sizes), 'content')}"
        lines = [f"{what}, {_size(sum(sizes.values()))}: all good ({how})"]
    facts = {"backups": [backup.id for backup in looked_at], "bytes": sum(sizes.values()), "quick": args.quick}
    _say(args, facts | {"damage": [asdict(found) for found in damage]}, lines)
    return ExitCode.FAILURE if damage else ExitCode.OK


def _restore(args: argparse.Namespace, home: Home) -> int:
    from longrun import backups

    store = Store.open(_store(args, home).root)
    manifest = store.find(args.id) if args.target or args.id != LATEST else store.latest_model()
    target = Path(args.target) if args.target else home.model
    to_train_on = _home_of_model(target, home)
    if to_train_on and manifest.is_checkpoint:
        raise BadBackup(
            f"cannot restore {manifest.id} to {target}: it is one checkpoint, and no whole model to go on from",
            hint="name another TARGET",
        )
    with _alone(to_train_on, args.when_idle), Bar(args.json) as bar:
        bar.start(manifest.size_bytes)
        former = backups.restore(store, manifest, target, on_bytes=bar.add)
    facts: dict[str, Any] = {
        "id": manifest.id,
        "target": str(target.resolve()),
        "replaced": former and str(former),
    }
    facts |= {"global_step": manifest.global_step, "complete": manifest.complete, "faults": list(manifest.faults)}
    lines = [f"{target} is {manifest.id} now, every byte verified"]
    if manifest.base_model:
        lines.append(f"    a model at global step {manifest.global_step}, {_grown(manifest)}")
    lines += [f"    but it was INCOMPLETE when it was backed up: {fault}" for fault in manifest.faults]
    if former:
        lines.append(f"what was there is kept as {former}; delete it when you are sure")
    if home.ledger.exists() and target.resolve() == home.model.resolve():
        lines.append("`daemon.py missing` lists the files that this model has not seen")
    _say(args, facts, lines)
    return ExitCode.OK


def _home_of_model(target: Path, home: Home) -> Home | None:
    """The home whose model the target is; None for any other folder."""
    target = Path(os.path.abspath(target))  # noqa: PTH100 - not through the link that current_model may be
    beside = Home(target.parent)
    if target == beside.model and beside.state.is_dir():
        return beside
    return home if target.resolve() == home.model.resolve() and home.state.is_dir() else None


def _alone(home: Home | None, wait: bool) -> contextlib.AbstractContextManager[None]:
    hint = "--when-idle waits until no file is being trained; `daemon.py stop` ends training now"
    return alone_with_model(home, "restore", wait=wait, hint=hint) if home else contextlib.nullcontext()


def _prune(args: argparse.Namespace, home: Home) -> int:
    store = Store.open(_store(args, home).root)
    with telling("prune"):
        pruned = store.prune(args.ids, _keep(args, home), execute=args.execute)
    verb = "removed" if args.execute else "would remove"
    lines = [f"{verb}  {_line(backup)}" for backup in pruned.backups]
    freed = _size(pruned.freed_bytes)
    if pruned.backups or pruned.freed_bytes:
        lines.append(f"{freed} freed" if args.execute else f"{freed} would be freed; --execute does it")
    else:
        lines.append("there is nothing to remove")
    facts = {"removed": [backup.id for backup in pruned.backups], "freed_bytes": pruned.freed_bytes}
    _say(args, facts | {"executed": args.execute}, lines)
    return ExitCode.OK


def _export(args: argparse.Namespace, home: Home) -> int:
    from longrun import transfer

    store = Store.open(_store(args, home).root)
    manifest = store.find(args.id)
    if (
        not _is_url(args.target)
        and args.target.endswith(transfer.NO_ARCHIVES)
        and not args.target.endswith(transfer.ARCHIVES)
    ):
        raise BadBackup(f"cannot export to {args.target}: an archive is a .tar or .tar.zst", hint="name one of these")
    with Bar(args.json) as bar:
        bar.start(sum(manifest.digests.values()) if _is_url(args.target) else manifest.size_bytes)
        if _is_url(args.target):
            transfer.Remote(args.target).push(store, manifest, bar.add)
        elif args.target.endswith(transfer.ARCHIVES):
            transfer.export_archive(store, manifest, Path(args.target), bar.add)
        else:
            transfer.export_folder(store, manifest, Path(args.target), bar.add)
    again = shlex.join([*_program(), "import", args.target])
    _say(
        args,
        {"id": manifest.id, "target": args.target, "bytes": manifest.size_bytes},
        [f"{manifest.id} is in {args.target}, verified", f"to bring it into another store: {again}"],
    )
    return ExitCode.OK


def _import(args: argparse.Namespace, home: Home) -> int:
    from longrun import transfer

    store = _store(args, home)
    with Bar(args.json) as bar:
        if _is_url(args.source):
            remote = transfer.Remote(args.source)
            found = remote.find(args.id or LATEST)
            bar.start(sum(found.digests.values()))
            manifest = remote.pull(store, found, bar.add)
        elif args.id:
            raise BadBackup(f"cannot choose {args.id} in {args.source}: it is no URL", hint="leave the ID out")
        elif args.source.endswith(transfer.ARCHIVES):
            manifest = transfer.import_archive(store, Path(args.source), bar.add)
        else:
            manifest = transfer.import_folder(store, Path(args.source), bar.add)
    again = _restore_command(args, home, manifest.id, home.model.resolve())
    _say(
        args,
        manifest.facts() | {"store": str(store.root)},
        [f"{manifest.id} is in {store.root}, every byte verified", f"to restore it: {again}"],
    )
    return ExitCode.OK


_COMMANDS: dict[str, Callable[[argparse.Namespace, Home], int]] = {
    "backup": _backup,
    "list": _list,
    "verify": _verify,
    "restore": _restore,
    "prune": _prune,
    "export": _export,
    "import": _import,
}


# -- telling


def _say(args: argparse.Namespace, facts: dict[str, Any], lines: Any) -> None:
    """The facts for a machine, or the lines for a person."""
    texts = [json.dumps(facts, indent=1)] if args.json else [printable(line) for line in lines]
    for text in texts:
        print(text, flush=True)  # noqa: T201


def _size(count: float) -> str:
    units = iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while count >= 1000 and unit != "TB":
        count, unit = count / 1000, next(units)
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


class Bar:
    """Bytes done, of how many, and the time left, where a person looks on."""

    def __init__(self, hidden: bool) -> None:
        self._hidden = hidden or not sys.stderr.isatty()
        self._bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, total: int) -> None:
        """Begin, or begin again with another total."""
        if self._hidden:
            return
        with contextlib.suppress(ModuleNotFoundError):  # a bar is no reason to go without a backup
            from tqdm import tqdm

            self.__exit__()
            self._bar = tqdm(total=total, unit="B", unit_scale=True, leave=False)

    def add(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)
