"""Growth: a thousand small files in one lineage, and whether the last ones cost what the first did.

Some files always wait, so that the time from one file's end to the next one's is what a file takes. Memory is what
Linux counts as resident; what a command takes is `daemon.py status`, Python's start included. The machine's own speed
drifts while so many files are trained, so the lineage is then held against young ones, a portion of each trained in
turn: from the end of a portion's first file to that of its last, and the CPU time of all processes, divided by their
number. At last very many files are moved into the inbox at once, and the time is taken until the last is in the queue.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from bench import results
from bench.running import ROOT, Daemon, Used, lines_of
from bench.workload import make_base, numbered
from longrun import checkpoint
from longrun.home import Home

FILES, ROWS, AHEAD = 1_000, 24, 5
EVERY = 10  # files between two looks
FROM, WINDOW, BOUND = 10, 100, 1.05
YOUNG_ONES, PORTION = 12, 20  # lineages that see a window each, and files trained in turn
LOGGED, LOOKS = 1_000_000, 8
WAITING, WAITING_BOUND_S = 10_000, 30.0
SETTINGS = "[inbox]\nsettle_s = 0.1\n[train]\nbatch_size = 8\n"
PLOT = results.RESULTS.with_name("growth.svg")
GROWN, YOUNG = "grown", "young"
CURVES = (
    "a file, ms",
    "a checkpoint, MB",
    "lineage.json, kB",
    "ledger, kB",
    "status, ms",
    "daemon, MB",
    "worker, MB",
    "preparer, MB",
    "daemon's CPU a file, ms",
    "worker's CPU a file, ms",
)


def looked_at(daemon: Daemon) -> dict[str, float]:
    home = daemon.home
    checkpoints = [path for path in (home / "current_model").glob("checkpoint-*") if path.is_dir()]
    newest = max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]))
    command = [sys.executable, str(ROOT / "daemon.py"), "status", "--home", str(home)]
    began = time.monotonic()
    subprocess.run(command, capture_output=True, check=True)
    status_ms = 1000 * (time.monotonic() - began)
    try:
        checkpoint_mb = sum(file.stat().st_size for file in newest.iterdir()) / 1e6
        lineage_kb = (newest / "lineage.json").stat().st_size / 1e3
    except FileNotFoundError:  # a newer one is there already
        return looked_at(daemon)
    ledger_kb = sum(file.stat().st_size for file in (home / "state").glob("ledger.sqlite3*")) / 1e3
    used = {role: Used.by(pid) for role, pid in pids_of(daemon).items()}
    memory = {f"{role}, MB": use.rss_mb for role, use in used.items()}
    cpu = {f"{role}, CPU s": use.cpu_s for role, use in used.items()}
    return {
        "a checkpoint, MB": checkpoint_mb,
        "lineage.json, kB": lineage_kb,
        "ledger, kB": ledger_kb,
        "status, ms": status_ms,
        **memory,
        **cpu,
    }


def train_all(daemon: Daemon, files: int, dice: random.Random) -> list[dict[str, float]]:
    """What was found after every so many files, their time included."""
    looks: list[dict[str, float]] = []
    dropped = 0
    while len(looks) < files // EVERY:
        told = daemon.status
        trained = told["trained"]
        if daemon.process.poll() is not None or told["rejected"]:
            sys.exit(f"the daemon has ended, or rejected a file: {daemon.home}/logs/daemon.log tells why")
        while dropped < min(files, trained + AHEAD * 2):
            daemon.drop(f"f{dropped:05d}", numbered(f"f{dropped:05d}", ROWS, dice))
            dropped += 1
        if trained >= EVERY * (len(looks) + 1):
            looks.append(looked_at(daemon) | {"files": trained})
        time.sleep(0.05)
    for former, look in itertools.pairwise(looks):
        for role in ("daemon", "worker"):
            spent_s = look[f"{role}, CPU s"] - former[f"{role}, CPU s"]
            look[f"{role}'s CPU a file, ms"] = 1000 * spent_s / (look["files"] - former["files"])
    ends = ends_of_files(daemon.home)
    for number, look in enumerate(looks):
        here = ends[EVERY * number : EVERY * (number + 1) + 1]
        look["a file, ms"] = 1000 * statistics.median(after - before for before, after in itertools.pairwise(here))
    return looks[1:]  # nothing was measured before the first


def ends_of_files(home: Path) -> list[float]:
    events = lines_of(home / "state" / "events.jsonl")
    return [datetime.fromisoformat(event["time"]).timestamp() for event in events if event["event"] == "trained"]


@dataclass(frozen=True)
class Took:
    """What a file took, ms, of a portion that was dropped at once."""

    wall_ms: float
    cpu_ms: float  # of the daemon, its worker and its preparer


def in_turn(grown: Daemon, young: Daemon, name: str) -> list[dict[str, Took]]:
    """What a file takes in either lineage, for each portion of a window; the young one's first is file FROM."""
    portion(young, f"{name}-warm", FROM)
    portion(grown, f"{name}-warm", FROM)
    found = []
    for number in range(WINDOW // PORTION):
        both = {GROWN: grown, YOUNG: young}
        order = [GROWN, YOUNG] if number % 2 else [YOUNG, GROWN]
        found.append({which: portion(both[which], f"{name}-{number}", PORTION) for which in order})
    return found


def portion(daemon: Daemon, name: str, files: int) -> Took:
    dice, trained, pids, before_s = random.Random(name), daemon.status["trained"], pids_of(daemon), cpu_s(daemon)
    for number in range(files):
        daemon.drop(f"{name}-{number:02d}", numbered(f"{name}-{number:02d}", ROWS, dice))
    daemon.wait(lambda: daemon.status["trained"] == trained + files)  # its log is long: reading it would cost time here
    daemon.wait(lambda: daemon.status["state"] == "idle")
    if all(pids.values()) and pids_of(daemon) != pids:
        raise RuntimeError(f"a process was replaced meanwhile, so its CPU time is not known: {pids}, {pids_of(daemon)}")
    first, *_, last = ends_of_files(daemon.home)[-files:]
    return Took(1000 * (last - first) / (files - 1), 1000 * (cpu_s(daemon) - before_s) / files)


def cpu_s(daemon: Daemon) -> float:
    """Of its processes so far."""
    return sum(Used.by(pid).cpu_s for pid in pids_of(daemon).values() if pid)


def pids_of(daemon: Daemon) -> dict[str, int]:
    told = daemon.status
    return {"daemon": daemon.process.pid, "worker": told["worker_pid"], "preparer": told["preparer_pid"]}


def wait_in_queue(daemon: Daemon, count: int) -> float:
    """Seconds until as many files, moved into the inbox at once, are in the queue; training is paused meanwhile."""
    aside = daemon.home / "aside"
    aside.mkdir()
    line = json.dumps(numbered("w", 1, random.Random(2))[0]) + "\n"
    for number in range(count):
        (aside / f"w{number:05d}.jsonl").write_text(line)
    subprocess.run([sys.executable, str(ROOT / "daemon.py"), "pause", "--home", str(daemon.home)], check=True)
    daemon.wait(lambda: daemon.status["state"] == "paused")
    began = time.monotonic()
    for file in aside.iterdir():
        file.rename(daemon.home / "inbox" / file.name)
    daemon.wait(lambda: daemon.status["queued"] >= count)
    return time.monotonic() - began


def seconds_a_file(daemon: Daemon, name: str) -> float:
    """Median time from drop to the end of training, in a warm daemon."""
    found = []
    for number in range(LOOKS):
        dropped = daemon.drop(f"{name}{number}", numbered(f"{name}{number}", ROWS, random.Random(number)))
        found.append(daemon.wait_told(f"{name}{number}.jsonl is trained") - dropped)
        daemon.wait(lambda: daemon.status["state"] == "idle")
    return statistics.median(found[1:])


def early_and_late(folder: Path, base: Path) -> tuple[float, float]:
    """Seconds that a file takes at the first steps of a model, and after as many logged steps as LOGGED."""
    with Daemon(folder, SETTINGS, "--base-model", str(base)) as daemon:
        early_s = seconds_a_file(daemon, "early")
    move_on(Home(folder), LOGGED)
    with Daemon(folder, SETTINGS, "--base-model", str(base)) as daemon:
        return early_s, seconds_a_file(daemon, "late")


def move_on(home: Home, step: int) -> None:
    """Give the model this global step, and the home a log that tells of all steps up to it."""
    with (home.logs / "metrics.jsonl").open("a") as log:
        log.writelines(f'{{"global_step": {number}, "loss": 1.0, "learning_rate": 2e-05}}\n' for number in range(step))
    newest = checkpoint.newest(home, checkpoint.Verifier(), print)
    assert newest is not None
    staged = home.staging / f"checkpoint-{step}"
    shutil.copytree(newest.path, staged)
    (staged / checkpoint.MANIFEST).unlink()
    state = json.loads((staged / checkpoint.TRAINER_STATE).read_bytes())
    (staged / checkpoint.TRAINER_STATE).write_text(json.dumps(state | {"global_step": step}))
    with checkpoint.OpenModel(home, newest) as model:
        model.commit(staged, replace(newest.lineage, global_step=step), keep=2)


def plot(looks: list[dict[str, float]], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "growth"
    figure, places = plt.subplots(2, 5, figsize=(17, 6), layout="constrained")
    for curve, place in zip(CURVES, places.flat, strict=True):
        place.plot([look["files"] for look in looks], [look[curve] for look in looks])
        place.set(title=curve, xlabel="files", ylim=(0, 1.2 * max(look[curve] for look in looks)))
    figure.savefig(file, metadata={"Date": None})


def report(
    looks: list[dict[str, float]],
    portions: list[dict[str, Took]],
    waiting: int,
    waited_s: float,
    ages: tuple[float, float],
    folder: Path,
) -> str:
    first = [look for look in looks if FROM < look["files"] <= FROM + WINDOW]
    last = [look for look in looks if look["files"] > looks[-1]["files"] - WINDOW]
    ends = {curve: [statistics.median(look[curve] for look in part) for part in (first, last)] for curve in CURVES}
    wall = [took[GROWN].wall_ms / took[YOUNG].wall_ms for took in portions]
    cpu = [took[GROWN].cpu_ms / took[YOUNG].cpu_ms for took in portions]
    grown = f"a file of a lineage of {looks[-1]['files']:,.0f} / one of files {FROM} to {FROM + WINDOW}"
    table = [
        [curve, f"{before:.1f}", f"{after:.1f}", f"{after / before:.2f}"] for curve, (before, after) in ends.items()
    ]
    goals = [
        [f"{grown}, wall time", f"at most {BOUND}", confident(wall), results.verdict_of(wall, BOUND)],
        [f"{grown}, CPU time", f"at most {BOUND}", confident(cpu), results.verdict_of(cpu, BOUND)],
        [
            f"{waiting:,} files at once, s until all are in the queue",
            f"at most {WAITING_BOUND_S:g}",
            f"{waited_s:.1f}",
            results.verdict(waited_s <= WAITING_BOUND_S),
        ],
    ]
    of_portions = [
        [
            f"a file of the {which} lineage",
            results.spread([took[which].wall_ms for took in portions], ".1f"),
            results.spread([took[which].cpu_ms for took in portions], ".1f"),
        ]
        for which in (GROWN, YOUNG)
    ]
    return f"""## Growth

{results.machine(folder)}

{results.explained(__doc__)}

{looks[-1]["files"]:,} files of {ROWS} rows, the tiny model. First are files {FROM} to {FROM + WINDOW}, last are
the last {WINDOW}; given are medians. In turn: {len(portions)} times {PORTION} files of either lineage, their
daemons side by side, with a new young one after each {WINDOW}. A goal is reached, or missed, where the interval is on
one side of its bound.

{results.table(("goal", "bound", "median (95 % interval)", ""), goals)}

{results.table(("in turn, median (least–greatest)", "wall, ms", "CPU, ms"), of_portions)}

{results.table(("", "first", "last", "last / first"), table)}

A file dropped into an idle daemon is trained after {ages[0]:.2f} s by a new model, and after {ages[1]:.2f} s by one at
global step {LOGGED:,} whose log tells of every step: a checkpoint carries no log, so its size is the same.

![The same as curves]({PLOT.name})
"""


def confident(ratios: list[float]) -> str:
    low, high = results.interval_of_median(ratios)
    return f"{statistics.median(ratios):.2f} ({low:.2f}–{high:.2f})"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__)
    parser.add_argument("--folder", type=Path, help="an existing folder to work in (default: a temporary one)")
    parser.add_argument("--files", type=int, default=FILES)
    parser.add_argument("--waiting", type=int, default=WAITING)
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-growth-", dir=args.folder) as work:
        folder = Path(work).resolve()
        make_base(folder / "base")
        with Daemon(folder / "home", SETTINGS, "--base-model", str(folder / "base")) as daemon:
            looks = train_all(daemon, args.files, random.Random(1))
            print(f"{args.files} files are trained", flush=True)
            portions = []
            for number in range(YOUNG_ONES):
                with Daemon(folder / f"young{number}", SETTINGS, "--base-model", str(folder / "base")) as young:
                    portions += in_turn(daemon, young, f"t{number}")
                print(f"in turn, ms a file: {portions[-(WINDOW // PORTION) :]}", flush=True)
            waited_s = wait_in_queue(daemon, args.waiting)
            print(f"{args.waiting} files were in the queue after {waited_s:.1f} s", flush=True)
        ages = early_and_late(folder / "aged", folder / "base")
        plot(looks, args.results.with_name(PLOT.name))
        results.write_section("growth", report(looks, portions, args.waiting, waited_s, ages, folder), args.results)
    print(f"written to {args.results}")


if __name__ == "__main__":
    main()
