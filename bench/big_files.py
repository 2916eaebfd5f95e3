"""Big files: examining and preparing them, against what reads, parses and tokenises them otherwise.

Each is a process of its own. Reading is Python's loop over the lines; parsing adds json.loads. Tokenising calls the
same tokenizer with 512 conversations at a time, put together without a template, offsets included. `map` is what
most trainers do: the datasets library reads the file, and its map renders the chat template with assistant masks and
tokenises, batched, in a process for each core. Prepare is what Longrun's preparer does once a file is examined: read
strictly, render, tokenise, mask, and write the tokens. Training begins when that is done: the plan counts the rows in
which a token is left to train, and its order draws from all of them. All works of a round run side by side and take
turns: one runs for some seconds while the others are stopped, which is left out of its time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import results
from bench.running import run
from bench.turns import SLICE_S, Way, take_turns
from bench.workload import chats, make_tokenizer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BATCH = 512
LEARNING = "learning"
SPENT = "spent.json"
WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
PIECE_MB = 500
LEARNED_MB = 5  # of such text the tokenizer is learned from
MAX_LENGTH = 4096
EXAMINE_BOUND_MB_S, PREPARE_BOUND = 200.0, 1.1


@dataclass(frozen=True)
class Spent:
    wall_s: float
    cpu_s: float
    peak_mb: float  # of the largest process


# -- the work, each in a process of its own: what comes before the yield is not measured


def read(file: Path, folder: Path) -> Iterator[None]:  # noqa: ARG001
    yield
    for _ in lines_of(file):
        pass


def parse(file: Path, folder: Path) -> Iterator[None]:  # noqa: ARG001
    yield
    for line in lines_of(file):
        json.loads(line)


def examine(file: Path, folder: Path) -> Iterator[None]:  # noqa: ARG001
    from longrun.examine import examine as examine_file

    yield
    examine_file(file)


def tokenise(file: Path, folder: Path) -> Iterator[None]:
    tokenizer = load(folder)
    yield
    texts = (as_text(json.loads(line)["messages"]) for line in lines_of(file))
    while batch := list(islice(texts, BATCH)):
        tokenizer(batch, add_special_tokens=False, return_offsets_mapping=True, verbose=False)


def prepare(file: Path, folder: Path) -> Iterator[None]:
    from longrun import wire
    from longrun.rows import RowFormat
    from longrun.training.masks import Encoder
    from longrun.training.prepare import prepare as prepare_file

    encoder = Encoder(load(folder), max_length=MAX_LENGTH)
    task = wire.Prepare(
        job=1,
        path=str(file),
        sha256=file.with_suffix(".sha256").read_text(),
        format=RowFormat.MESSAGES.value,
        on_bad_row="reject",
        max_line_bytes=1 << 24,
        max_length=MAX_LENGTH,
        folder=str(folder / "job" / "prepared"),
        rows=sum(1 for _ in lines_of(file)),
        base_model="bench",
        tokenizer=str(folder),
        trust_remote_code=False,
    )
    (folder / "job").mkdir(exist_ok=True)
    assert encoder.mask_source  # TRL's templates are loaded for it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as in the preparer
    yield
    prepare_file(task, encoder, lambda _: None)


def map_of_datasets(file: Path, folder: Path) -> Iterator[None]:
    from datasets import load_dataset

    tokenizer = load(folder)

    def rendered(batch: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = tokenizer.apply_chat_template(
            batch["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}

    yield
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        rows = load_dataset("json", data_files=str(file), split="train", cache_dir=cache)
        rows.map(rendered, batched=True, num_proc=os.cpu_count(), remove_columns=rows.column_names)


def learn(file: Path, folder: Path) -> Iterator[None]:  # noqa: ARG001
    yield
    make_tokenizer_of(folder, chats(LEARNED_MB))


WORK: dict[str, Callable[[Path, Path], Iterator[None]]] = {
    "reading": read,
    "parsing": parse,
    "examine": examine,
    "tokenising": tokenise,
    "prepare": prepare,
    "datasets, map": map_of_datasets,
}


def do(work: Callable[[Path, Path], Iterator[None]], file: Path, folder: Path) -> dict[str, float]:
    """When it began and ended, in seconds since the epoch, and what it used meanwhile."""
    steps = work(file, folder)
    next(steps)
    began, cpu_before = time.time(), cpu_s()
    for _ in steps:
        pass
    ended, used_s = time.time(), cpu_s() - cpu_before
    peak_kb = max(resource.getrusage(who).ru_maxrss for who in WHO)
    return {"began": began, "ended": ended, "cpu_s": used_s, "peak_mb": peak_kb * 1024 / 1e6}


def cpu_s() -> float:
    used = [resource.getrusage(who) for who in WHO]
    return sum(one.ru_utime + one.ru_stime for one in used)


def lines_of(file: Path) -> Iterator[bytes]:
    with file.open("rb") as lines:
        yield from lines


def as_text(messages: list[dict[str, str]]) -> str:
    return "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in messages)


def load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# -- measuring


def command(work: str, file: Path, folder: Path) -> list[str]:
    """Does one work, and leaves in SPENT, where it is started, what that took."""
    return [sys.executable, "-m", "bench.big_files", "--do", work, str(file), str(folder)]


def one_round(works: list[str], file: Path, folder: Path) -> dict[str, Spent]:
    homes = {work: Path(tempfile.mkdtemp(prefix="work-", dir=folder)) for work in works}
    ways = {work: Way([(command(work, file, folder), home)]) for work, home in homes.items()}
    take_turns(ways.values())
    return {work: spent(ways[work], homes[work]) for work in works}


def spent(way: Way, home: Path) -> Spent:
    told = json.loads((home / SPENT).read_text())
    wall_s = way.wall_s_until(told["ended"]) - way.wall_s_until(told["began"])
    return Spent(wall_s=wall_s, cpu_s=told["cpu_s"], peak_mb=told["peak_mb"])


def rounds_of(megabytes: int, rounds: int, works: list[str], folder: Path) -> list[dict[str, Spent]]:
    file = folder / f"{megabytes}.jsonl"
    write(file, megabytes)
    digest = subprocess.run(["sha256sum", str(file)], capture_output=True, text=True, check=True).stdout
    file.with_suffix(".sha256").write_text(digest.split()[0])
    found = []
    for number in range(rounds):
        at = number % len(works)
        found.append(one_round(works[at:] + works[:at], file, folder))
        told = ", ".join(f"{name} {spent.wall_s:.1f} s" for name, spent in found[-1].items())
        print(f"{megabytes} MB, round {number + 1} of {rounds}: {told}", flush=True)
    file.unlink()
    return found


def write(file: Path, megabytes: int) -> None:
    """So many megabytes of chats; PIECE_MB take a minute to make, so a larger file has the same ones several times."""
    pieces = math.ceil(megabytes / PIECE_MB)
    piece = file.with_suffix(".piece")
    with piece.open("w") as lines:
        lines.writelines(chats(megabytes // pieces))
    with file.open("wb") as whole:
        for _ in range(pieces):
            with piece.open("rb") as part:
                shutil.copyfileobj(part, whole)
    piece.unlink()


# -- the report


def report(megabytes: int, rounds: list[dict[str, Spent]], folder: Path) -> str:
    table = [
        [
            name,
            results.spread([found[name].wall_s for found in rounds], ".1f"),
            results.spread([megabytes / found[name].wall_s for found in rounds], ".1f"),
            results.spread([found[name].cpu_s for found in rounds], ".1f"),
            results.spread([found[name].peak_mb for found in rounds], ".0f"),
        ]
        for name in WORK
        if name in rounds[0]
    ]
    return f"""## Big files, {megabytes:,} MB

