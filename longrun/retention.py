"""Which backups may go. Pure: what there is and how much to keep in, what is expendable out.

Only backups that the daemon makes by itself are thinned out (and those from before a restore): the newest few,
and beyond them one a day, week and month. What a person asked for goes only when it is named.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, TypeVar

from longrun.manifest import BackupType

if TYPE_CHECKING:
    from collections.abc import Iterable

    from longrun.manifest import Manifest

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Keep:
    """How many scheduled backups stay: the newest `last`, and the newest of each of so many days, weeks, months."""

    last: int = 3
    daily: int = 7
    weekly: int = 4
    monthly: int = 6
    pre_restore: int = 3


def expendable(backups: Iterable[Manifest], keep: Keep) -> list[Manifest]:
    """Backups that retention does not keep, oldest first. The newest complete one of all is never among them."""
    ordered = sorted(backups, key=lambda backup: backup.sequence)
    newest_whole = next((backup.id for backup in reversed(ordered) if backup.complete), None)
    scheduled = [backup for backup in ordered if backup.type is BackupType.SCHEDULED]
    pre_restore = [backup for backup in ordered if backup.type is BackupType.PRE_RESTORE]
    kept = {newest_whole} | _kept(scheduled, keep) | {backup.id for backup in _newest(pre_restore, keep.pre_restore)}
    return [backup for backup in ordered if backup in (*scheduled, *pre_restore) and backup.id not in kept]


def _kept(scheduled: list[Manifest], keep: Keep) -> set[str]:
    chosen = {backup.id for backup in _newest(scheduled, keep.last)}
    for count, period in ((keep.daily, "%Y-%m-%d"), (keep.weekly, "%G week %V"), (keep.monthly, "%Y-%m")):
        chosen |= _newest_of_each(scheduled, count, period)
    return chosen


def _newest_of_each(backups: list[Manifest], count: int, period: str) -> set[str]:
    """The newest backup of each of the last `count` periods (a strftime format) in which there is one."""
    newest: dict[str, str] = {}
    for backup in backups:
        name = datetime.fromisoformat(backup.created).strftime(period)
        newest.pop(name, None)  # in the order of their last backups, whatever the clock did
        newest[name] = backup.id
    return set(_newest(list(newest.values()), count))


def _newest(items: list[T], count: int) -> list[T]:
    return items[-count:] if count else []
