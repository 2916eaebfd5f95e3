"""Throughput: tokens a second of the training step, in Longrun and in what it is built on or stands beside.

The same rows, the same model, the loss on what the assistant says. Counted and timed at the model's forward pass, by
bench/probe for all alike: tokens are those of the rows, without padding, from the first forward after the warm-up to
the first of the last step. The start, the reading of rows and the saving are no part of it.

Of the matrix rate: 6 operations a weight and token, against what multiplying two matrices reaches on this device. It is
the rate of useful work, the same for all: Longrun gets some of it by not doing what no loss needs.
Between files: from the first forward of a file's last step to the first of the next file, so with that last step,
the evaluation, the checkpoint and what publishing it takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import results
from bench.recipes import BATCH
from bench.running import drain, lines_of, run
from bench.workload import chats, make_base, make_tokenizer_of, rows_for

if TYPE_CHECKING:
    from collections.abc import Sequence

# Steps of the first file, and how many of them warm up: on a GPU the clock rises, and memory is taken for longer rows.
STEPS = {"cpu": (40, 3), "cuda": (300, 20)}
SECOND = 5  # steps of the second file, which is there for the time between files
TRIED_ROWS = 64  # whose loss is compared
VOCABULARY = 8_000
SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
# The shape of Qwen3-0.6B (its config.json), for a GPU.
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
}


@dataclass(frozen=True)
class Way:
    """A recipe of bench/recipes.py, or Longrun with these settings."""

    name: str
    recipe: str = ""
    settings: str = ""

    def train(self, home: Path, files: list[Path]) -> None:
        probe = str(home / "forwards.jsonl")
        if self.recipe:
            run([sys.executable, "-m", "bench.recipes", self.recipe, str(files[0]), str(home)], home, BENCH_PROBE=probe)
        else:
            settings = f"[train]\nsave_steps = 500\n{self.settings}"
            drain(home, home / "base", files, settings, BENCH_PROBE=probe)


STOCK, OURS = Way("Trainer, as it is set up", "answers_only"), Way("Longrun, as it is set up")
WAYS = (
    STOCK,
    Way("Trainer, group_by_length", "answers_by_length"),
    Way("TRL's SFTTrainer, as it is set up", "sft_defaults"),
    Way("TRL's SFTTrainer, no bf16 on a CPU, no gradient_checkpointing", "sft_in_full"),
    Way(f"Longrun, {BATCH} rows at once", settings=f"per_device_train_batch_size = {BATCH}\n"),
    OURS,
)


@dataclass(frozen=True)
class Found:
    tokens_s: float
    between_files_s: float | None = None
    checkpoint_s: float | None = None


def play(way: Way, home: Path, base: Path, files: list[Path], warm_up: int) -> Found:
    try:
        return _play(way, home, base, files, warm_up)
    finally:
        shutil.rmtree(home)  # checkpoints of a large model: no disk has room for those of all rounds


def _play(way: Way, home: Path, base: Path, files: list[Path], warm_up: int) -> Found:
    shutil.copytree(base, home / "base")
    (home / "files.json").write_text(json.dumps([file.stem for file in files]))
    way.train(home, files)
    forwards = lines_of(home / "forwards.jsonl")
    last = forwards[-1]["global_step"] - (0 if way.recipe else SECOND)
    begin, end = (next(f["time"] for f in forwards if f["global_step"] == step) for step in (warm_up, last))
    tokens = sum(forward["tokens"] for forward in forwards if warm_up <= forward["global_step"] < last)
    if way.recipe:
        return Found(tokens / (end - begin))
    next_file = next(forward["time"] for forward in forwards if forward["global_step"] == last + 1)
    events = lines_of(home / "state" / "events.jsonl")
    saved = next(event for event in events if event["event"] == "saved" and event["global_step"] == last + 1)
    return Found(tokens / (end - begin), next_file - end, saved["seconds"])


# -- what goes in


def make_files(folder: Path, data: Sequence[Path], steps: int) -> list[Path]:
    """a.jsonl of so many steps, and a short b.jsonl: the first rows of `data`, or of chats made in code."""
    given = (line for path in data for line in path.read_text(encoding="utf-8").splitlines(keepends=True))
    lines = given if data else chats(1000)
    folder.mkdir()
    files = [folder / "a.jsonl", folder / "b.jsonl"]
    for file, count in zip(files, (steps, SECOND), strict=True):
        file.write_text("".join(islice(lines, rows_for(count * BATCH))))
    return files


def make_model(folder: Path, file: Path, sizes: dict[str, int]) -> None:
    messages = (row["messages"] for row in lines_of(file))
    texts = (message["content"] for chat in messages for message in chat)
    make_base(folder, **{"vocab_size": VOCABULARY} | sizes)
    make_tokenizer_of(folder, texts, VOCABULARY)


# -- what is compared besides


def difference_of_losses(base: Path, file: Path) -> float:
    """The greatest difference of a row's loss between the row alone and, as Longrun has it, with one of its length."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from longrun.training.data import Collator
    from longrun.training.loss import only_where_trained

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).to(device), AutoTokenizer.from_pretrained(base)
    samples = []
    for number, given in enumerate(lines_of(file)[:TRIED_ROWS]):
        row = tokenizer.apply_chat_template(given["messages"], return_dict=True, return_assistant_tokens_mask=True)
        ids, marks = torch.tensor(row["input_ids"]), torch.tensor(row["assistant_masks"])
        samples.append({"input_ids": ids.numpy(), "labels": ids.where(marks == 1, -100).numpy(), "row": number})
    samples.sort(key=lambda sample: -len(sample["input_ids"]))
    collator = Collator(0)
    collator.only_trained = only_where_trained(model)
    assert collator.only_trained, "this model is known to take it"
    greatest = 0.0
    with torch.no_grad():
        for at in range(0, len(samples), 2):
            pair = samples[at : at + 2]
            batch = collator(pair)
            batch.pop("rows")
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            logits, labels = model(**batch).logits, batch["shift_labels"]
            for row, sample in enumerate(pair):
                together = torch.nn.functional.cross_entropy(logits[row], labels[row])
                ids, wanted = (
                    torch.tensor(sample[name], device=device)[None].long() for name in ("input_ids", "labels")
                )
                alone = model(ids, labels=wanted).loss
                assert alone.isfinite() and together.isfinite(), "a loss that is no number compares with nothing"
                greatest = max(greatest, float(abs(together - alone) / alone))
    return greatest