{results.machine(folder)}
- {results.packages("torch", "transformers", "tokenizers", "datasets")}

{results.explained(__doc__)}

Loading Python and libraries is left out. Memory is the peak of the largest process, with the pages of files that it
maps, as datasets does. Of {results.rounds(len(rounds))}, medians (least–greatest); slices of {SLICE_S:g} s.

{results.table(("goal", "bound", "found", ""), goals(megabytes, rounds))}

{limit_of_examining(megabytes, rounds)}

{results.table(("", "wall, s", "MB/s", "CPU, s", "peak memory, MB"), table)}
"""


def limit_of_examining(megabytes: int, rounds: list[dict[str, Spent]]) -> str:
    """What examining cannot go below: json.loads parses a row, and a dozen calls of Python look at what it has."""
    if not {"examine", "parsing"} <= rounds[0].keys():
        return ""
    examine, parsing = (statistics.median(spent[name].cpu_s for spent in rounds) for name in ("examine", "parsing"))
    besides = [spent[name].cpu_s for spent in rounds for name in ("tokenising", "datasets, map") if name in spent]
    told = f", and {examine / min(besides):.1%} of what tokenising takes" if besides else ""
    return f"""What limits examining is not the bytes but the rows, of 1 kB here: reading and parsing them by json.loads
