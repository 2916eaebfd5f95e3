from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from longrun.errors import BadConfig
from longrun.home import Home, find_home

if TYPE_CHECKING:
    from pathlib import Path


def test_a_home_is_made_without_a_model(home: Home) -> None:
    made = {path.name for path in home.root.iterdir()}
    assert made == {"inbox", "trained", "rejected", "logs", "state"}
    assert {path.name for path in home.state.iterdir()} == {"jobs", "staging", "requests"}
    home.make()


def test_the_state_is_for_its_owner_only(home: Home) -> None:
    home.state.chmod(0o755)
    home.make()
    assert stat.S_IMODE(home.state.stat().st_mode) == 0o700


def test_the_flag_comes_before_the_environment_before_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LONGRUN_HOME", raising=False)
    assert find_home(None).root == tmp_path
    monkeypatch.setenv("LONGRUN_HOME", str(tmp_path / "there"))
    assert find_home(None).root == tmp_path / "there"
    assert find_home("flag").root == tmp_path / "flag"


def test_symbolic_links_are_resolved_once(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert find_home(str(tmp_path / "link")).root == tmp_path / "real"


def test_everything_has_its_place(home: Home) -> None:
    assert home.claimed(7).relative_to(home.root).as_posix() == "state/jobs/000007/claimed"
    assert home.prepared(7) == home.job(7) / "prepared"
    within = [home.ledger, home.status, home.events, home.daemon_lock, home.model_lock, home.set_aside, home.staging]
    assert all(path.parent == home.state for path in within)
    assert home.log == home.root / "logs/daemon.log"
    assert (home.model.name, home.settings.name) == ("current_model", "longrun.toml")


def test_a_file_is_no_home(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("hello")
    with pytest.raises(BadConfig, match="it is not a folder"):
        find_home(str(tmp_path / "README.md"))


def test_a_path_that_is_no_text_is_no_home(tmp_path: Path) -> None:
    home = Home(tmp_path / os.fsdecode(b"\xff"))
    home.root.mkdir()
    with pytest.raises(BadConfig, match="its path is not UTF-8; choose another"):
        home.check()


def test_a_home_has_no_id_before_it_was_given_one(home: Home) -> None:
    assert home.id == ""
    home.id_file.write_text("1" * 32)
    assert home.id == "1" * 32
