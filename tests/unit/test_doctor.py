from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from longrun import doctor
from tests.unit.builders import plain_model

if TYPE_CHECKING:
    from longrun.home import Home


def answer(returncode: int, stdout: str = "", stderr: str = "") -> Any:
    return lambda command, **_: subprocess.CompletedProcess(command, returncode, stdout, stderr)


def test_the_doctor_finds_a_healthy_home_healthy(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", answer(0, "some noise\ncpu\n"))
    assert doctor.run(home, {"train.seed": 5}) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == ["ok"] * len(doctor._EXAMINATIONS)
    assert "ok   settings     longrun.toml: train.seed 42 -> 5 (flag)" in told
    assert "ok   device       cpu" in told
    assert not list(home.inbox.iterdir())


@pytest.mark.usefixtures("daemon")
def test_the_doctor_finds_what_is_wrong(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home.settings.write_text("[train]\nmax_steps = 5")
    monkeypatch.setattr(subprocess, "run", answer(1, "", "trace\nbad luck\n"))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("", (), {"free": 1}))
    monkeypatch.setattr("importlib.metadata.version", fail_to_find)
    monkeypatch.setattr("longrun.inbox.has_writer", lambda _: None)
    assert doctor.run(home, {}) == 1
    told = capsys.readouterr().out
    bad = [line[5:].split()[0] for line in told.splitlines() if line.startswith("BAD")]
    assert bad == ["settings", "disk", "packages", "device"]
    assert "BAD  device       bad luck" in told
    assert "held by the Longrun daemon (pid" in told
    assert "open writers cannot be seen" in told


def test_the_doctor_tells_of_former_models_that_can_be_deleted(home: Home) -> None:
    assert doctor._look_at_disk(home, {}).endswith("GB are free")
    plain_model(home.root / "current_model.replaced-20261129-080000-0a1b2c3d")
    os.truncate(home.root / "current_model.replaced-20261129-080000-0a1b2c3d" / "model.safetensors", 2_500_000_000)
    told = doctor._look_at_disk(home, {})
    assert told.endswith(f"; 1 former model, 2.5 GB: delete {home.model}.replaced-* when you are sure")


def test_the_doctor_blames_wrong_settings_once(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home.settings.write_text("[train]\nepochs = 2\nlearning_rat = 1")
    monkeypatch.setattr(subprocess, "run", answer(0, "cpu\n"))
    assert doctor.run(home, {"model.base_model": "tiny"}) == 1
    told = capsys.readouterr().out
    assert [line.split()[1] for line in told.splitlines() if line.startswith("BAD")] == ["settings"]
    assert "ok   base model   tiny" in told


def test_the_doctor_asks_for_the_device_that_the_settings_mean(home: Home) -> None:
    home.settings.write_text("[train]\nuse_cpu = true")
    assert doctor._look_at_device(home, {}) == "cpu (use_cpu is set)"


def fail_to_find(name: str) -> str:
    import importlib.metadata

    raise importlib.metadata.PackageNotFoundError(name)


def test_the_doctor_names_a_base_model_that_cannot_be_loaded(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subprocess, "run", answer(1))
    doctor.run(home, {"model.base_model": "org/name"})
    told = capsys.readouterr().out
    assert "BAD  base model   it cannot be loaded" in told
    assert "BAD  device       torch cannot be started" in told
