from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrun.manifest import BackupType, Manifest
from longrun.retention import Keep, expendable
from tests.unit.test_manifest import manifest_of

START = datetime(2026, 1, 1, 12, tzinfo=UTC)  # a Thursday
SCHEDULED, PRE_RESTORE = BackupType.SCHEDULED, BackupType.PRE_RESTORE
NOTHING = {"last": 0, "daily": 0, "weekly": 0, "monthly": 0, "pre_restore": 0}


def backup(number: int, kind: BackupType = SCHEDULED, *, hours: float = 0, whole: bool = True) -> Manifest:
    when = START + timedelta(hours=hours)
    return manifest_of(
        id=f"{when:%Y%m%dT%H%M%SZ}-{kind}-{number:06x}",
        sequence=number,
        type=kind,
        created=when.isoformat(),
        faults=() if whole else ("it is cut off",),
    )


def kept(backups: list[Manifest], **keep: int) -> list[int]:
    """The numbers of those that stay."""
    gone = expendable(backups, Keep(**NOTHING | keep))
    assert gone == sorted(gone, key=lambda found: found.sequence)
    return [found.sequence for found in backups if found not in gone]


@pytest.mark.parametrize(
    ("keep", "hours", "stay"),
    [
        ({}, [0, 1, 2], [3]),  # the newest complete one, always
        ({"last": 2}, [0, 1, 2], [2, 3]),
        ({"last": 9}, [0, 1, 2], [1, 2, 3]),
        ({"daily": 2}, [0, 1, 24, 25, 48, 49], [4, 6]),
        ({"daily": 2}, [0, 24, 24 * 30], [2, 3]),  # of days in which there is one
        ({"weekly": 2}, [0, 24, 24 * 4, 24 * 5, 24 * 11], [4, 5]),  # weeks begin on Monday
        ({"monthly": 2}, [0, 24 * 30, 24 * 31, 24 * 60], [3, 4]),
        ({"monthly": 2}, [24 * 58, 24 * 59], [1, 2]),
        ({"last": 1, "daily": 2, "monthly": 2}, [0, 24 * 31, 24 * 32, 24 * 32 + 1], [1, 2, 4]),
        ({"daily": 1}, [24, 48, 25], [3]),  # the clock went back a day
    ],
)
def test_scheduled_backups_are_thinned_out(keep: dict[str, int], hours: list[float], stay: list[int]) -> None:
    assert kept([backup(number, hours=at) for number, at in enumerate(hours, 1)], **keep) == stay


@pytest.mark.parametrize("kind", [BackupType.MANUAL, BackupType.PRE_RECOVERY])
def test_what_a_person_asked_for_stays(kind: BackupType) -> None:
    assert kept([backup(1, kind), backup(2), backup(3, kind, whole=False), backup(4)]) == [1, 3, 4]


def test_backups_from_before_a_restore_are_counted_apart() -> None:
    made = [backup(1, PRE_RESTORE), backup(2, PRE_RESTORE), backup(3, PRE_RESTORE), backup(4)]
    assert kept(made, pre_restore=2) == [2, 3, 4]


def test_the_newest_complete_backup_stays_behind_incomplete_ones() -> None:
    assert kept([backup(1), backup(2), backup(3, whole=False)], last=1) == [2, 3]
    assert kept([backup(1, whole=False), backup(2, whole=False)], last=1) == [2]


def test_order_is_that_of_the_store_whatever_the_clock_did() -> None:
    made = [backup(3, hours=0), backup(1, hours=48), backup(2, hours=24)]
    assert kept(made, last=1) == [3]


def test_nothing_is_expendable_of_nothing() -> None:
    assert expendable([], Keep()) == []


FACTS = st.lists(
    st.tuples(st.sampled_from(BackupType), st.integers(0, 24 * 400), st.booleans()),
    max_size=30,
)
KEEPS = st.builds(Keep, **{name: st.integers(0, 4) for name in NOTHING})


@given(facts=FACTS, keep=KEEPS, in_order=st.booleans())
def test_whatever_there_is_the_important_stays_and_the_rest_is_bounded(
    facts: list[tuple[Any, int, bool]], keep: Keep, in_order: bool
) -> None:
    ordered = sorted(facts, key=lambda fact: fact[1]) if in_order else facts
    made = [backup(n, kind, hours=hours, whole=whole) for n, (kind, hours, whole) in enumerate(ordered, 1)]
    gone = expendable(made, keep)
    stays = [found for found in made if found not in gone]
    assert {found.type for found in gone} <= {SCHEDULED, PRE_RESTORE}
    assert [found for found in made if found.complete][-1:] == [found for found in stays if found.complete][-1:]
    bounds = {SCHEDULED: keep.last + keep.daily + keep.weekly + keep.monthly, PRE_RESTORE: keep.pre_restore}
    for kind, most in bounds.items():
        assert len([found for found in stays if found.type is kind]) <= most + 1  # the newest complete one
    assert expendable(stays, keep) == []
