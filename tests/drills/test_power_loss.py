"""The power fails: whatever the disk then lacks of what was not synced, all that was reported done is there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.drills import power
from tests.drills.daemons import Watched
from tests.lab import REPOSITORY, Lab, numbered

LIMIT_S = 60.0
STATES = 10_000
TWICE = 10  # of so many states one in which the power fails again while the daemon recovers
TRIES = 600  # states in which a sync that is left out must have been noticed
# Syncs whose loss costs nothing, and why. Where two cover the same, leaving out both must be noticed.
AGAIN = "the next start publishes again what differs from the checkpoint"
DROPPED = "the drill syncs what it drops; of a file that was dropped without, this makes the bytes durable"
NOT_NEEDED = {
    "_clone_file < share_file < _place": AGAIN,
    "sync_file < copy_file < _place": AGAIN,
    "sync_file < sync_tree < _found": "the checkpoint's files are synced by seal; " + AGAIN,
    "sync_file < sync_tree < run": DROPPED,
    "sync_folder < rename < _prepared": "tokens that are not there are made again",
}
EITHER = (
    ("rename_into < _add", "sync_folder < _publish"),
    ("sync_folder < sync_tree < _found", "sync_folder < rename < copy_file < _place"),
    ("sync_folder < write_file < put_away", "sync_folder < rename < put_away"),
)
FILES = {"a.jsonl": 20, "b.jsonl": 1, "c.jsonl": 9}  # rows
BAD = "x.jsonl"
BAD_CONTENT = b"not a row\n"
RESUMED = re.compile(r"the model is at global step (\d+)")
SETTINGS = {"train.batch_size": 4, "train.save_total_limit": 2}


@pytest.fixture(scope="module")
def recordings():
    """Two recordings of the same life, on a disk that cannot clone files and on one that can; kept where one failed."""
    place = Path(os.environ.get("LONGRUN_RECORDINGS") or f"/dev/shm/longrun-recordings-{os.getpid()}")
    if not place.exists():
        place.mkdir()
        for clones in (False, True):
            record(place / ("clones" if clones else "links"), clones=clones)
    found = [power.Recording(folder) for folder in sorted(place.iterdir())]
    for recording in found:
        recording.read()
    yield found
    if "LONGRUN_RECORDINGS" not in os.environ:
        shutil.rmtree(place)


def test_a_loss_of_power_costs_nothing_that_was_reported(campaign, quick, hand, recordings):
    def attempt(state, dice):
        recording = dice.choice(recordings)
        cut = dice.randint(0, len(recording.entries))
        survivor = cut_off(quick / "home", recording, cut, dice)
        if state % TWICE == 0:
            campaign.note("cut off twice")
            survivor = cut_off_again(quick, survivor, dice)
        survivor.recover(hand)

    campaign.run("5: the power fails at any moment", range(STATES), attempt, small=12)


def test_each_sync_that_is_left_out_is_noticed(campaign, quick, hand, recordings):
    """The drill's own test: with any of these syncs ignored, it must find that something reported is lost."""
    sites = sorted(set().union(*(recording.sites for recording in recordings)))
    alone = [(site,) for site in sites if site not in NOT_NEEDED and site not in sum(EITHER, ())]

    def attempt(left_out, dice):
        having = [recording for recording in recordings if recording.sites[left_out[0]]]
        for _ in range(TRIES):
            recording = dice.choice(having)
            cut = moment_after(recording, left_out[0], dice)
            survivor = cut_off(quick / "home", recording, cut, dice, ignored=left_out)
            campaign.note("states")
            try:
                survivor.recover(hand)
            except Exception:  # noqa: BLE001 - lost in whatever way
                return
        raise AssertionError(f"nothing was lost in {TRIES} states")

    campaign.run("6: a sync that is left out is noticed", alone + list(EITHER), attempt, small=2)


def moment_after(recording, site, dice):
    """Soon after this site synced, or any time later."""
    first = dice.choice(recording.moments(site))
    end = len(recording.entries)
    return dice.choice((min(first + dice.randint(0, dice.choice((4, 20))), end), dice.randint(first, end)))


