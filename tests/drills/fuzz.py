"""Fuzzes what reads a dropped file, examine and prepare, led by the branches that each input reaches (atheris).

    python -m tests.drills.fuzz [MINUTES]    60 unless told, from what earlier runs reached; needs the extra `drills`
    python -m tests.drills.fuzz FILE ...     what comes of these files: a finding fails as it did when it was found

What it must not find stands in `reading.py`. .fuzz/findings/ has each input that fails, the smallest for each place
that it fails in, beside what it raised; .fuzz/corpus/ what led further. LONGRUN_FUZZ=FOLDER puts both elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("LONGRUN_FUZZ", REPOSITORY / ".fuzz")).absolute()
CORPUS, FINDINGS = FOLDER / "corpus", FOLDER / "findings"
PREFIX = "longrun-drill-"
MINUTES = 60.0
MAX_BYTES = 20_000
INPUT_S, MEMORY_MIB = 20, 4096  # of one input, of the process: libFuzzer's own limits, which end it
EXECUTED = re.compile(r"stat::number_of_executed_units: (\d+)")
REACHED = re.compile(r"cov: (\d+)")


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--led"]:
        led(float(arguments[1]), Path(arguments[2]))
    if arguments and not arguments[0].replace(".", "", 1).isdecimal():
        return replay([Path(name) for name in arguments])
    return fuzz(60 * (float(arguments[0]) if arguments else MINUTES))


def replay(paths: list[Path]) -> int:
    from tests.drills.reading import Reading

    with tempfile.TemporaryDirectory() as folder:
        reading = Reading(Path(folder))
        for path in paths:
            reading.check(path.read_bytes())
    tell(f"{len(paths)} files: as it must be")
    return 0


def fuzz(seconds: float) -> int:
    """Runs the fuzzer, again where an input ended it, and tells what it did."""
    for folder in (CORPUS, FINDINGS):
        folder.mkdir(parents=True, exist_ok=True)
    before, end = set(FINDINGS.iterdir()), time.monotonic() + seconds
    executed, reached, ended = 0, 0, 0
    while (left_s := end - time.monotonic()) > 5:
        with (FOLDER / "log.txt").open("w") as log, tempfile.TemporaryDirectory(dir=fastest(), prefix=PREFIX) as home:
            child = [sys.executable, "-m", "tests.drills.fuzz", "--led", str(left_s), home]
            code = subprocess.run(child, cwd=REPOSITORY, stdout=log, stderr=log, check=False).returncode
        said = (FOLDER / "log.txt").read_text(errors="replace")
        counts = [int(count) for count in EXECUTED.findall(said)]
        executed += sum(counts)
        reached = max([reached, *map(int, REACHED.findall(said))])
        ended += code != 0
        if code and not counts:
            sys.exit(f"the fuzzer does not run:\n{said[-2000:]}")
    found = sorted(set(FINDINGS.iterdir()) - before)
    kept = len(list(CORPUS.iterdir()))
    tell(f"{executed} inputs, {reached} places reached, {kept} inputs kept for them, {ended} that ended the fuzzer")
    for path in found:
        tell(f"found: {path}")
    return 1 if found else 0


def fastest() -> str | None:
    """A folder in memory where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def led(seconds: float, home: Path) -> None:
    """In a process of its own, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["longrun"]):
        from tests.drills import reading

    seeds = FOLDER / "seeds"
    seeds.mkdir(exist_ok=True)
    for content in reading.starts():
        (seeds / hashlib.sha1(content).hexdigest()).write_bytes(content)
    words = FOLDER / "words.txt"
    escaped = ("".join(f"\\x{byte:02x}" for byte in word) for word in reading.words())
    words.write_text("".join(f'"{word}"\n' for word in escaped))
    options = (
        *(f"-max_total_time={int(seconds)}", f"-max_len={MAX_BYTES}", f"-dict={words}", "-print_final_stats=1"),
        *(f"-timeout={INPUT_S}", f"-rss_limit_mb={MEMORY_MIB}", f"-artifact_prefix={FINDINGS}/"),
    )
    held = reading.Reading(home)

    def check(content: bytes) -> None:
        try:
            held.check(content)
        except Exception as error:
            if not home.exists():  # somebody tidied up: no input's fault, and the next would say the same
                raise
            keep(content, error)

    def mutate(content: bytes, most: int, seed: int) -> bytes:
        return reading.mutate(bytes(content), most, seed, atheris.Mutate)

    atheris.Setup([sys.argv[0], *options, str(CORPUS), str(seeds)], check, custom_mutator=mutate)
    atheris.Fuzz()


def tell(line: str) -> None:
    sys.stdout.write(line + "\n")


def keep(content: bytes, error: Exception) -> None:
    """The smallest input for each place that fails, and what it says there."""
    frames = traceback.extract_tb(error.__traceback__)
    last = [frame for frame in frames if "longrun" in frame.filename or "drills" in frame.filename][-1]
    said = hashlib.sha1(re.sub(r"\d+", "", str(error)).encode(errors="replace")).hexdigest()[:6]
    path = FINDINGS / f"{type(error).__name__}-{Path(last.filename).stem}-{last.lineno}-{said}"
    if not path.exists() or path.stat().st_size > len(content):
        path.write_bytes(content)
        path.with_name(path.name + ".txt").write_text("".join(traceback.format_exception(error)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
