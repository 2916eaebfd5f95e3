"""Disks that are really full, read-only or slow, and a daemon that runs out of open files: nothing is lost."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from longrun import status
from longrun.home import Home
from tests.drills.apart import BIND, READ_ONLY, REMOUNT, Apart, mount, refusal, small_disk, unmount
from tests.drills.campaign import FULL
from tests.drills.daemons import Watched
from tests.drills.faults import EVER_AFTER, SLOW
from tests.drills.test_daemon_kills import ROLES, struck

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FILES = (("a", 20), ("b", 1), ("c", 60))
LIMIT_S = 60.0
TIMES = 20


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    why = refusal()
    if why:
        pytest.skip(why)
    with Apart(tmp_path_factory.mktemp("apart")) as found:
        yield found


def test_a_trouble_that_passes_costs_no_file_and_no_row(campaign, apart):
    cases = [(trouble, moment) for _ in range(TIMES) for trouble in TROUBLES for moment in MOMENTS]

    def attempt(case, dice):
        apart.play(failing, case, dice, campaign)

    campaign.run(
        "4: a disk that is really full or read-only, or no more open files, for a while", cases, attempt, small=2
    )


def test_what_no_file_can_help_rejects_none(campaign, quick):
    cases = [(role, at, how) for role, at in REFUSING.items() for how in ("EMFILE", "ENFILE", "EROFS", "ENOSPC")]

    def attempt(case, dice):
        role, at, how = case
        lab = Watched(quick / f"refusing-{role}-{how}")
        try:
            for name, rows in FILES:
                lab.drop_rows(name, rows)
            daemon = lab.start(faults=[{"at": at, "role": role, "do": how, "nth": 0}])
            lab.wait_until(lambda: "paused: disk" in lab.log or lab.names("rejected"), LIMIT_S)
            time.sleep(dice.uniform(1.0, 2.0))  # it tries again all the while
            assert not lab.names("rejected"), lab.log
            lab.wait_until(lambda: "paused: disk" in "".join(status.read(Home(lab.home))["problems"]), LIMIT_S)
            assert "solved: the disk takes" not in lab.log, lab.log
            lab.kill(daemon)
            assert lab.drain() == 0, lab.log
            lab.check()
        finally:
            lab.close()

    campaign.run("4: a child that is refused everything costs no file an attempt", cases, attempt, small=2)


def test_a_slow_disk_costs_no_attempt_no_file_and_no_row(campaign, quick, hand):
    cases = [(role, number, SLOW) for role in ROLES for number in range(1, 200, 7)]
    if FULL:  # minutes each
        cases += [(role, 1, SLOW + EVER_AFTER) for role in ROLES] * 3

    def attempt(case, dice):
        lab = struck(hand, quick / "struck", *case)
        troubles = [event for event in lab.events if event["event"] in ("retry", "problem", "rejected")]
        assert not troubles, troubles
        campaign.note("slowed", lab.was_struck)

    campaign.run("4: calls that change the disk take up to 0.3 s longer", cases, attempt, small=1)


def failing(folder, dice, note, trouble, moment):
    """A daemon whose trouble begins at this moment and is over later; it pauses, or ends with a sentence."""
    begin, end, why = TROUBLES[trouble]
    with small_disk(folder / "disk", ROOMY) as disk:
        lab = OnSmallDisk(disk, aside=folder)
        try:
            for name, rows in FILES:
                lab.drop_rows(name, rows)
            daemon = lab.started_with(lambda: begin(lab, dice), MOMENTS[moment], dice)
            lab.wait_until(lambda: lab.is_paused or lab.is_all_trained or daemon.poll() is not None, LIMIT_S)
            note("ended" if daemon.poll() is not None else "paused" if lab.is_paused else "trained all the same")
            time.sleep(dice.uniform(0.0, 0.5))
            end(lab)
            if daemon.poll() is not None:
                lab.check_ended_with_a_sentence(daemon, why)
                daemon = lab.start()
            lab.wait_until(lambda: lab.is_all_trained or daemon.poll() is not None, LIMIT_S)
            daemon.send_signal(signal.SIGTERM)
            if daemon.wait(LIMIT_S):  # trained all, and was on its way out when the trouble was taken away
                lab.check_ended_with_a_sentence(daemon, why)
            assert "Traceback" not in lab.told, lab.told
            lab.check()
        except AssertionError as error:
            raise AssertionError(f"{error}\nit told:\n{lab.told}") from error
        finally:
            lab.close()


class OnSmallDisk(Watched):
    """A home that fills a file system; what the drill itself writes lies elsewhere."""

    def __init__(self, home: Path, *, aside: Path, **settings: Any) -> None:
        super().__init__(home, **settings)
        self.stderr = aside / "stderr.log"
        self.probe.rmdir()
        self.probe = aside / "probe"
        self.probe.mkdir()

    def started_with(self, begin: Callable[[], None], what: str | None, dice: Any) -> Any:
        if what is None:
            begin()
            return self.start()
        daemon = self.start(LONGRUN_STEP_S="0.1")
        if what == "any":
            time.sleep(dice.uniform(0.2, 1.5))
        while what != "any" and not (any(self.home.glob(what)) or self.is_all_trained) and daemon.poll() is None:
            time.sleep(0.001)
        begin()
        return daemon

    @property
    def told(self) -> str:
        return self.stderr.read_text()

    @property
    def is_paused(self) -> bool:
        """Told in status, too; its state is another one for a moment whenever the daemon tries again.

        Not where there was no room for a first note in all the daemon's life: no file can be made without an inode.
        """
        home = Home(self.home)
        in_status = not home.status.exists() or "paused: " in "".join(status.read(home)["problems"])
        return in_status and "paused: " in self.told

    @property
    def is_all_trained(self) -> bool:
        return len(self.names("trained")) == len(self.dropped)

    def check_ended_with_a_sentence(self, daemon: Any, why: str) -> None:
        """One that names the trouble, and a code after which a system starts it again."""
        assert daemon.returncode == 1, self.told
        assert re.search(f"daemon.py: .*({why}).*\n\\Z", self.told), self.told


# -- troubles


def fill(lab, dice):
    """Leave no room, or a few pages."""
    shrink(
        lab.home, lambda found: f"size={(found.f_blocks - found.f_bfree + dice.choice((0, 0, 1, 10))) * found.f_frsize}"
    )


def use_up_inodes(lab, dice):
    shrink(lab.home, lambda found: f"nr_inodes={found.f_files - found.f_ffree + dice.choice((0, 0, 1, 5))}")


def shrink(disk, options):
    """To about what is used now; refused where more is used by then."""
    insist(lambda: mount(disk, options(os.statvfs(disk)), flags=REMOUNT))


def insist(remount):
    """Until it is not refused for what somebody writes at that moment."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            return remount()
    raise AssertionError("the disk cannot be mounted otherwise")


