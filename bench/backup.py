"""Backups of a 2 GB model, against cp, restic and borg. `make bench` runs it and writes RESULTS.md.

Each round runs every operation with every tool before the next operation, in an order that rotates from round to
round; ratios are taken within a round, so that what else the machine does touches both sides alike.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import results
from bench.peers import OPERATIONS, OURS, THOROUGH, Borg, Cp, Ours, Restic, Thorough, Tool
from longrun import checkpoint, disk
from longrun.home import Home
from longrun.lineage import Lineage

STEPS = (100, 200, 300)
PIECE = 1 << 20
WAKENED = 2 << 10  # pieces; more than any run writes
SETTLE_S = 3.0  # Longrun reads again what changed less than two seconds before a backup
SAVING = ("first", "unchanged", "changed")


# -- the model


def make_model(home: Home, weights_mb: int, seed: int) -> Path:
    """Three checkpoints, committed and published as a run does it, of random bytes: nothing in it compresses."""
    dice = random.Random(seed)
    home.staging.mkdir(parents=True)
    for step in STEPS:
        staged = home.staging / f"checkpoint-{step}"
        staged.mkdir()
        write_weights(staged / "model.safetensors", weights_mb, dice)
        with (
            zipfile.ZipFile(staged / "optimizer.pt", "w") as archive,
            archive.open(zipfile.ZipInfo("archive/data/0"), "w", force_zip64=True) as moments,
        ):
            for _ in range(2 * weights_mb):
                moments.write(dice.randbytes(PIECE))
        (staged / "tokenizer.json").write_bytes(dice.randbytes(2 * PIECE).hex().encode())
        for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
            (staged / name).write_text(json.dumps({"model_type": "random"}))
        (staged / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        newest = checkpoint.newest(home, checkpoint.Verifier(), print)
        with checkpoint.OpenModel(home, newest) as model:
            model.commit(staged, Lineage(lineage="bench", base_model="random", global_step=step), keep=len(STEPS))
    return home.model


def write_weights(path: Path, megabytes: int, dice: random.Random) -> None:
    size = megabytes * PIECE
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(megabytes):
            file.write(dice.randbytes(PIECE))


def put_weights(model: Path, weights: Path) -> None:
    """Make `weights` those of the newest checkpoint, and of the model that is published."""
    newest = checkpoint.folder_of(model, STEPS[-1])
    for place in (newest / "model.safetensors", model / "model.safetensors"):
        place.unlink()
        os.link(weights, place)
    manifest = json.loads((newest / checkpoint.MANIFEST).read_bytes())
    manifest["files"]["model.safetensors"]["sha256"] = disk.hash_file(weights)
    disk.write_file(newest / checkpoint.MANIFEST, json.dumps(manifest).encode())


# -- measuring


@dataclass
class Measured:
    wall_s: float
    cpu_s: float  # user and system, of the tool and of the fsyncs after it
    rss_mb: float
    stored_mb: float = 0.0


def measure(command: list[str], tool: Tool, *, cwd: Path, durable: Path | None = None) -> Measured:
    """Run the command, then fsync every file and folder of what it wrote, for all tools alike."""
    with tempfile.TemporaryFile() as said:
        cpu, began = time.process_time(), time.monotonic()
        child = subprocess.Popen(command, cwd=cwd, env=tool.environment, stdout=said, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if durable is not None:
            disk.sync_tree(durable)
        wall, cpu = time.monotonic() - began, time.process_time() - cpu
        if child.returncode:
            said.seek(0)
            sys.exit(f"{' '.join(command)}: exit code {child.returncode}\n{said.read().decode(errors='replace')}")
    return Measured(wall, cpu + used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def one_round(tools: list[Tool], folder: Path, weights: list[Path]) -> dict[tuple[str, str], Measured]:
    """Every operation with every tool; results by operation and tool."""
    found = {}
    model = tools[0].model
    for tool in tools:
        subprocess.run(tool.begin(), env=tool.environment, check=True, stdout=subprocess.DEVNULL)
    for operation in OPERATIONS:
        if operation in ("first", "changed"):
            put_weights(model, weights[operation == "changed"])
            time.sleep(SETTLE_S)
        for tool in tools:
            if operation in tool.operations:
                result = operate(tool, operation, folder)
                print(f"  {operation:10} {tool.name:24} {result.wall_s:7.2f} s", flush=True)
                found[operation, tool.name] = result
    return found


def wake_memory(folder: Path) -> None:
    """Write a file that never reaches the disk, and remove it: its memory is what the next writer is given.

    The host of a virtual machine takes back memory that lies free. The first touch of such a page costs more than
    copying it does, and would fall on some runs and not on others.
    """
    piece = bytes(PIECE)
    with (folder / "wake").open("xb", buffering=0) as file:
        for _ in range(WAKENED):
            file.write(piece)
    (folder / "wake").unlink()


def operate(tool: Tool, operation: str, folder: Path) -> Measured:
    os.sync()
    wake_memory(folder)
    if operation == "verify":
        return measure(tool.verify(), tool, cwd=folder)
    if operation == "restore":
        target = folder / "restored"
        target.mkdir()
        result = measure(tool.restore(target), tool, cwd=target, durable=target)
        check_same(tool.model, tool.restored(target))
        shutil.rmtree(target)
        return result
    before = tool.stored_bytes()
    result = measure(tool.save(operation), tool, cwd=folder, durable=tool.store)
    result.stored_mb = (tool.stored_bytes() - before) / 1e6
    return result


def check_same(model: Path, restored: Path) -> None:
    """A restore that is fast and wrong is no restore."""
    subprocess.run(["diff", "-r", model, restored], check=True)


def start_up(ours: Ours, folder: Path, times: int = 20) -> tuple[list[Measured], list[Measured]]:
    """What `list` takes, and what Python takes to do nothing, in turn."""
    commands = (ours.type_in("list"), [sys.executable, "-c", ""])
    pairs = [[measure(command, ours, cwd=folder) for command in commands] for _ in range(times)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


# -- telling


def goals(rounds: list[dict[tuple[str, str], Measured]], starts: list[Measured]) -> str:
    """What was to be reached, the median within the rounds, and whether it was."""

    def ratio(operation: str, above: str, below: str) -> list[float]:
        pairs = [(found.get((operation, above)), found.get((operation, below))) for found in rounds]
        return [one.wall_s / other.wall_s for one, other in pairs if one and other]

    peak = [max(result.rss_mb for (_, name), result in found.items() if name in (OURS, THOROUGH)) for found in rounds]
    asked: list[tuple[str, list[float], str, float]] = [
        ("first backup, time: longrun / cp and fsync", ratio("first", OURS, "cp"), "at most", 1.5),
        ("first backup, time: restic / longrun", ratio("first", "restic", OURS), "at least", 3.0),
        ("full verify, time: restic / longrun", ratio("verify", "restic", OURS), "at least", 4.0),
        ("restore, time: longrun, verified / borg", ratio("restore", OURS, "borg"), "at most", 1.0),
        ("peak memory of longrun, MB", peak, "at most", 64.0),
        ("`list`, a small store, ms", [start.wall_s * 1e3 for start in starts], "at most", 150.0),
    ]
    rows = []
    for what, values, how, bound in asked:
        if values:
            reached = median(values) <= bound if how == "at most" else median(values) >= bound
            rows.append(
                (
                    what,
                    f"{how} {bound:g}",
                    results.spread(values, ".0f" if min(values) > 20 else ".2f"),
                    results.verdict(reached),
                )
            )
        else:
            rows.append((what, f"{how} {bound:g}", "peer not installed", "not measured"))
    return results.table(("goal", "bound", "median (least–greatest)", ""), rows)


def figures(rounds: list[dict[tuple[str, str], Measured]]) -> str:
    rows = []
    for operation, tool in rounds[0]:
        of_all = [found[operation, tool] for found in rounds]
        own = [result.wall_s / found[operation, OURS].wall_s for result, found in zip(of_all, rounds, strict=True)]
        rows.append(
            (
                OPERATIONS[operation],
                tool,
                results.spread([result.wall_s for result in of_all]),
                "1" if tool == OURS else results.spread(own),
                results.spread([result.cpu_s for result in of_all], ".1f"),
                f"{max(result.rss_mb for result in of_all):.0f}",
                f"{median(result.stored_mb for result in of_all):.0f}" if operation in SAVING else "",
            )
        )
    rows.sort(key=lambda row: (list(OPERATIONS.values()).index(row[0]), row[1] != OURS, row[1]))
    head = ("operation", "tool", "time, s", "time / longrun's", "CPU, s", "peak memory, MB", "stored, MB")
    return results.table(head, rows)


def report(tools: list[Tool], absent: list[str], rounds: list[dict[tuple[str, str], Measured]], folder: Path) -> str:
    model = tools[0].model
    sizes = {found.st_ino: found.st_size for found in (f.stat() for f in model.rglob("*") if f.is_file())}
    ours = next(tool for tool in tools if tool.name == OURS)
    starts, bare = start_up(ours, folder)
    own_mb = measure(["true"], ours, cwd=folder).rss_mb
    return f"""## Backups

