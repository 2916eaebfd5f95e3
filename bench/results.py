"""bench/RESULTS.md: one section a benchmark, each rewritten by the benchmark whose name it carries."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

RESULTS = Path(__file__).with_name("RESULTS.md")
HEAD = "# Benchmark results\n\nWritten by `make bench`; a change by hand is lost with the next run.\n"


def write_section(name: str, text: str, file: Path = RESULTS) -> None:
    """Put `text` in the place of the section of this name; a new one comes last."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->\n"
    whole = file.read_text(encoding="utf-8") if file.exists() else HEAD
    before, found, rest = whole.partition(begin)
    after = rest.partition(end)[2] if found else ""
    file.write_text(f"{before if found else whole + chr(10)}{begin}{text.rstrip()}\n{end}{after}", encoding="utf-8")


def machine(folder: Path) -> str:
    """Where and when this was measured, as a list in Markdown; `folder` is on the file system that was used."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    return "\n".join(
        (
            f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {_commit()}",
            f"- {_cpu()}, {os.cpu_count()} cores, {memory:.0f} GB RAM",
            f"- {_file_system(folder)}, Linux {platform.release()}, Python {platform.python_version()}",
            f"- load average when it ended: {load}; what else ran is part of this",
        )
    )


def packages(*names: str) -> str:
    return ", ".join(f"{name} {version(name)}" for name in names)


def explained(doc: str | None) -> str:
    """What a benchmark's docstring says after its name and colon."""
    _, _, text = (doc or "").partition(": ")
    return text[:1].upper() + text[1:].rstrip()


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rounds(many: int) -> str:
    return "1 round" if many == 1 else f"{many} rounds"


def verdict(reached: bool) -> str:
    """What stands beside a goal."""
    return "reached" if reached else "**missed**"


def verdict_of(values: Sequence[float], bound: float) -> str:
    """What stands beside a goal of at most `bound` for the median of which these are a sample."""
    low, high = interval_of_median(values)
    return "undecided" if low <= bound < high else verdict(high <= bound)


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """Between which two of these the median lies of what they are a sample of, with 95 % confidence.

    Whatever its distribution: a value is below that median as often as a coin shows heads (the sign test). Fewer than
    six values cannot tell; theirs is the whole range.
    """
    left_out, chance = 0, 0.0
    while (chance := chance + math.comb(len(values), left_out) / 2 ** len(values)) <= 0.025:
        left_out += 1
    ordered = sorted(values)
    at = max(0, left_out - 1)
    return ordered[at], ordered[-1 - at]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Median, least and greatest."""
    low, middle, high = (format(v, form) for v in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}–{high})"


def _commit() -> str:
    """The commit that is measured, and whether anything but results differs from it."""
    commit = _git("rev-parse", "--short", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":/!bench/RESULTS.md", ":/!bench/*.svg")
    return f"{commit}{', changed' if changed else ''}" if commit else "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(RESULTS.parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:  # no git here: no reason to lose what was measured
        return ""


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _file_system(folder: Path) -> str:
    """Type, device and options of the file system that the folder is on."""
    place = folder.resolve()
    while not place.is_mount():
        place = place.parent
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return next((f"{words[2]} on {words[0]} ({words[3]})" for words in reversed(mounts) if words[1] == str(place)), "?")