def make_roomy(lab):
    mount(lab.home, ROOMY, flags=REMOUNT)


def make_read_only(lab, dice):
    """What is open for writing stays so: under it no file system becomes read-only."""
    mount(lab.home, source=lab.home, flags=BIND)
    insist(lambda: mount(lab.home, flags=REMOUNT | BIND | READ_ONLY))


def make_writable(lab):
    unmount(lab.home)


def limit_open_files(lab, dice):
    """To some of those that are open, or to few for a daemon that is yet to start, and for its children."""
    if not lab.daemons:
        lab.under = ("prlimit", f"--nofile={dice.randint(*FEW_OPEN_FILES)}:{OPEN_FILES}")
    elif lab.daemons[0].poll() is None:
        resource.prlimit(lab.daemons[0].pid, resource.RLIMIT_NOFILE, (dice.randint(3, FEW_OPEN_FILES[1]), OPEN_FILES))


def allow_open_files(lab):
    lab.under = ()
    if lab.daemons[0].poll() is None:
        resource.prlimit(lab.daemons[0].pid, resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))


OPEN_FILES = 1024
FEW_OPEN_FILES = (6, 24)
ROOMY = "size=80m,nr_inodes=4000"
TROUBLES = {
    "full": (fill, make_roomy, "No space left|is full|disk I/O error; see to it .* has room"),
    "no inodes": (use_up_inodes, make_roomy, "No space left|unable to open database file"),
    "open files": (limit_open_files, allow_open_files, "Too many open files|unable to open database file"),
    "read only": (make_read_only, make_writable, "Read-only|readonly|unable to open database file"),
}
REFUSING = {"preparer": "longrun.disk:sync_tree", "worker": "longrun.checkpoint:OpenModel.commit"}
# What there is in the home at this moment; None: the daemon is not started yet.
MOMENTS = {
    "before the start": None,
    "starting": "state/daemon.lock",
    "claiming": "state/jobs/0*",
    "preparing": "state/jobs/0*/*prepared*",
    "saving": "state/staging/checkpoint-*",
    "saved": "current_model/checkpoint-*",
    "any": "any",
}