{results.machine(folder)}
- {"; ".join(tool.says() for tool in tools if tool.name != THOROUGH)}
{"".join(f"- not installed, left out: {line}{chr(10)}" for line in absent)}
A model as Longrun keeps it: {len(STEPS)} checkpoints of random bytes, the newest published by hard links;
{sum(sizes.values()) / 1e9:.2f} GB of files. {len(rounds)} rounds. A round runs each operation with all tools in turn,
in an order that rotates and is turned round every second time; ratios are within a round. Before each run comes a
`sync`, and a file of {WAKENED * PIECE / 1e9:.1f} GB is written to memory and removed, so that the run gets
memory which the host has not taken back (a first touch of such a page costs more than copying it). Nothing else is
dropped, so sources and stores are read from memory as far as they fit, by all tools alike. In the time and the CPU
time is an fsync of every file and folder that the tool wrote. cp verifies by `sha256sum -c`; it and borg restore
without verifying, Longrun hashes every byte it wrote, restic has authenticated what it read. Given are medians
(least–greatest). Memory is the greatest of all rounds; what needs less than the {own_mb:.0f} MB of the
benchmark itself shows as that, since Linux hands them down to a child.

{goals(rounds, starts)}

Of `list`, {results.spread([start.cpu_s * 1e3 for start in starts], ".0f")} ms are CPU time. In turn with it, Python
that does nothing: {results.spread([start.wall_s * 1e3 for start in bare], ".0f")} ms, of which CPU time
{results.spread([start.cpu_s * 1e3 for start in bare], ".0f")} ms.