alone, as any trainer must, comes to {megabytes / parsing:.0f} MB/s of a core. Examining, with hash, format and each
message checked, takes {examine / parsing:.1f} times as long{told}."""


def goals(megabytes: int, rounds: list[dict[str, Spent]]) -> list[list[str]]:
    """Of those whose works were measured: what is wanted, what was found, and whether that reaches it."""
    found = []
    if "examine" in rounds[0]:
        speeds = [megabytes / spent["examine"].cpu_s for spent in rounds]
        reached = statistics.median(speeds) >= EXAMINE_BOUND_MB_S
        bound = f"at least {EXAMINE_BOUND_MB_S:g}"
        found.append(["examine, MB/s of a core", bound, results.spread(speeds, ".0f"), results.verdict(reached)])
    if {"prepare", "tokenising"} <= rounds[0].keys():
        ratios = [spent["prepare"].wall_s / spent["tokenising"].wall_s for spent in rounds]
        reached = statistics.median(ratios) <= PREPARE_BOUND
        bound = f"at most {PREPARE_BOUND:g}"
        found.append(["prepare / tokenising, wall time", bound, results.spread(ratios), results.verdict(reached)])
    if {"prepare", "datasets, map"} <= rounds[0].keys():
        ratios = [spent["prepare"].wall_s / spent["datasets, map"].wall_s for spent in rounds]
        found.append(["prepare / datasets, map, wall time", "–", results.spread(ratios), ""])
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.big_files", description=__doc__)
    parser.add_argument("--folder", type=Path, help="an existing folder to work in (default: a temporary one)")
    parser.add_argument("--sizes", nargs="+", default=["100x3", "1000x1", "5000x1"], help="MEGABYTESxROUNDS")
    parser.add_argument("--works", nargs="+", default=list(WORK), choices=WORK, help="these alone")
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    parser.add_argument("--do", nargs=3, metavar=("WORK", "FILE", "FOLDER"), help="one work, as it is measured")
    args = parser.parse_args(argv)
    if args.do:
        work, file, folder = args.do
        os.environ["HF_HOME"] = str(Path(folder) / "hub")
        Path(SPENT).write_text(json.dumps(do({**WORK, LEARNING: learn}[work], Path(file), Path(folder))))
        return
    if set(args.works) != set(WORK) and args.results == results.RESULTS:
        parser.error("--works would leave the others out of what is published: name other --results")
    with tempfile.TemporaryDirectory(prefix="bench-big-", dir=args.folder) as place:
        here = Path(place).resolve()
        run(command(LEARNING, here, here), here)  # not in this process: Linux counts its memory as the children's
        for size in args.sizes:
            megabytes, rounds = map(int, size.split("x"))
            text = report(megabytes, rounds_of(megabytes, rounds, args.works, here), here)
            results.write_section(f"big files, {megabytes}", text, args.results)
    print(f"written to {args.results}")


if __name__ == "__main__":
    main()