def matrix_rate() -> float:
    """Operations a second of multiplying two matrices, in the precision that training uses here."""
    import torch

    on_gpu = torch.cuda.is_available()
    size, device, dtype = (8192, "cuda", torch.bfloat16) if on_gpu else (2048, "cpu", torch.float32)
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    rates = []
    for _ in range(20):
        began = time.perf_counter()
        matrix @ matrix
        if on_gpu:
            torch.cuda.synchronize()
        rates.append(2 * size**3 / (time.perf_counter() - began))
    return statistics.median(rates)


def weights_of(base: Path) -> int:
    from transformers import AutoModelForCausalLM

    return int(AutoModelForCausalLM.from_pretrained(base).num_parameters())


# -- the report


def report(found: dict[Way, list[Found]], facts: dict[str, Any], folder: Path) -> str:
    ratios = {
        way: [a.tokens_s / b.tokens_s for a, b in zip(runs, found[STOCK], strict=True)] for way, runs in found.items()
    }
    rows = [
        [
            way.name,
            results.spread([run.tokens_s for run in runs], ",.0f"),
            results.spread(ratios[way]),
            results.spread([6 * facts["weights"] * run.tokens_s / facts["rate"] for run in runs]),
        ]
        for way, runs in found.items()
    ]
    ours = found[OURS]
    between = results.spread([run.between_files_s or 0.0 for run in ours])
    checkpoint = results.spread([run.checkpoint_s or 0.0 for run in ours])
    reached = results.verdict(statistics.median(ratios[OURS]) >= 1)
    return f"""## Throughput

{results.machine(folder)}
- {results.packages("torch", "transformers", "trl")}; {facts["device"]}, {facts["rate"] / 1e9:,.0f} GFLOP/s of matrices

{results.explained(__doc__)}

{facts["rows"]}: {facts["steps"]} steps of {BATCH} rows, {facts["warm_up"]} to warm up; a Llama of
{facts["weights"] / 1e6:.1f} million weights, {VOCABULARY:,} tokens in its tokenizer.
{results.rounds(len(ours))} in turn, median (least–greatest).

At least the stock Trainer's tokens a second: {results.spread(ratios[OURS])} times, {reached}. The loss of a row
alone and, as Longrun has it, beside one of its length differ by {facts["difference"]:.1e} of it at most
({TRIED_ROWS} rows, in float32). Between two files {between} s, of it the checkpoint {checkpoint} s.

{results.table(("way", "tokens/s", "/ stock", "of the matrix rate"), rows)}
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description=__doc__)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="chat JSONL files (default: made in code)")
    parser.add_argument("--folder", type=Path, help="an existing folder to work in (default: a temporary one)")
    parser.add_argument("--steps", type=int, help="of the first file (default: 40; 300 on a GPU)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="ways whose name contains this, and those compared with")
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    args = parser.parse_args(argv)
    if args.only and args.results == results.RESULTS:
        parser.error("--only would leave the other ways out of what is published: name other --results")
    import torch

    on_gpu = torch.cuda.is_available()
    enough, warm_up = STEPS["cuda" if on_gpu else "cpu"]
    steps = args.steps or enough
    chosen = [way for way in WAYS if args.only in way.name or way in (STOCK, OURS)]
    found: dict[Way, list[Found]] = {way: [] for way in chosen}
    with tempfile.TemporaryDirectory(prefix="bench-throughput-", dir=args.folder) as work:
        folder = Path(work).resolve()
        files = make_files(folder / "files", args.data, steps)
        make_model(folder / "base", files[0], LARGE if on_gpu else SMALL)
        facts = {
            "device": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads",
            "rate": matrix_rate(),
            "weights": weights_of(folder / "base"),
            "difference": difference_of_losses(folder / "base", files[0]),
            "rows": "Given rows" if args.data else "Chats made in code",
            "steps": steps,
            "warm_up": warm_up,
        }
        if on_gpu:
            torch.cuda.empty_cache()  # the ways are processes of their own, and want it
        for number in range(args.rounds):
            for at, way in enumerate(chosen[number % len(chosen) :] + chosen[: number % len(chosen)]):
                found[way].append(play(way, folder / f"{number}-{at}", folder / "base", files, warm_up))
                print(f"round {number + 1} of {args.rounds}, {way.name}: {found[way][-1]}", flush=True)
            results.write_section("throughput", report(found, facts, folder), args.results)  # a round takes long
    print(f"written to {args.results}")


if __name__ == "__main__":
    main()