def record(folder, *, clones):
    """The life of three good files and a bad one: two dropped, one linked elsewhere, one put while the daemon runs."""
    recording = power.Recording(folder)
    home = folder.with_name(f"home-{folder.name}")
    lab = Watched(home, **SETTINGS)
    (home / "elsewhere").mkdir()
    (home / "elsewhere" / "c.jsonl").write_bytes(content_of("c.jsonl"))
    (home / "inbox" / "a.jsonl").write_bytes(content_of("a.jsonl"))
    (home / "elsewhere" / "b.jsonl").write_bytes(content_of("b.jsonl"))
    (home / "inbox" / "b.jsonl").hardlink_to(home / "elsewhere" / "b.jsonl")
    (home / "inbox" / BAD).write_bytes(BAD_CONTENT)
    recording.begin(home)
    recorded = recording.environment(home, clones=clones)
    try:
        daemon = lab.start(LONGRUN_STEP_S="0.05", **recorded)
        wait_for(lab, "trained", job=2)
        put = [sys.executable, "daemon.py", "--home", str(home), "put", str(home / "elsewhere" / "c.jsonl")]
        subprocess.run(put, env=lab.environment(**recorded), check=True, stdout=subprocess.DEVNULL, cwd=REPOSITORY)
        recording.say(event="arrived", file="c.jsonl")
        wait_for(lab, "planned", job=4)
        daemon.send_signal(signal.SIGTERM)  # in the middle of c
        daemon.wait(LIMIT_S)
        lab.drain(**recorded)
    finally:
        lab.close()
    assert lab.names("trained") == set(FILES), lab.log
    shutil.rmtree(home)


def wait_for(lab, event, *, job):
    lab.wait_until(lambda: any((said["event"], said.get("job")) == (event, job) for said in lab.events), 20.0)


def cut_off(home, recording, cut, dice, *, before=None, ignored=()):
    """The home as the power's failure may leave it."""
    shutil.rmtree(home, ignore_errors=True)
    kept = power.lose_power(recording, cut, dice, ignored=ignored)
    power.materialise(power.played(recording, kept), recording.root, home)
    power.put_ledger(recording, home, draw_ledger(recording.ledgers(cut), dice))
    return Survivor(home, recording.said(cut).after(before))


def draw_ledger(copies, dice):
    """None, the last, or an older one: it is an index, and the rest must do without it."""
    return dice.choice((None, copies[-1], copies[-1], dice.choice(copies))) if copies else None


def cut_off_again(quick, survivor, dice):
    """The power fails while a daemon recovers from its failure."""
    shutil.rmtree(quick / "again", ignore_errors=True)
    recording = power.Recording(quick / "again")
    recording.begin(survivor.home)
    try:
        survivor.drain(**recording.environment(survivor.home, clones=dice.random() < 0.5))
    finally:
        survivor.close()
    recording.read()
    return cut_off(quick / "home", recording, dice.randint(0, len(recording.entries)), dice, before=survivor.said)


class Survivor(Watched):
    """A home that a failure of the power has left."""

    def __init__(self, home, said):
        Lab.__init__(self, home, fresh=False)
        self.said = said
        self.probe = home / "probe"
        self.told, self.hand = "", None

    def recover(self, hand):
        """A start without any help finds everything again and trains what was not."""
        outcome = hand.do("run", "--drain", home=self.home, program="daemon")
        self.told = outcome.err
        assert outcome.code == 0 or (outcome.code == 1 and f"{BAD} is rejected" in self.told), self.told
        resumed = RESUMED.search(self.told)
        assert (int(resumed[1]) if resumed else 0) >= self.said.step, f"{self.said.step} was reported\n{self.told}"
        trained = {name for name in self.names("trained") if not name.endswith(".tmp")}
        assert trained >= {"a.jsonl", "b.jsonl", *self.said.arrived}, f"{trained}\n{self.told}"
        self.dropped = [FILES[name] for name in trained]
        self.check()

    def check_files(self):
        assert not [name for name in self.names("inbox") if not name.endswith(".tmp")], self.told
        assert not list((self.home / "state" / "jobs").iterdir()), self.told
        for name in self.names("trained"):
            assert (self.home / "trained" / name).read_bytes() == content_of(name), self.told
        left = {name for name in self.names("rejected") if not name.endswith(".tmp")}
        assert left == {BAD, f"{BAD}.reason.json"}, f"{left}\n{self.told}"
        assert (self.home / "rejected" / BAD).read_bytes() == BAD_CONTENT
        assert json.loads((self.home / "rejected" / f"{BAD}.reason.json").read_bytes())["line"] == 1, self.told

    def check_numbers(self, jobs, *, in_order):
        assert jobs == sorted(set(jobs)), self.told

    def check_ledger(self):
        with contextlib.closing(sqlite3.connect(self.home / "state" / "ledger.sqlite3")) as ledger:
            states = dict(ledger.execute("select name, state from job"))
        assert {name for name, state in states.items() if state == "trained"} == {
            name.encode() for name in self.names("trained")
        }, (states, self.told)

    @property
    def whole_log(self):
        return self.said.text + self.told


def content_of(name):
    stem = name.partition(".")[0]
    return "".join(json.dumps(row) + "\n" for row in numbered(stem, FILES[name])).encode()
