"""Checkpoints: how long training stands still for one, what that is made of, and the share of the time at the default.

Measured at the model's forward pass, by bench/probe: from the first forward of a step that a checkpoint follows to the
first of the next step, less what that is for other steps. The parts are timed inside the same checkpoints.

The share is that of one long file at the default interval: the worker measures what its last checkpoint took and
waits 50 times as long before the next, at least a minute and at most half an hour, which bounds what a kill can cost.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import math
import statistics
import tempfile
from pathlib import Path

from bench import results
from bench.running import drain, lines_of
from bench.throughput import make_files, make_model, weights_of

LAST_PART = "old ones removed"
PARTS = ("written", "hashed", "synced", "published", LAST_PART)
MODELS = {
    "small": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4},
    "middle": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
    "large": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 9, "num_attention_heads": 16},
}
STEPS, SAVE_STEPS = 31, 3
BOUND = 0.02


class Run:
    """A file that was trained in a home, with a probe in its worker."""

    def __init__(self, home: Path, base: Path, file: Path, settings: str) -> None:
        places = {"BENCH_PROBE": str(home / "forwards.jsonl"), "BENCH_PARTS": str(home / "parts.jsonl")}
        drain(home, base, [file], settings, **places)
        self.saved = [event for event in lines_of(home / "state" / "events.jsonl") if event["event"] == "saved"]
        forwards = lines_of(home / "forwards.jsonl")
        begins = {one["global_step"]: one["time"] for one in reversed(forwards)}
        times = [begins[step] for step in sorted(begins)]
        self.total_s = times[-1] - times[0]
        self.gaps = dict(enumerate((after - before for before, after in itertools.pairwise(times)), start=1))
        self._parts = [part for part in lines_of(home / "parts.jsonl") if part["pid"] == forwards[0]["pid"]]

    @property
    def step_s(self) -> float:
        steps = {event["global_step"] for event in self.saved}
        return statistics.median(gap for step, gap in self.gaps.items() if step not in steps)

    @property
    def stalls(self) -> list[float]:
        """Seconds of each checkpoint but the last, after which no step follows."""
        return [self.gaps[event["global_step"]] - self.step_s for event in self.saved[:-1]]

    @property
    def parts(self) -> dict[str, list[float]]:
        """Seconds of each part, of each checkpoint but the last."""
        found: dict[str, list[float]] = {part: [] for part in PARTS}
        sums: collections.Counter[str] = collections.Counter()
        for part in self._parts:
            sums[part["part"]] += part["seconds"]
            if part["part"] == LAST_PART:
                sums["synced"] = sums["sealed"] - sums["hashed"]
                for name in PARTS:
                    found[name].append(sums[name])
                sums.clear()
        return {part: seconds[:-1] for part, seconds in found.items()}


def cost_row(model: str, run: Run) -> list[str]:
    parts = [results.spread(values) for values in run.parts.values()]
    return [model, f"{run.saved[0]['size_bytes'] / 1e6:,.0f} MB", results.spread(run.stalls), *parts]


def share_row(model: str, run: Run) -> list[str]:
    share = sum(run.stalls) / run.total_s
    later_s = sum(gap for step, gap in run.gaps.items() if step > run.saved[0]["global_step"])
    steps = [0, *(event["global_step"] for event in run.saved)]
    most = max(after - before for before, after in itertools.pairwise(steps))
    return [
        model,
        f"{run.total_s:,.0f} s, {steps[-1]} steps",
        str(len(run.stalls)),
        f"{share:.2%}, {results.verdict(share <= BOUND)}",
        f"{sum(run.stalls[1:]) / later_s:.2%}" if run.stalls[1:] else "–",
        f"{most} steps, {most * run.step_s:.0f} s",
    ]


def report(costs: list[list[str]], shares: list[list[str]], folder: Path) -> str:
    head = ("weights", "checkpoint", "training stands still, s", *(f"{part}, s" for part in PARTS))
    share_head = ("weights", "trained", "checkpoints", "share of the time", "after the first", "most that a kill costs")
    return f"""## Checkpoints

{results.machine(folder)}
- {results.packages("torch", "transformers", "safetensors")}

{results.explained(__doc__)}

A checkpoint every {SAVE_STEPS} steps, median (least–greatest) of {STEPS // SAVE_STEPS}:

{results.table(head, costs)}

At the default interval; at most {BOUND:.0%} is wanted. What the first one takes is not known before it, so it comes
after a minute:

{results.table(share_head, shares)}

The checkpoint that ends a file comes besides: it is what makes the file trained. Nothing is written in the
background: the share of the time is all there would be to gain, for a second copy of weights and moments in memory
and, on a CPU, for cores that train; and at a file's end there is nothing to train meanwhile: the next plan begins from
that checkpoint.
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoints", description=__doc__)
    parser.add_argument("--folder", type=Path, help="an existing folder to work in (default: a temporary one)")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="their sizes")
    parser.add_argument("--minutes", type=float, default=10, help="of the file at the default interval")
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    args = parser.parse_args(argv)
    costs, shares = [], []
    with tempfile.TemporaryDirectory(prefix="bench-checkpoints-", dir=args.folder) as work:
        folder = Path(work).resolve()
        for size in args.models:
            base, (file, _) = folder / f"base-{size}", make_files(folder / f"files-{size}", [], STEPS)
            make_model(base, file, MODELS[size])
            model = f"{weights_of(base) / 1e6:.0f} million"
            run = Run(folder / f"often-{size}", base, file, f"[train]\nsave_steps = {SAVE_STEPS}\n")
            costs.append(cost_row(model, run))
            print(*costs[-1], sep=" | ", flush=True)
            steps = math.ceil(args.minutes * 60 / run.step_s)
            long_file, _ = make_files(folder / f"long-{size}", [], steps)
            shares.append(share_row(model, Run(folder / f"default-{size}", base, long_file, "")))
            print(*shares[-1], sep=" | ", flush=True)
        results.write_section("checkpoints", report(costs, shares, folder), args.results)
    print(f"written to {args.results}")


if __name__ == "__main__":
    main()
