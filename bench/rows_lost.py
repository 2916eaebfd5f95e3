"""Rows lost: the same files, one after another and with one kill, through Longrun and what people do otherwise.

Each recipe trains the same model on the same files with the same batch size. In the middle of the third file the
training process is killed (Longrun's daemon with it), and the same command is typed again. What each row was trained
is counted at the model's forward pass, by bench/probe for all alike; a step that a later process did again, because
its checkpoint was older, counts once.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import results
from bench.recipes import BATCH, RATE, SAVE_STEPS
from bench.running import PROBE, ROOT, draining, fill, lines_of, python_path
from bench.workload import make_base, marked, numbered

UNEVEN = {"a": 37, "b": 60, "c": 63, "d": 100, "e": 1}
WORDS = ["sum", "apple", "river", "seven", "green", "train", "paper", "cloud", "maple", "stone"]
LIMIT_S = 3600
SETTINGS = f"[train]\nbatch_size = {BATCH}\nlearning_rate = {RATE}\nsave_steps = {SAVE_STEPS}\nlogging_steps = 1\n"
LIBRARIES = ("torch", "transformers", "accelerate", "trl")
APART = (
    "a folder with virtual environments `axolotl` and `llamafactory`, in which these are installed, the latter with a"
    " torchvision made for its torch"
)


@dataclass(frozen=True)
class Recipe:
    """A way to train file after file: a function of bench/recipes.py, or Longrun."""

    name: str
    program: str
    run_each_file: bool = False  # each file has an output folder, and global steps, of its own
    apart: bool = False  # its libraries have versions of their own: it needs an environment of its own

    @property
    def is_ours(self) -> bool:
        return self.program == "longrun"

    def commands(self, home: Path, files: Path, rows: dict[str, int], python: Path) -> list[list[str]]:
        """What to type, one after another: once for all files, or for each."""
        if self.is_ours:
            return [draining(home, home / "base", python)]
        recipe = [str(python), "-m", "bench.recipes", self.program]
        return [[*recipe, str(files / f"{name}.jsonl"), str(home)] for name in rows]


RECIPES = (
    Recipe("Trainer, resumed, num_train_epochs=1", "num_train_epochs"),
    Recipe("Trainer, resumed, cumulative max_steps", "cumulative_max_steps"),
    Recipe("the same with ignore_data_skip", "ignore_data_skip"),
    Recipe("Trainer, a new run each file from the last model", "new_run_each_file", run_each_file=True),
    Recipe("TRL's SFTTrainer, resumed, num_train_epochs=1", "sft_trainer"),
    Recipe("TRL's CLI, a new run each file from the last model", "trl_cli", run_each_file=True),
    Recipe("axolotl, a new run each file from the last model", "axolotl", run_each_file=True, apart=True),
    Recipe("LLaMA-Factory, a new run each file from the last model", "llamafactory", run_each_file=True, apart=True),
    Recipe("Longrun", "longrun"),
)


@dataclass
class Outcome:
    """How a recipe did; rows are named `a-0001`."""

    wall_s: float
    after_kill: str = ""  # empty where the kill has not come
    times: collections.Counter[str] = field(default_factory=collections.Counter)  # trained in the model's life
    steps: int = 0
    # At the first step of each file; None where it was never trained.
    rates: dict[str, float | None] = field(default_factory=dict)
    adam_steps: dict[str, int | None] = field(default_factory=dict)  # whose moments are there
    held_out: int = 0
    failed: str = ""


# -- what goes in


def make_files(folder: Path, data: list[Path]) -> dict[str, int]:
    """Files a.jsonl, b.jsonl ... of UNEVEN, or of these chat files with their rows marked; how many rows each has."""
    dice = random.Random(1)
    if data:
        contents = {
            f"part{at}": [marked(f"part{at}", number, row["messages"]) for number, row in enumerate(lines_of(path))]
            for at, path in enumerate(data, start=1)
        }
    else:
        contents = {name: numbered(name, rows, dice) for name, rows in UNEVEN.items()}
    folder.mkdir()
    for name, rows in contents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: len(rows) for name, rows in contents.items()}


# -- a recipe at work


def play(recipe: Recipe, home: Path, files: Path, rows: dict[str, int], python: Path) -> Outcome:
    shutil.copytree(files.parent / "base", home / "base")
    (home / "files.json").write_text(json.dumps(list(rows)))
    third = list(rows)[2]
    environment = {
        "OMP_NUM_THREADS": str(os.cpu_count()),  # unless fewer are to be used, as beside other tests
        **os.environ,
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{PROBE}:{ROOT}" if recipe.apart else python_path(PROBE, ROOT),
        "BENCH_PROBE": str(home / "forwards.jsonl"),
        "BENCH_MODEL": str(home / "base"),
        "BENCH_KILL": f"{third}:{math.ceil(math.ceil(rows[third] / BATCH) / 2)}",
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
    }
    if recipe.is_ours:
        fill(home, [files / f"{name}.jsonl" for name in rows], SETTINGS)
    outcome = Outcome(0.0)
    for name, command in zip(rows, recipe.commands(home, files, rows, python), strict=False):
        run = name if recipe.run_each_file else "all"
        work(command, home, environment | {"BENCH_RUN": run}, outcome)
        if outcome.failed:
            break
    count(home / "forwards.jsonl", rows, outcome)
    if not outcome.after_kill:
        trains = any(row.startswith(f"{third}-") for row in outcome.times)
        outcome.after_kill = "the third file ends before it" if trains else "the third file trains nothing"
    if recipe.is_ours:
        lineage = json.loads((home / "current_model" / "lineage.json").read_text())
        outcome.held_out = sum(record["held_out_rows"] for record in lineage["files"])
    return outcome


def work(command: list[str], home: Path, environment: dict[str, str], outcome: Outcome) -> None:
    """Type the command; after the kill, once more."""
    mark = home / "forwards.jsonl.killed"
    was_killed = mark.exists()
    code, tail = typed(command, home, environment, outcome)
    if mark.exists() and not was_killed:
        before = len(lines_of(home / "forwards.jsonl"))
        code, tail = typed(command, home, environment, outcome)
        again = lines_of(home / "forwards.jsonl")[before:]
        outcome.after_kill = f"on from step {again[0]['global_step']}" if again else "trains nothing"
    if code:
        outcome.failed = tail or f"exit {code}"


def typed(command: list[str], home: Path, environment: dict[str, str], outcome: Outcome) -> tuple[int, str]:
    """Exit code, and the last line that was said."""
    began = time.monotonic()
    with (home / "said.log").open("a+") as log:
        code = subprocess.run(
            command, cwd=home, env=environment, stdout=log, stderr=log, timeout=LIMIT_S, check=False
        ).returncode
        outcome.wall_s += time.monotonic() - began
        log.seek(0)
        return code, log.read().strip().rpartition("\n")[2]


def count(probe: Path, rows: dict[str, int], outcome: Outcome) -> None:
    """What is in the model in the end: a process that begins at a step undoes that step and all later ones."""
    lived: list[dict[str, Any]] = []
    process = None
    for forward in lines_of(probe) if probe.exists() else []:
        if forward["pid"] != process:
            process, run, begin = forward["pid"], forward["run"], forward["global_step"]
            lived = [one for one in lived if one["run"] != run or one["global_step"] < begin]
        lived.append(forward)
    outcome.times = collections.Counter(row for forward in lived for row in forward["rows"])
    outcome.steps = len({(forward["run"], forward["global_step"]) for forward in lived})
    for name in rows:
        of_file = [one for one in lived if any(row.startswith(f"{name}-") for row in one["rows"])]
        outcome.rates[name] = of_file[0]["learning_rate"] if of_file else None
        outcome.adam_steps[name] = of_file[0]["adam_steps"] if of_file else None


# -- the report


def report(outcomes: dict[str, list[Outcome]], chosen: dict[Recipe, Path], rows: dict[str, int], folder: Path) -> str:
    planned = sum(math.ceil(count / BATCH) for count in rows.values())
    head = ("recipe", "rows never trained", "rows trained more than once", "steps", "learning rate", "steps in Adam",
            "after the kill", "wall, s")  # fmt: skip
    lines = [line(name, found, rows) for name, found in outcomes.items()]
    absent = [recipe.name for recipe in chosen if recipe.name not in outcomes]
    apart = {recipe.program: python for recipe, python in chosen.items() if recipe.apart and recipe.name in outcomes}
    return f"""## Rows lost, {sum(rows.values()):,} rows in {len(rows)} files

