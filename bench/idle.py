"""Idle: what the daemon and its children use while nothing is to be done, and how long each command takes to begin.

Used are CPU time and resident memory as Linux counts them. Waiting is a daemon that has not trained yet; warm is one
that has trained a file and keeps the model in its worker's memory (`worker.idle_release_minutes`). Both are measured at
the same time. GPU memory is that of all devices, by whoever, as nvidia-smi tells it.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import results
from bench.running import ROOT, Daemon, Used
from bench.workload import make_base, numbered

CPU_BOUND, RSS_BOUND_MB = 0.001, 60.0
QUIET_S = 15.0  # until what a drop or a start had caused is over
NOTHING = "python -c pass"
COMMANDS = {
    "daemon.py": ("--help", "status", "status --json", "logs", "pause", "resume", "check a.jsonl"),
    "backup_manager.py": ("--help", "list"),
    "train.py": ("--help",),
}


def used_idle(daemons: dict[str, Daemon], minutes: float) -> list[list[str]]:
    """A row for each process of each daemon: share of a core over these minutes, and memory at their end."""
    time.sleep(QUIET_S)
    pids = {(state, role): pid for state, daemon in daemons.items() for role, pid in processes_of(daemon).items()}
    before = {process: Used.by(pid) for process, pid in pids.items()}
    time.sleep(60 * minutes)
    after = {process: Used.by(pid) for process, pid in pids.items()}
    share = {process: (after[process].cpu_s - before[process].cpu_s) / (60 * minutes) for process in pids}
    return [[*process, f"{100 * share[process]:.3f}", f"{after[process].rss_mb:.0f}"] for process in pids]


def processes_of(daemon: Daemon) -> dict[str, int]:
    told = {role: daemon.status[f"{role}_pid"] for role in ("worker", "preparer")}
    return {"daemon": daemon.process.pid} | {role: pid for role, pid in told.items() if pid}


def gpu_memory_mb() -> int | None:
    """In use on all GPUs, by whoever: inside a container nvidia-smi names no processes. None where there is no GPU."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return sum(map(int, subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()))
    except (FileNotFoundError, subprocess.CalledProcessError, ValueError):  # "[N/A]" where it is shared
        return None


def released(daemon: Daemon) -> int | None:
    """GPU memory when the idle worker has ended, for which the settings are edited."""
    (daemon.home / "longrun.toml").write_text("[worker]\nidle_release_minutes = 0.01\n")
    daemon.wait(lambda: daemon.status["worker_pid"] is None)
    return gpu_memory_mb()


def how_long(command: list[str], home: Path) -> float:
    began = time.monotonic()
    subprocess.run(command, cwd=home, capture_output=True, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return 1000 * (time.monotonic() - began)


def commands_take(home: Path, rounds: int) -> list[list[str]]:
    """Wall milliseconds of each command, in turn with a Python that does nothing."""
    lines = {NOTHING: [sys.executable, "-c", "pass"]}
    for program, ways in COMMANDS.items():
        for way in ways:
            lines[f"{program} {way}"] = [sys.executable, str(ROOT / program), *way.split()]
    found: dict[str, list[float]] = {line: [] for line in lines}
    for _ in range(rounds):
        for line, command in lines.items():
            of_home = [] if line == NOTHING or "--help" in line else ["--home", str(home)]
            found[line].append(how_long([*command, *of_home], home))
    return [[line, results.spread(values, ".0f")] for line, values in found.items()]


def report(
    idle: list[list[str]], commands: list[list[str]], gpu: dict[str, int | None], minutes: float, folder: Path
) -> str:
    daemons = [(float(share) / 100, float(rss)) for _, role, share, rss in idle if role == "daemon"]
    share, rss = (max(values) for values in zip(*daemons, strict=True))
    on_gpu = ", ".join(f"{used} MB {when}" for when, used in gpu.items() if used is not None)
    reached = results.verdict(share < CPU_BOUND and rss < RSS_BOUND_MB)
    return f"""## Idle

{results.machine(folder)}

{results.explained(__doc__)}

Over {minutes:g} minutes each. The daemon: {100 * share:.3f} % of a core of less than {100 * CPU_BOUND:g} %,
{rss:.0f} MB of less than {RSS_BOUND_MB:g} MB: {reached}. GPU memory: {on_gpu or "there is no GPU"}.

{results.table(("", "process", "CPU, % of a core", "memory, MB"), idle)}

{results.table(("command", "wall, ms"), commands)}
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.idle", description=__doc__)
    parser.add_argument("--folder", type=Path, help="an existing folder to work in (default: a temporary one)")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-idle-", dir=args.folder) as work:
        folder = Path(work).resolve()
        make_base(folder / "base")
        home = folder / "warm"
        base = ("--base-model", str(folder / "base"))
        gpu = {"before": gpu_memory_mb()}
        with Daemon(folder / "waiting", "", *base) as waiting, Daemon(home, "", *base) as warm:
            warm.drop("a", numbered("a", 100, random.Random(1)))
            warm.wait_told("a.jsonl is trained")
            idle = used_idle({"waiting": waiting, "warm": warm}, args.minutes)
            gpu["warm"] = gpu_memory_mb()
            gpu["when the idle worker has ended"] = released(warm)
            (home / "trained" / "a.jsonl").rename(home / "a.jsonl")
            how_long([sys.executable, str(ROOT / "backup_manager.py"), "backup", "current_model/"], home)
            commands = commands_take(home, args.rounds)
        results.write_section("idle", report(idle, commands, gpu, args.minutes, folder), args.results)
    print(f"written to {args.results}")


if __name__ == "__main__":
    main()
