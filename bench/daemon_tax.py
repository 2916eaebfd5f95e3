"""Daemon tax: N files through the daemon, against one plain Trainer over all their rows and a cold process for each.

All three train the same model on as many rows of the same lengths, with the same batches, learning rate and number of
checkpoints; the daemon's files have some rows more, which it holds out and evaluates. They run side by side and take
turns: one runs for some seconds while the others are stopped, so that a drift of the machine meets all alike. Wall
time is of whole commands, the start of Python and the loading of torch included, once for the first two; the time that
a way was stopped is left out.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import math
import random
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bench import results
from bench.recipes import BATCH, RATE
from bench.running import draining, fill, lines_of, run
from bench.turns import SLICE_S, Way, take_turns
from bench.workload import make_base, numbered, rows_for

LARGER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
DAEMON, PLAIN, COLD = "the daemon", "one plain Trainer over all rows", "a cold process for each file"
CALIBRATING_STEPS, WARM_UP = 60, 10
PARTS_FILE = "parts.jsonl"
# A file's time in the daemon, from plan to plan.
STRETCHES = (
    "planned, to the worker's start on it",
    "steps",
    "evaluated",
    "checkpoint: written",
    "checkpoint: hashed",
    "checkpoint: synced",
    "checkpoint: published",
    "checkpoint: old ones removed",
    "checkpoint: weights checked, and the rest",
    "booked, put away into trained/",
    "to the next plan",
)
# Done while another file trains.
BESIDE = {
    "examined": "examined, meanwhile",
    "prepared": "prepared: rendered, tokenised, masked, written; meanwhile",
}


# -- what is trained


class Load:
    """So many equal files, and what trains them."""

    def __init__(self, folder: Path, files: int, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.names = [f"f{number:02d}" for number in range(files)]
        for place in (self._of_plain, self._of_daemon):
            place.mkdir(parents=True)
        dice = random.Random(1)
        trained = steps * BATCH
        everything = []
        for name in self.names:
            lines = [json.dumps(row) + "\n" for row in numbered(name, rows_for(trained), dice)]
            (self._of_daemon / f"{name}.jsonl").write_text("".join(lines))
            (self._of_plain / f"{name}.jsonl").write_text("".join(lines[:trained]))
            everything += lines[:trained]
        (self._of_plain / "all.jsonl").write_text("".join(everything))

    @property
    def _of_plain(self) -> Path:
        return self.folder / "trained"

    @property
    def _of_daemon(self) -> Path:
        return self.folder / "with-held-out"

    def through_the_daemon(self, home: Path) -> Way:
        never = 10 * len(self.names) * self.steps  # but at the end of each file
        settings = f"[train]\nbatch_size = {BATCH}\nper_device_train_batch_size = {BATCH}\nlearning_rate = {RATE}\n"
        files = [self._of_daemon / f"{name}.jsonl" for name in self.names]
        fill(home, files, f"{settings}save_steps = {never}\n")
        return Way([(["env", f"BENCH_PARTS={home / PARTS_FILE}", *draining(home, home / "base")], home)])

    def plain(self, home: Path) -> Way:
        return Way([(self.recipe("all", home), home)])

    def cold(self, home: Path) -> Way:
        return Way([(self.recipe(name, home), home) for name in self.names])

    def recipe(self, name: str, home: Path) -> list[str]:
        file = self._of_plain / f"{name}.jsonl"
        return [sys.executable, "-m", "bench.recipes", "plain", str(file), str(home), str(self.steps)]


def one_round(load: Load, base: Path, folder: Path, order: list[str]) -> dict[str, Way]:
    started_by = {DAEMON: load.through_the_daemon, PLAIN: load.plain, COLD: load.cold}
    ways = {name: started_by[name](new_home(folder, name, load, base)) for name in order}
    take_turns(ways.values())
    for name, way in ways.items():
        print(f"  {name}: {way.wall_s:.1f} s", flush=True)
    must_have_trained(load, home_of(folder, DAEMON))
    return ways


def new_home(folder: Path, name: str, load: Load, base: Path) -> Path:
    home = home_of(folder, name)
    home.mkdir(parents=True)
    shutil.copytree(base, home / "base")
    (home / "files.json").write_text(json.dumps(load.names))
    return home


def home_of(folder: Path, name: str) -> Path:
    return folder / name.replace(" ", "-")


def must_have_trained(load: Load, home: Path) -> None:
    """RuntimeError unless the daemon made as many steps and checkpoints as the plain Trainer did."""
    events = lines_of(home / "state" / "events.jsonl")
    planned = [event["target_step"] for event in events if event["event"] == "planned"]
    saved = [event["global_step"] for event in events if event["event"] == "saved"]
    ends = [load.steps * (number + 1) for number in range(len(load.names))]
    if not planned == saved == ends:
        raise RuntimeError(f"the daemon planned up to {planned} and saved at {saved}, not at {ends}: no comparison")


def seconds_a_step(base: Path, folder: Path) -> float:
    """Of the plain Trainer, its start and first steps left out."""
    load = Load(folder / "calibrate", 1, CALIBRATING_STEPS)
    home = new_home(folder / "calibrated", PLAIN, load, base)
    run(load.recipe(load.names[0], home), home, BENCH_PROBE=str(home / "forwards.jsonl"))
    times = [forward["time"] for forward in lines_of(home / "forwards.jsonl")[WARM_UP:]]
    return (times[-1] - times[0]) / (len(times) - 1)


# -- the report


@dataclass(frozen=True)
class Timed:
    """A part of a file's way, as bench/probe has timed it."""

    way: Way
    pid: int
    time: float  # when it ended, in seconds since the epoch
    part: str
    seconds: float

    @property
    def ran_s(self) -> float:
        """Without the time that the way was stopped."""
        return self.way.wall_s_until(self.time) - self.way.wall_s_until(self.time - self.seconds)


