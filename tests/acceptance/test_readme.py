"""Every command of the README, run as a reader would: in a copy of the repository, top to bottom."""

from __future__ import annotations

import json
import os
import re
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
    """The repository as a reader has it, and a shell in it whose `python` is ours."""
    folder = tmp_path / "longrun-checkout"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "state", "inbox", "current_model")
    shutil.copytree(REPOSITORY, folder, ignore=ignored)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").symlink_to(sys.executable)
    return folder


def shell(checkout: Path, command: str) -> str:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "LONGRUN_INBOX_SETTLE_S": "0.3",
    }
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode in (0, 3 if "status" in command else 0), f"$ {command}\n{said}"
    return said


def commands() -> list[str]:
    return [line for block in BLOCKS for line in block.splitlines()]


def test_every_command_of_the_readme_works_in_its_order(checkout):
    Lab.wait_until  # noqa: B018  (the waiting below is the Lab's)
    lab = Lab.__new__(Lab)
    lab.home, lab.inbox, lab.model = checkout, checkout / "inbox", checkout / "current_model"
    daemons: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        daemons.append(subprocess.Popen(["bash", "-c", f"exec {sys.executable} daemon.py run"], cwd=checkout,
                                        env={**os.environ, "LONGRUN_INBOX_SETTLE_S": "0.3"}))  # fmt: skip
        lab.wait_until(lambda: "watches" in lab.log and (checkout / "inbox").is_dir())

    def leave() -> None:
        while daemons:
            daemon = daemons.pop()
            daemon.terminate()
            daemon.wait()

    steps = {"test1": 1, "test2": 2}
    for command in commands():
        if command.startswith(". .venv"):
            continue
        if command == "python daemon.py run":
            start()
        elif "--base-model" in command:
            pass  # test_a_named_base_model_is_trained
        elif "inbox/test" in command:
            shell(checkout, command)
            name = "test1" if "test1" in command else "test2"
            lab.wait_until(lambda name=name: f"{name}.jsonl" in lab.names("trained"))
            assert lab.global_step == steps[name]
        elif "put examples" in command:
            shell(checkout, command)
            lab.wait_until(lambda: "greetings-1.jsonl" in lab.names("trained"))
        elif command == "python daemon.py stop":
            lab.wait_until(lambda: "greetings-1.2.jsonl" in lab.names("trained"))  # from retry, two lines above
            shell(checkout, command)
            leave()
        elif command.startswith("jq ") and shutil.which("jq") is None:
            assert json.loads((checkout / "current_model/trainer_state.json").read_text())["global_step"] == 2
        else:
            shell(checkout, command)
    leave()
    assert "greetings-2.jsonl" in lab.names("trained")


def test_a_named_base_model_is_trained(make_lab, tmp_path):
    (line,) = [command for command in commands() if HUB_MODEL in command]
    random_weights_folder(tmp_path / "qwen3", "qwen3")
    lab = make_lab()
    lab.drop("a.jsonl", 9)
    arguments = line.replace(HUB_MODEL, str(tmp_path / "qwen3")).split()[3:]
    assert lab.drain(*arguments) == 0
    assert lab.times_trained("a", 9) == {1: 9}
    assert lab.lineage["base_model"] == str(tmp_path / "qwen3")


def test_the_example_settings_are_the_defaults_and_name_every_key():
    settings = config.load(REPOSITORY / "longrun.example.toml")
    assert settings == config.load(REPOSITORY / "no-such-file.toml")
    known = {f"{name}.{key}" for name, section in config.SECTIONS.items() for key in section.__dataclass_fields__}
    assert set(settings.sources) == known


@pytest.mark.parametrize("target", ["demo", "test", "run", "check"])
def test_the_make_targets_of_the_readme_exist(target):
    assert subprocess.run(["make", "-n", target], cwd=REPOSITORY, capture_output=True, check=False).returncode == 0


def test_links_and_folders_that_the_readme_names_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (REPOSITORY / link).exists(), link
