"""Bits flip, files shrink and vanish in the store: all of it is found, and none of it ever reaches a model."""

from __future__ import annotations

from longrun.manifest import Manifest
from tests.drills.test_kills import LITTLE
from tests.drills.world import World, tree

DAMAGES = 500
KINDS = ("flip", "truncate", "delete")


def do_damage(path, kind, dice):
    if kind == "delete":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if kind == "flip":
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    else:
        del content[dice.randrange(len(content)) :]
    path.chmod(0o600)
    path.write_bytes(content)


def concerned(world: World, manifests: list[Manifest], path) -> tuple[set[str], set[str]]:
    """The backups that verify must name, and those that cannot be restored."""
    if path.parent.parent == world.store.backups:
        return {path.parent.name}, {path.parent.name} if path.name == "manifest.json" else set()
    named = {backup.id for backup in manifests if path.name in backup.digests}
    return named, named


def test_every_damage_is_found_and_restored_nowhere(campaign, hand, quick):
    whole = World.make(quick / "whole", weights_bytes=LITTLE // 3)
    outcome = hand.do("import", "brought", home=whole.home)
    assert outcome.code == 0, outcome
    manifests = whole.store.all()
    files = [
        path.relative_to(whole.home)
        for path in sorted(whole.store.root.rglob("*"))
        if path.is_file() and path.stat().st_size and path.name != "lock"
    ]

    def attempt(kind, dice):
        world = whole.copy(quick / "world")
        path = world.home / dice.choice(files)
        do_damage(path, kind, dice)
        named, lost = concerned(world, manifests, path)
        found = hand.do("verify", "--json", home=world.home)
        assert found.code == 1 and found.json["damage"], (path, found)
        assert {backup for damage in found.json["damage"] for backup in damage["backups"]} == named, (path, found)
        before = tree(world.home, without=world.store.root)
        for backup in lost:
            outcome = hand.do("restore", backup, home=world.home)
            outcome.check_told()
            assert outcome.code == 1, (path, outcome)
        assert tree(world.home, without=world.store.root) == before, path
        for name, backup in world.ids.items():
            if backup not in lost:
                outcome = hand.do("restore", backup, home=world.home)
                assert outcome.code == 0, (path, name, outcome.err)
                assert world.state(world.model) == name, (path, name)
        heal(world, path)

    def heal(world, path):
        """Backing up what was stored makes every content and paper whole; only a manifest cannot come again so."""
        for name in world.ids:
            source = whole.source("source of away" if name == "away" else name)
            assert hand.do("backup", source, home=world.home).code == 0
        left = {damage.what for damage in world.store.damage()}
        assert left <= ({f"backup {path.parent.name}", f"backups/{path.parent.name}/SHA256SUMS"}), (path, left)

    cases = [KINDS[number % len(KINDS)] for number in range(DAMAGES)]
    campaign.run("damaged, it is found and never restored", cases, attempt, small=16)
