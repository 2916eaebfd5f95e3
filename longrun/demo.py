"""`daemon.py demo`: the real daemon on a scratch home, two uneven files, and the proof that the rows add up."""

from __future__ import annotations

import collections
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from longrun import status
from longrun.commands import say
from longrun.errors import BadConfig, ExitCode, LongrunError
from longrun.home import Home

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = (REPOSITORY / "examples" / "greetings-1.jsonl", REPOSITORY / "examples" / "greetings-2.jsonl")
QUESTION = "Hello, I am Grace."
LIMIT_S = 110.0
BATCH_SIZE = 2
SETTINGS = f"""\
[train]
batch_size = {BATCH_SIZE}
learning_rate = 5e-3  # the tiny model learns from two handfuls of rows only if it learns fast

[log]
rows = true  # write logs/rows.jsonl, which the demo counts
progress_s = 2
"""


def run(folder: str | None) -> int:
    """Train two files in `folder` (default: a scratch one), check every row, ask the model, say what comes next."""
    home = _fresh_home(folder)
    say(f"A scratch home with the built-in tiny model: {home.root}\n")
    daemon = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "daemon.py"), "run", "--home", str(home.root)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    try:
        for number, example in enumerate(EXAMPLES, start=1):
            say(f"\n$ cp {example.relative_to(REPOSITORY)} {home.inbox}/\n")
            shutil.copy(example, home.inbox)
            _wait_until_trained(home, daemon, number)
    finally:
        daemon.terminate()
        daemon.wait()
    lineage = json.loads((home.model / "lineage.json").read_bytes())
    good = _show_rows(home, lineage) and _show_steps(lineage)
    _show_answer(home)
    say(_NEXT.format(home=home.root))
    return ExitCode.OK if good else ExitCode.FAILURE


def _fresh_home(folder: str | None) -> Home:
    root = Path(folder or tempfile.mkdtemp(prefix="longrun-demo-")).resolve()
    if root.is_dir() and any(root.iterdir()):
        raise BadConfig(
            f"cannot use {root} for the demo: it is not empty", hint="leave --home out, or name a new folder"
        )
    root.mkdir(parents=True, exist_ok=True)
    home = Home(root)
    home.make()
    home.settings.write_text(SETTINGS, encoding="utf-8")
    return home


def _wait_until_trained(home: Home, daemon: subprocess.Popen[bytes], files: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while status.read(home)["trained"] < files:
        if daemon.poll() is not None:
            raise LongrunError(f"the daemon ended with exit code {daemon.returncode}", hint=f"see {home.log}")
        if status.read(home)["rejected"] or time.monotonic() > deadline:
            raise LongrunError("a demo file was not trained", hint=f"see {home.log}")
        time.sleep(0.2)


def _show_rows(home: Home, lineage: dict[str, Any]) -> bool:
    """Count, from what reached the model at each step, how often every row was trained."""
    steps: dict[int, tuple[int, list[int]]] = {}
    for line in (home.logs / "rows.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        steps[entry["global_step"]] = (entry["job"], entry["rows"])  # of a step done again, the last time counts
    say(f"\n{'file':<22}{'rows':>6}{'steps':>7}{'never':>7}{'once':>7}{'more':>6}   loss of the last step")
    exact = True
    for file in lineage["files"]:
        times = collections.Counter(row for job, rows in steps.values() if job == file["job"] for row in rows)
        rows = file["rows"] + file["held_out_rows"]
        counts = collections.Counter(times[row] for row in range(1, rows + 1))
        more = sum(count for often, count in counts.items() if often > 1)
        say(
            f"{file['name']:<22}{rows:>6}{file['done_steps']:>7}{counts[0]:>7}{counts[1]:>7}{more:>6}"
            f"   {file['final_loss']:.4f}"
        )
        exact &= counts[1] == file["rows"] and counts[0] == file["held_out_rows"] and more == 0
    say("Every row was trained exactly once." if exact else "ROWS WERE LOST OR TRAINED TWICE.")
    return exact


def _show_steps(lineage: dict[str, Any]) -> bool:
    planned = [math.ceil(file["rows"] / BATCH_SIZE) for file in lineage["files"]]
    adds_up = sum(planned) == lineage["global_step"] and len(planned) == len(EXAMPLES)
    sum_in_words = " + ".join(map(str, planned))
    say(f"Steps: {sum_in_words} = {sum(planned)}, and the model is at global step {lineage['global_step']}.")
    return adds_up


def _show_answer(home: Home) -> None:
    command = [sys.executable, "-m", "longrun.training.ask", str(home.model), QUESTION]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    said = answer.stdout.strip() if answer.returncode == 0 else answer.stderr.strip()
    say(f"\nYou:    {QUESTION}\nModel:  {said}")


_NEXT = """
Next:
  make run                                     watch the inbox/ of this folder with the tiny model
  python daemon.py run --base-model NAME       a real model: a folder, or a hub name
  cp my_chats.jsonl inbox/                     drop a file; `python daemon.py logs -f` shows its plan
  python daemon.py status                      what it is doing
The demo's home is {home}; delete it when you like."""
