"""Two backups and a prune at once, again and again: nobody loses a content to the other."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

from tests.drills.hand import Hand
from tests.drills.world import World, make_model

ROUNDS = 60
EAGER = {"longrun.store:YOUNG_S": -10.0}  # prune takes what is named by none at once, not after a day


def test_backups_and_a_prune_at_once_lose_nothing(campaign, quick):
    world = World.make(quick / "world", weights_bytes=100_000)
    sources = [make_model(quick / name, random.Random(name), step=1, weights_bytes=500_000) for name in "ab"]
    made = []

    def change(source, dice):
        """Another checkpoint; most of the contents stay, or come back from an earlier round."""
        make_model(source, random.Random(dice.randrange(4)), step=dice.randrange(1, 3), weights_bytes=500_000)

    def attempt(_, dice):
        for source in sources:
            change(source, dice)
        doomed = hands[0].do("backup", sources[0], "--json", home=world.home)
        assert doomed.code == 0, doomed
        newest = hands[0].do("backup", sources[1], "--json", home=world.home)
        commands = [
            ("backup", sources[0], "--json"),
            ("backup", sources[1], "--type", "pre_recovery", "--json"),
            ("prune", doomed.json["id"], "--execute", "--json"),
        ]
        outcomes = list(
            threads.map(
                lambda pair: pair[0].do(*pair[1], home=world.home, settings=EAGER), zip(hands, commands, strict=True)
            )
        )
        assert [outcome.code for outcome in outcomes] == [0, 0, 0], outcomes
        made.extend(outcome.json["id"] for outcome in (newest, *outcomes[:2]))
        assert world.store.damage() == []
        assert set(made) <= set(world.store.ids())
        assert doomed.json["id"] not in world.store.ids()

    with Hand() as one, Hand() as two, Hand() as three, ThreadPoolExecutor(3) as threads:
        hands = (one, two, three)
        campaign.run("two backups and a prune at once lose nothing", range(ROUNDS), attempt, small=4)
