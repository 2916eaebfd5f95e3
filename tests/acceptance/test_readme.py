"""Every command of the README, run as a reader would: in a copy of the repository, top to bottom."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from longrun import config
from tests.lab import LIMIT_S, REPOSITORY, Lab
from tests.training.templates import random_weights_folder

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
HUB_MODEL = "Qwen/Qwen3-0.6B"  # stands in the README; a random one of its family takes its place here


@pytest.fixture
def checkout(tmp_path):
    """The repository as a reader has it: without what git ignores, such as a home that somebody left in this one."""
    folder = tmp_path / "longrun-checkout"
    ignored = [line.strip("/") for line in (REPOSITORY / ".gitignore").read_text(encoding="utf-8").splitlines()]
    shutil.copytree(REPOSITORY, folder, ignore=shutil.ignore_patterns(".git", *ignored))
    return folder


def environment(checkout: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HOME": str(checkout.parent),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "LONGRUN_INBOX_SETTLE_S": "0.3",
    }


def shell(checkout: Path, command: str) -> None:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=checkout,
        env=environment(checkout),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"


def commands() -> list[str]:
    return [line for block in BLOCKS for line in block.splitlines()]


class Reader:
    """Types the README's commands, and waits for what a reader would wait for."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self.lab = Lab(checkout, fresh=False)

    def types(self, command: str) -> None:
        if command == "python daemon.py run":
            self.lab.daemons.append(
                subprocess.Popen(shlex.split(command), cwd=self.checkout, env=environment(self.checkout))
            )
            self.lab.wait_until(lambda: "watches" in self.lab.log)
        elif command.startswith("jq "):
            assert self.lab.global_step == 2
        elif not command.startswith(ELSEWHERE):
            shell(self.checkout, command)
        for typed, trained in THEN_TRAINED.items():
            if typed in command:
                self.lab.wait_until(lambda trained=trained: trained in self.lab.names("trained"))


THEN_TRAINED = {
    "inbox/test1.jsonl": "test1.jsonl",
    "inbox/test2.jsonl": "test2.jsonl",
    "put examples/": "greetings-1.jsonl",
    "retry greetings": "greetings-1.2.jsonl",
    "python train.py examples/": "greetings-2.jsonl",
}
# The environment is made by make; a named base model has a test of its own.
ELSEWHERE = (". .venv", "python daemon.py run --home ~/qwen --base-model", "python daemon.py doctor --home ~/qwen")


def test_every_command_of_the_readme_works_in_its_order(checkout):
    reader = Reader(checkout)
    try:
        for command in commands():
            reader.types(command)
    finally:
        reader.lab.close()
    assert reader.lab.names("trained") == set(THEN_TRAINED.values())
    assert reader.lab.names("rejected") == set()


def test_a_named_base_model_is_trained(make_lab, torch_hand, tmp_path):
    random_weights_folder(tmp_path / "qwen3", "qwen3")
    lab = make_lab(hand=torch_hand)
    lab.drop("a.jsonl", 9)
    doctor, run = (
        command.replace(HUB_MODEL, str(tmp_path / "qwen3")).replace("~/qwen ", f"{lab.home} ").split()[2:]
        for command in commands()
        if HUB_MODEL in command
    )
    assert lab.command(*doctor).returncode == 0
    assert lab.drain(*run[1:]) == 0
    assert lab.times_trained("a", 9) == {1: 9}
    assert lab.lineage["base_model"] == str(tmp_path / "qwen3")
    told = lab.command("reset", "--yes").stdout
    assert f"it grew from {tmp_path / 'qwen3'}, and the settings name tiny" in told
    assert f'base_model = "{tmp_path / "qwen3"}"' in told


def test_the_example_settings_are_the_defaults_and_name_every_key():
    settings = config.load(REPOSITORY / "longrun.example.toml")
    assert settings == config.load(REPOSITORY / "no-such-file.toml")
    known = {f"{name}.{key}" for name, section in config.SECTIONS.items() for key in section.__dataclass_fields__}
    assert set(settings.sources) == known


@pytest.mark.parametrize("target", ["demo", "test", "run", "check", "bench"])
def test_the_make_targets_of_the_readme_exist(target):
    assert subprocess.run(["make", "-n", target], cwd=REPOSITORY, capture_output=True, check=False).returncode == 0


def test_links_and_folders_that_the_readme_names_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (REPOSITORY / link).exists(), link
