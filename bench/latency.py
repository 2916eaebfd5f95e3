"""Latency: from the moment a file is in the inbox to the end of the first optimizer step on it.

Cold is a daemon that has trained nothing yet: Python, torch and the model are loaded after the drop. Warm is one that
has trained a file. Behind another file: dropped while that one trained; its time is from the end of that one.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import tempfile
from pathlib import Path

from bench import results
from bench.running import Daemon
from bench.workload import make_base, numbered

SIZES = (1, 1_000, 20_000)
SETTLE_S = 1.0
BOUND_S, BOUND_ROWS = SETTLE_S + 0.5, 1_000
SETTINGS = f"[inbox]\nsettle_s = {SETTLE_S}\n[train]\nsave_steps = 1000\n"
COLD, WARM, BEHIND = "cold", "warm", "behind another file"
BUSY_STEPS = 400  # of the other file, and more for more rows: while it trains, all of the next is prepared
STRETCHES = {  # of a file's way, each with the event that ends it
    "queued": "settled, claimed, examined",
    "prepared": "tokenised",
    "planned": "planned",
    "started": "worker ready",
    "step 1": "first step",
}

Way = list[float]  # seconds of each of STRETCHES


def play(folder: Path, base: Path, rows: int, dice: random.Random) -> dict[str, Way]:
    """A daemon's life: a cold file, a warm one, and two of which the second waits for the first."""
    with Daemon(folder, SETTINGS, "--base-model", str(base)) as daemon:
        found = {}
        for way in (COLD, WARM):
            dropped = daemon.drop(way, numbered(way, rows, dice))
            found[way] = way_of(daemon, way, dropped)
            daemon.wait_told(f"{way}.jsonl is trained")
            daemon.wait(lambda: daemon.status["state"] == "idle")
        daemon.drop("busy", numbered("busy", 8 * BUSY_STEPS + rows // 4, dice))
        daemon.wait_told("busy.jsonl: training on")
        daemon.drop("behind", numbered("behind", rows, dice))
        found[BEHIND] = way_of(daemon, "behind", daemon.wait_told("busy.jsonl is trained"))
        return found


def way_of(daemon: Daemon, name: str, begin: float) -> Way:
    """What was done before `begin` took none of its time."""
    first_step = daemon.wait_told(f"{name}.jsonl: step 1 of")
    told = {**daemon.events_of(name), "step 1": first_step}
    ends = list(itertools.accumulate([begin, *(told[event] for event in STRETCHES)], max))
    return [after - before for before, after in itertools.pairwise(ends)]


def report(found: dict[int, list[dict[str, Way]]], folder: Path) -> str:
    table = [
        [
            f"{rows:,}",
            way,
            results.spread([sum(played[way]) for played in rounds]),
            *(results.spread(list(values)) for values in zip(*(played[way] for played in rounds), strict=True)),
        ]
        for rows, rounds in found.items()
        for way in (COLD, WARM, BEHIND)
    ]
    goal = ""
    if BOUND_ROWS in found:
        values = [sum(played[WARM]) for played in found[BOUND_ROWS]]
        reached = results.verdict(statistics.median(values) < BOUND_S)
        goal = f"\nWarm, {BOUND_ROWS:,} rows: {results.spread(values)} s of at most {BOUND_S} s, {reached}.\n"
    rounds = len(next(iter(found.values())))
    return f"""## Latency

{results.machine(folder)}

{results.explained(__doc__)}

The tiny model, settle time {SETTLE_S} s, {results.rounds(rounds)}, seconds: median (least–greatest).
{goal}
{results.table(("rows", "", "drop to first step", *STRETCHES.values()), table)}
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__)
    parser.add_argument("--folder", type=Path, help="an existing folder to work in (default: a temporary one)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="rows a file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    args = parser.parse_args(argv)
    dice = random.Random(1)
    found: dict[int, list[dict[str, Way]]] = {rows: [] for rows in args.sizes}
    with tempfile.TemporaryDirectory(prefix="bench-latency-", dir=args.folder) as work:
        folder = Path(work).resolve()
        make_base(folder / "base")
        for number, rows in itertools.product(range(args.rounds), args.sizes):
            found[rows].append(play(folder / f"{number}-{rows}", folder / "base", rows, dice))
            told = ", ".join(f"{way} {sum(path):.2f} s" for way, path in found[rows][-1].items())
            print(f"round {number + 1} of {args.rounds}, {rows} rows: {told}", flush=True)
        results.write_section("latency", report(found, folder), args.results)
    print(f"written to {args.results}")


if __name__ == "__main__":
    main()