{results.machine(folder)}
- {results.packages(*LIBRARIES)}
{"".join(f"- apart: {packages_of(python, program, *LIBRARIES)}{chr(10)}" for program, python in apart.items())}\
{"".join(f"- not installed, left out: {name}{chr(10)}" for name in absent)}
Files of {", ".join(map(str, rows.values()))} rows, one epoch of each, {BATCH} rows a step: {planned} steps and
{sum(rows.values())} rows are to be trained. A checkpoint every {SAVE_STEPS} steps; SIGKILL in the middle of the third
file, then the same command again. Counted at the model's forward pass. At the first step of each file: the learning
rate as a share of the one that was set, and of how many steps the optimizer has the moments. A share of 0 is that of
one step, in a schedule that has come to its end or, as axolotl's for longer files, warms up. Wall time is of all
processes, their start included: {results.rounds(len(next(iter(outcomes.values()))))}, median (least–greatest);
the rest is of the first round.

{results.table(head, lines)}
"""


def packages_of(python: Path, *names: str) -> str:
    """As `results.packages`, of another environment."""
    code = "import sys; from bench import results; print(results.packages(*sys.argv[1:]))"
    command = [python, "-c", code, *names]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def line(name: str, found: list[Outcome], rows: dict[str, int]) -> list[str]:
    failed = next((one.failed for one in found if one.failed), "")
    if failed:  # what did not run has lost no row
        return [name, *["–"] * 5, f"failed: {failed}".replace("|", "/"), "–"]
    one = found[0]
    planned = sum(math.ceil(count / BATCH) for count in rows.values())
    never = sum(rows.values()) - len(one.times) - one.held_out
    held_out = f" (and {one.held_out} held out, as told)" if one.held_out else ""
    more = sum(times > 1 for times in one.times.values())
    rates = " ".join("–" if rate is None else f"{rate / RATE:.2f}" for rate in one.rates.values())
    wall = results.spread([other.wall_s for other in found], ".0f")
    remembered = " ".join("–" if steps is None else str(steps) for steps in one.adam_steps.values())
    steps = f"{one.steps} of {planned}"
    return [name, f"{never}{held_out}", str(more), steps, rates, remembered, one.after_kill, wall]


def main(argv: list[str]) -> int:
    """1 when a recipe failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.rows_lost", description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="chat JSONL files (default: five uneven ones)")
    parser.add_argument("--folder", type=Path, help="an existing folder to work in (default: a temporary one)")
    parser.add_argument("--apart", type=Path, default=Path(sys.prefix) / "apart", help=APART)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="recipes whose name contains this")
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    args = parser.parse_args(argv)
    if len(args.data) in (1, 2):
        parser.error("the kill comes in the third file: name three or more")
    if args.only and args.results == results.RESULTS:
        parser.error("--only would leave the other recipes out of what is published: name other --results")
    chosen = {recipe: args.apart / recipe.program if recipe.apart else Path(sys.prefix) for recipe in RECIPES}
    chosen = {recipe: place / "bin" / "python" for recipe, place in chosen.items() if args.only in recipe.name}
    outcomes: dict[str, list[Outcome]] = {recipe.name: [] for recipe, python in chosen.items() if python.exists()}
    section = "rows lost, given files" if args.data else "rows lost"
    with tempfile.TemporaryDirectory(prefix="bench-rows-", dir=args.folder) as work_in:
        folder = Path(work_in).resolve()
        make_base(folder / "base")
        rows = make_files(folder / "files", args.data)
        for number in range(args.rounds):
            for recipe, python in chosen.items():
                if recipe.name in outcomes:
                    home = folder / f"round-{number}" / recipe.program
                    outcomes[recipe.name].append(play(recipe, home, folder / "files", rows, python))
                    told = " | ".join(line(recipe.name, outcomes[recipe.name][-1:], rows))
                    print(f"round {number + 1} of {args.rounds}: {told}", flush=True)
            results.write_section(section, report(outcomes, chosen, rows, folder), args.results)  # a round takes long
    print(f"written to {args.results}")
    return int(any(one.failed for found in outcomes.values() for one in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
