"""The newest checkpoint damaged in any way: it is neither trained on nor published, and what it cost comes back."""

from __future__ import annotations

import re
import shutil
import signal

import pytest

from longrun import checkpoint
from longrun.home import Home
from tests.drills.daemons import Watched

SETTINGS = {"train.save_total_limit": 3}
FILES = ("model.safetensors", "optimizer.pt", "config.json", "trainer_state.json", "lineage.json", "manifest.json")
WHEN = ("idle", "before a start", "before a start, in the middle of a file")


def flip(path, dice):
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)


def truncate(path, dice):
    path.write_bytes(path.read_bytes()[: dice.randrange(1, path.stat().st_size)])


def append(path, dice):
    path.write_bytes(path.read_bytes() + dice.choice((b"\0", b"\n", b" ", b"x")))


def link(path, dice):
    """The same bytes, but somewhere else, where nobody keeps them."""
    path.rename(path.parent.parent.parent / f"elsewhere-{path.name}")
    path.symlink_to(path.parent.parent.parent / f"elsewhere-{path.name}")


def replace_by_a_folder(path, dice):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "truncated": truncate,
    "emptied": lambda path, dice: path.write_bytes(b""),
    "removed": lambda path, dice: path.unlink(),
    "one bit flipped": flip,
    "replaced by a folder": replace_by_a_folder,
    "replaced by a link": link,
    "a byte appended": append,
    "an extra file beside": lambda path, dice: path.with_name(f"more-{path.name}").write_bytes(b"{}"),
}
CASES = [(how, name, when) for how in DAMAGES for name in FILES for when in WHEN]


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """Two homes with two trained files: checkpoints 3, 6; and 3, 6, 8, so that 6 is in the middle of the second."""
    found = {}
    for name, rows in (("whole", 20), ("middle", 40)):
        lab = found[name] = Watched(tmp_path_factory.mktemp("trained") / name, **SETTINGS)
        for file, count in (("a", 20), ("b", rows)):
            lab.drop_rows(file, count)
            assert lab.drain() == 0, lab.log
        lab.check()
    return found


def test_a_damaged_checkpoint_is_never_used_and_costs_nothing_for_good(campaign, homes, quick):
    def attempt(case, dice):
        how, name, when = case
        lab = copied(homes["middle" if when.endswith("file") else "whole"], quick / "home")
        try:
            lab.damage = lambda: DAMAGES[how](lab.newest / name, dice)
            lived_through(lab, when)
            (damaged, damage), *more = re.findall(r"(checkpoint-\d+) is damaged \((.*)\); set aside as ", lab.log)
            assert not more
            assert damaged == lab.damaged.name
            assert name.removesuffix(".json") in damage  # what a manifest got wrong may be told of another file
            lab.check(in_order=when.endswith("file"))
        finally:
            lab.close()

    campaign.run("9: a damaged checkpoint is set aside, told, and made good", CASES, attempt, small=3)


def copied(lab, home):
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(lab.home, home, ignore=shutil.ignore_patterns("*.sock"))
    copy = Watched(home, fresh=False)
    copy.probe, copy.dropped = home / "probe", list(lab.dropped)
    return copy


def lived_through(lab, when):
    """Damage; a later file trains; what the damage cost is trained again, before it where the model is amid it."""
    steps = checkpoint.steps(lab.model)
    lab.newest = lab.damaged = lab.model / f"checkpoint-{steps[0]}"
    if when != "idle":
        lab.damage()
    daemon = lab.start()
    if when == "idle":
        lab.wait_until(lambda: "the model is at global step" in lab.log.rpartition("Longrun watches")[2])
        lab.damage()
    else:
        lab.wait_until(lambda: lab.damaged.name not in lab.names("current_model") and lab.global_step == steps[1])
        lab.wait_until(lambda: "retry --missing" in lab.log)
        assert_published(lab, steps[1])
    if when.endswith("file"):
        retry(lab)
    lab.drop_rows("c", 20)
    lab.wait_until(lambda: "c.jsonl" in lab.names("trained"))
    if not when.endswith("file"):
        newest = checkpoint.newest(Home(lab.home), checkpoint.Verifier(), lambda text: None)
        assert [(record.name, record.base_step) for record in newest.lineage.files] == [("a.jsonl", 0), ("c.jsonl", 3)]
        lab.wait_until(lambda: "retry --missing" in lab.log)
        retry(lab)
    lab.wait_until(lambda: not lab.names("state/jobs"))
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(60) == 0


def assert_published(lab, step):
    for path in lab.model.iterdir():
        if path.is_file():
            assert path.read_bytes() == (lab.model / f"checkpoint-{step}" / path.name).read_bytes(), path.name


def retry(lab):
    taken = lab.log.count("b.jsonl is trained")
    answer = lab.command("retry", "--missing")
    assert answer.returncode == 0, answer.stderr
    assert "b.jsonl (" in answer.stdout
    lab.wait_until(lambda: lab.log.count("b.jsonl is trained") > taken)