{figures(rounds)}
"""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.backup", description=__doc__)
    parser.add_argument("--folder", type=Path, help="an existing folder to work in (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weights-mb", type=int, default=203, help="MiB of each model.safetensors")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    args = parser.parse_args(argv)
    absent = [f"{kind.needs} (apt-get install {kind.package})" for kind in (Restic, Borg) if kind.missing()]
    for line in absent:
        print(f"not installed, left out: {line}")
    with tempfile.TemporaryDirectory(prefix="bench-backup-", dir=args.folder) as work:
        folder = Path(work).resolve()
        print(f"making a model in {folder}", flush=True)
        model = make_model(Home(folder / "home"), args.weights_mb, args.seed)
        weights = [folder / "weights-0", folder / "weights-1"]
        os.link(model / "model.safetensors", weights[0])
        write_weights(weights[1], args.weights_mb, random.Random(args.seed + 1))
        kinds = [kind for kind in (Cp, Restic, Borg, Ours, Thorough) if not kind.missing()]
        rounds = []
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", flush=True)
            place = folder / f"round-{number}"
            place.mkdir()
            tools = [kind(place / kind.__name__.lower(), model) for kind in kinds]
            # Backwards in every second round, so that no tool always comes after the same one, which may have
            # used up what the disk gives at once.
            at = number % len(tools)
            rotated = (tools[at:] + tools[:at])[:: -1 if number % 2 else 1]
            rounds.append(one_round(rotated, place, weights))
            if number < args.rounds - 1:
                shutil.rmtree(place)
        results.write_section("backup", report(tools, absent, rounds, place), args.results)
    print(f"written to {args.results}")


if __name__ == "__main__":
    main(sys.argv[1:])