def parts_of(home: Path, way: Way) -> dict[str, list[float]]:
    """Seconds of each part of each file; the first file, which warms up, and the last are left out."""
    told = lines_of(home / "state" / "events.jsonl")
    timed = [Timed(way, **line) for line in lines_of(home / PARTS_FILE)]
    worker = next(one.pid for one in timed if one.part == "written")
    jobs = [event["job"] for event in told if event["event"] == "planned"]
    when = {(event.get("job"), event["event"]): at(event) for event in told}  # the last one counts
    when |= {(event["job"], "saving"): at(event) - event["seconds"] for event in told if event["event"] == "saved"}
    found: dict[str, list[float]] = {stretch: [] for stretch in STRETCHES}
    for job, after in itertools.pairwise(jobs[1:]):
        moments = [when[job, name] for name in ("planned", "started", "saving", "saved", "trained")]
        ran = [way.wall_s_until(moment) for moment in (*moments, when[after, "planned"])]
        to_start, trained, saved, booked, to_next = (ended - began for began, ended in itertools.pairwise(ran))
        inner: collections.Counter[str] = collections.Counter()
        for one in timed:
            if one.pid == worker and moments[0] <= one.time < when[after, "planned"]:
                inner[one.part] += one.ran_s
        of_saving = [inner["written"], inner["hashed"], inner["sealed"] - inner["hashed"], inner["published"],
                     inner["old ones removed"]]  # fmt: skip
        of_training = [trained - inner["evaluated"], inner["evaluated"]]
        seconds = [to_start, *of_training, *of_saving, saved - sum(of_saving), booked, to_next]
        for stretch, value in zip(STRETCHES, seconds, strict=True):
            found[stretch].append(value)
    return found | {words: [one.ran_s for one in timed if one.part == part][1:] for part, words in BESIDE.items()}


def at(event: dict[str, str]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def report(load: Load, rounds: list[dict[str, Way]], parts: dict[str, list[float]], folder: Path, bound: float) -> str:
    a_file_s = statistics.median(found[PLAIN].wall_s for found in rounds) / len(load.names)
    ratios = {way: [found[way].wall_s / found[PLAIN].wall_s for found in rounds] for way in (DAEMON, COLD)}
    reached = results.verdict(statistics.median(ratios[DAEMON]) <= bound)
    rows = [
        [
            way,
            results.spread([found[way].wall_s for found in rounds], ".1f"),
            results.spread(ratios[way]) if way in ratios else "1",
        ]
        for way in (DAEMON, PLAIN, COLD)
    ]
    of_parts = [[part, results.spread(values, ".3f")] for part, values in parts.items() if values]
    return f"""## Daemon tax, {len(load.names)} files of {load.steps} steps

{results.machine(folder)}

{(__doc__ or "").partition(chr(10) * 2)[2]}
{results.rounds(len(rounds))}, median (least–greatest); slices of {SLICE_S:g} s. A file takes the plain Trainer
{a_file_s:.1f} s, with its share of the one start.
At most {bound} times the plain Trainer: {results.spread(ratios[DAEMON])}, {reached}.

{results.table(("way", "wall, s", "time / plain"), rows)}

All files lie in the inbox when the daemon starts, so the second in which they settle is waited for once.

{results.table(("a file in the daemon, last round", "s"), of_parts)}
"""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.daemon_tax", description=__doc__)
    parser.add_argument("--folder", type=Path, help="an existing folder to work in (default: a temporary one)")
    parser.add_argument("--loads", nargs="+", default=["10x30", "50x3"], help="FILESxSECONDS")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-tax-", dir=args.folder) as work:
        folder = Path(work).resolve()
        make_base(folder / "base", **LARGER)
        step_s = seconds_a_step(folder / "base", folder)
        print(f"{step_s:.3f} s a step", flush=True)
        for given in args.loads:
            files, file_s = (int(word) for word in given.split("x"))
            load = Load(folder / given, files, max(1, math.ceil(file_s / step_s)))
            what = f"{files} files of {load.steps} steps"
            rounds = []
            for number in range(args.rounds):
                print(f"{what}: round {number + 1} of {args.rounds}", flush=True)
                ways = [DAEMON, PLAIN, COLD]
                at = number % len(ways)
                rounds.append(one_round(load, folder / "base", folder / f"{given}-{number}", ways[at:] + ways[:at]))
            parts = parts_of(home_of(folder / f"{given}-{args.rounds - 1}", DAEMON), rounds[-1][DAEMON])
            text = report(load, rounds, parts, folder, 1.03 if file_s >= 30 else 1.15)
            results.write_section(f"daemon tax, {given}", text, args.results)
    print(f"written to {args.results}")


if __name__ == "__main__":
    main(sys.argv[1:])
