"""The program from outside; where nothing depends on that, in this process."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import backup_manager
from longrun import backup_commands, checkpoint, disk, locks, replacing
from longrun import store as stores
from longrun.home import Home
from longrun.store import Store
from tests.unit.builders import add_checkpoint, content_of, damage, lineage_at, plain_model, stage, state_of
from tests.unit.test_store import weights_in

if TYPE_CHECKING:
    from collections.abc import Callable

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = f"python3 {REPOSITORY / 'backup_manager.py'}"


@pytest.fixture
def trained(home: Home, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home with a model, from which nothing is asked by its environment."""
    monkeypatch.delenv("LONGRUN_HOME", raising=False)
    monkeypatch.chdir(home.root)
    add_checkpoint(home, 5)
    return home


def default_store(home: Home) -> Path:
    return home.root / "backups"


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the program says to these arguments, which it does as asked."""

    def say(*words: Any, code: int = 0) -> str:
        capsys.readouterr()
        assert backup_manager.main([str(word) for word in words]) == code
        told = capsys.readouterr()
        return told.err if code else told.out

    return say


BARE = """
import sys
import backup_manager
for words in sys.argv[1:]:
    code = backup_manager.main(words.split())
    print("exit code", int(code), flush=True)
"""


def bare(folder: Path, *lines: str) -> list[str]:
    """What the program says to each line, run by an interpreter that knows nothing but the standard library."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LONGRUN", "PYTHON", "COV"))}
    command = [sys.executable, "-S", "-s", "-c", BARE, *lines]
    done = subprocess.run(
        command,
        cwd=folder,
        env=kept | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return [said + code[:1] for said, code in zip(*[iter(_split(done.stdout))] * 2, strict=True)]


def _split(text: str) -> list[str]:
    return re.split(r"exit code (\d+)\n", text)[:-1]


# -- with the standard library alone


def test_all_but_archives_works_without_any_package(trained: Home) -> None:
    whole = state_of(trained.model)
    made, listed, verified, restored, pruned, refused = bare(
        trained.root,
        "backup current_model/ --type pre_recovery --json",
        "list",
        "verify",
        "restore latest",
        "prune --execute",
        "export latest out.tar.zst",
    )
    assert json.loads(made[:-1])["complete"]
    assert all(said.endswith("\n0") for said in (made, listed, verified, restored, pruned))
    assert " step 5 " in listed
    assert "all good (every byte)" in verified
    assert state_of(trained.model) == whole
    assert refused.endswith("pip install zstandard, or name a .tar\n1")


def test_the_command_that_is_printed_restores(trained: Home, tmp_path: Path, said: Any, monkeypatch: Any) -> None:
    model = plain_model(tmp_path / "a folder" / "it's a model")
    whole = content_of(model)
    monkeypatch.chdir(REPOSITORY)
    for source, options in ((model, ["--store", tmp_path / "my backups"]), (trained.model, [])):
        command = said("backup", source, *options).splitlines()[-1].removeprefix("to restore it: ")
        shutil.rmtree(source)
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert source.is_dir()
    assert content_of(model) == whole


def test_help_shows_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        backup_manager.main(["--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "python3 backup_manager.py backup current_model/ --type pre_recovery   before you delete" in told
    assert "75 locked by another process, 78 bad configuration" in told


@pytest.mark.parametrize("command", backup_commands._COMMANDS)
def test_each_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        backup_manager.main([command, "--help"])
    assert ended.value.code == 0
    assert f"example: python3 backup_manager.py {command} " in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["nonsense"], ["restore"], ["backup", "x", "--type", "odd"]])
def test_what_is_no_command_is_told_so(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        backup_manager.main(words)
    assert ended.value.code == 2
    assert "usage: backup_manager.py" in capsys.readouterr().err


# -- which home and store


def test_the_home_is_the_one_that_the_model_is_of(trained: Home, tmp_path: Path, monkeypatch: Any, said: Any) -> None:
    monkeypatch.chdir(tmp_path)
    made = json.loads(said("backup", trained.model, "--json"))
    assert made["store"] == str(default_store(trained))
    assert made["restore"].endswith(f"restore {made['id']} --home {trained.root}")
    assert not (tmp_path / "backups").exists()
    assert said("list", "--home", trained.root).startswith(made["id"])
    monkeypatch.setenv("LONGRUN_HOME", str(trained.root))
    assert json.loads(said("list", "--json"))["store"] == str(default_store(trained))
    again = json.loads(said("backup", trained.model, "--json"))
    assert again["restore"].endswith(f"restore {again['id']}"), "which home is meant is said already"
    monkeypatch.setenv("LONGRUN_HOME", str(tmp_path))
    named = json.loads(said("backup", trained.model, "--home", trained.root, "--json"))
    assert named["restore"].endswith(f"restore {named['id']} --home {trained.root}")


def test_a_model_behind_a_link_is_that_of_its_home(trained: Home, tmp_path: Path, monkeypatch: Any, said: Any) -> None:
    trained.model.rename(tmp_path / "volume")
    trained.model.symlink_to(tmp_path / "volume")
    monkeypatch.chdir(tmp_path)
    made = json.loads(said("backup", trained.model, "--json"))
    assert made["store"] == str(default_store(trained))
    assert made["restore"].endswith(f"restore {made['id']} --home {trained.root}")


def test_a_home_that_was_mistyped_is_not_made(trained: Home, tmp_path: Path, said: Any) -> None:
    assert "there is no such folder; mkdir -p" in said(
        "--home", tmp_path / "mistyped", "backup", trained.model, code=78
    )
    assert not (tmp_path / "mistyped").exists()


def test_a_user_who_does_not_exist_is_told(trained: Home, said: Any) -> None:
    assert "there is no user of that name" in said("list", "--store", "~nobody-of-that-name/store", code=78)


def test_settings_say_where_backups_are(trained: Home, said: Any) -> None:
    trained.settings.write_text('[backup]\nstore = "elsewhere/kept"\n')
    said("backup", "current_model")
    assert len(Store(trained.root / "elsewhere" / "kept").ids()) == 1
    trained.settings.write_text("[backup]\nstoer = 1\n")
    assert "stoer" in said("backup", "current_model", code=78)
    trained.settings.write_text("[backup]\nstoer = 1\n")
    said("prune", "--store", "elsewhere/kept", code=78)
    trained.settings.unlink()
    said("prune", "--store", "elsewhere/kept")


def test_a_store_may_be_named_before_or_after_the_command(trained: Home, said: Any) -> None:
    said("--store", "kept", "backup", "current_model")
    for words in (["list", "--json", "--store", "kept"], ["--json", "--store", "kept", "list"]):
        assert len(json.loads(said(*words))["backups"]) == 1
    assert "there are no backups in" in said("list", code=1)


def test_a_home_that_is_a_file_is_told(trained: Home, said: Any) -> None:
    (trained.root / "file").write_bytes(b"")
    assert "it is not a folder" in said("list", "--home", "file", code=78)


@pytest.mark.parametrize("words", [["backup", "current_model"], ["restore", "latest"], ["prune"], ["export", "x", "y"]])
def test_a_url_is_not_taken_for_a_folder(trained: Home, said: Any, words: list[str]) -> None:
    told = said(*words, "--store", "memory://x", code=1)
    assert f"cannot {words[0]} with the store memory://x: only `list` and `verify` look at a URL" in told
    assert not (trained.root / "memory:").exists()


# -- command by command


def test_a_backup_says_what_it_has_and_how_to_restore_it(trained: Home, said: Any) -> None:
    lines = said("backup", "current_model/", "--reason", "why\nnot").splitlines()
    made = Store(default_store(trained)).find("latest")
    assert lines[0] == f"backup {made.id} is complete and verified: a model at global step 5"
    assert " files, " in lines[1]
    assert lines[-1] == f"to restore it: {PROGRAM} restore {made.id}"
    assert said("list").endswith("why\\nnot\n")


def test_without_a_source_it_is_the_model_of_the_home(
    trained: Home, tmp_path: Path, said: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    told = said("backup", "--home", trained.root)
    assert "is complete and verified: a model at global step 5" in told
    assert "and not" not in told


def test_the_model_of_another_home_is_told_from_that_of_the_home_that_was_named(
    trained: Home, tmp_path: Path, said: Any
) -> None:
    other = Home(tmp_path / "other")
    other.root.mkdir()
    other.make()
    add_checkpoint(other, 7)
    told = said("backup", "current_model/", "--home", other.root)
    assert f"it is {trained.model}, and not {other.model}" in told
    assert "and not" not in said("backup", other.model, "--home", other.root)
    assert "and not" not in said("backup", "current_model/checkpoint-5")


def test_an_incomplete_model_is_said_to_be_that_everywhere(
    trained: Home, said: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    os.truncate(trained.model / "checkpoint-5" / "optimizer.pt", 1)
    assert "it is not a whole model" in said("backup", "current_model", code=1)
    assert backup_manager.main(["backup", "current_model", "--type", "pre_recovery"]) == 1
    told, refused = capsys.readouterr()
    assert "is stored, but it is not a whole model" in refused
    assert "is stored and verified, but the model in it is INCOMPLETE:\n    checkpoint-5: optimizer.pt" in told
    assert "INCOMPLETE: checkpoint-5: optimizer.pt" in said("list")
    made = Store(default_store(trained)).ids()[0]
    assert "it was INCOMPLETE when it was backed up: checkpoint-5" in said("restore", made)
    assert "there is no complete backup" in said("restore", "latest", code=1)


def test_a_model_of_somebody_else_has_no_step(trained: Home, tmp_path: Path, said: Any) -> None:
    assert "a model of no known step" in said("backup", plain_model(tmp_path / "other"))
    assert "  step ?  " in said("list")


def test_lists_are_by_type_and_say_what_is_damaged(trained: Home, said: Any) -> None:
    said("backup", "current_model")
    said("backup", "current_model", "--type", "scheduled")
    assert "-manual-" not in said("list", "--type", "scheduled")
    assert said("list", "--type", "pre_restore") == "there are no backups\n"
    made = Store(default_store(trained)).all()[0]
    damage(default_store(trained) / "backups" / made.id / "manifest.json", "flipped")
    assert said("list").splitlines()[-1] == f"{made.id}  DAMAGED: see `verify`"
    assert json.loads(said("list", "--json"))["unreadable"] == [made.id]


def test_verify_names_what_is_damaged_and_whom_it_concerns(trained: Home, said: Any, capsys: Any) -> None:
    said("backup", "current_model")
    assert said("verify").startswith("1 backup, ")
    assert said("verify", "latest", "--quick").endswith("all good (manifests and sizes)\n")
    store = Store(default_store(trained))
    damage(weights_in(store, store.all()[0]), "flipped")
    assert "all good" in said("verify", "--quick")
    assert backup_manager.main(["verify"]) == 1
    told = capsys.readouterr().out
    assert told.startswith("DAMAGED  objects/sha256/")
    assert f"needed by {store.ids()[0]}\nback up a folder that still has" in told
    assert backup_manager.main(["verify", "latest", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["damage"][0]["backups"] == store.ids()
    assert capsys.readouterr().out == ""
    assert "1 damaged contents in the store are whole again" in said(
        "backup", "current_model", "--type", "pre_recovery"
    )
    assert "nothing was restored" not in said("restore", "latest")


def test_a_mistake_elsewhere_in_the_settings_keeps_nobody_from_a_backup(trained: Home, said: Any) -> None:
    trained.settings.write_text('lerning_rate = 1\n[train]\nlerning_rate = 1\n[backup]\nstore = "elsewhere"\n')
    said("backup", "current_model", "--type", "pre_recovery")
    assert (trained.root / "elsewhere" / "objects").is_dir()
    trained.settings.write_text("[backup]\nstoer = 1\n")
    assert "did you mean store?" in said("list", code=78)


def test_verify_says_of_each_damage_what_mends_it_and_that_does(trained: Home, said: Any, capsys: Any) -> None:
    first, second = (json.loads(said("backup", "current_model", "--json"))["id"] for _ in range(2))
    said("export", first, "copy")
    folder = default_store(trained) / "backups"
    damage(folder / second / "SHA256SUMS", "flipped")
    assert backup_manager.main(["verify"]) == 1
    assert capsys.readouterr().out == (
        f"DAMAGED  backups/{second}/SHA256SUMS: it is not what the manifest says; the next backup writes it anew;"
        f" needed by {second}\n"
    )
    said("backup", "current_model")
    assert "all good" in said("verify")
    damage(folder / first / "manifest.json", "flipped")
    assert backup_manager.main(["verify"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"import that backup again from a copy, or give it up: move its folder out of {folder}"
    )
    said("import", "copy")
    assert "all good" in said("verify")


def test_one_checkpoint_is_stored_but_never_takes_the_place_of_the_model(trained: Home, said: Any) -> None:
    whole = json.loads(said("backup", "current_model", "--json"))["id"]
    one = json.loads(said("backup", "current_model/checkpoint-5", "--home", ".", "--json"))
    assert whole in said("restore", "latest")
    assert "no whole model to go on from; name another TARGET" in said("restore", one["id"], code=1)
    command = shlex.split(one["restore"])
    said(*command[command.index("restore") :])
    assert content_of(trained.root / "checkpoint-5-restored") == content_of(trained.model / "checkpoint-5")


def test_a_restored_folder_lets_in_whom_the_former_one_let_in(trained: Home, said: Any) -> None:
    said("backup", "current_model")
    trained.model.chmod(0o2770)
    (trained.model / "checkpoint-5").chmod(0o700)
    said("restore", "latest")
    modes = [folder.stat().st_mode & 0o7777 for folder in (trained.model, trained.model / "checkpoint-5")]
    assert modes == [0o2770, 0o700]


def test_a_restore_keeps_what_was_there_and_says_what_it_has_not_seen(trained: Home, said: Any) -> None:
    said("backup", "current_model")
    (trained.state / "ledger.sqlite3").write_bytes(b"")
    lines = said("restore", "latest").splitlines()
    made = Store(default_store(trained)).ids()[0]
    assert lines[0] == f"{trained.model} is {made} now, every byte verified"
    assert lines[1] == "    a model at global step 5, grown from tiny"
    assert lines[2].startswith(f"what was there is kept as {trained.model}.replaced-")
    assert lines[3] == "`daemon.py missing` lists the files that this model has not seen"
    assert said("restore", "latest", "elsewhere").startswith(f"elsewhere is {made} now, every byte verified\n")


def test_a_model_that_is_trained_is_not_replaced(trained: Home, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said("backup", "current_model")
    before = state_of(trained.model)
    clock = itertools.count()
    monkeypatch.setattr(locks.time, "monotonic", lambda: next(clock))  # each look is a second later
    training = locks.Lock.take(trained.training_lock, what="the Longrun worker")
    told = said("restore", "latest", code=75)
    assert "current_model is held by the Longrun worker" in told
    assert "--when-idle waits until no file is being trained" in told
    assert state_of(trained.model) == before
    said("restore", "latest", "elsewhere")  # in nobody's way
    monkeypatch.setattr(locks.time, "sleep", lambda wait: training.release() if wait == replacing.LOOK_S else None)
    said("restore", "latest", "--when-idle")
    assert locks.holder(trained.training_lock) is None


def test_prune_says_what_and_does_it_when_told_to(trained: Home, said: Any) -> None:
    trained.settings.write_text("[backup]\nkeep_last = 1\nkeep_daily = 0\nkeep_weekly = 0\nkeep_monthly = 0\n")
    for _ in range(2):
        said("backup", "current_model", "--type", "scheduled")
    first, second = (found.id for found in Store(default_store(trained)).all())
    lines = said("prune").splitlines()
    assert lines[0].startswith(f"would remove  {first}")
    assert lines[1] == "0 B would be freed; --execute does it"
    assert json.loads(said("prune", "--execute", "--json"))["removed"] == [first]
    assert Store(default_store(trained)).ids() == [second]
    assert said("prune") == said("prune", "--execute") == "there is nothing to remove\n"
    assert "it is the newest complete backup" in said("prune", second, "--execute", code=1)


def test_models_of_several_base_models_are_told_apart_in_the_list(trained: Home, said: Any) -> None:
    said("backup", "--reason", "before")
    assert said("list").rstrip().endswith("before")
    assert "grown from" not in said("list")
    disk.remove_tree(trained.model, trained.staging)
    with checkpoint.OpenModel(trained, None) as model:
        grown = replace(lineage_at(5, "two"), base_model="org/name@0123456789")
        checkpoint.publish(trained, model.commit(stage(trained, 5), grown, keep=1).path)
    said("backup", "--reason", "after")
    assert [line.rpartition("  ")[2] for line in said("list").splitlines()] == [
        "grown from tiny; before",
        "grown from org/name; after",
    ]


def test_a_prune_beside_a_backup_is_locked_out(trained: Home, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said("backup", "current_model")
    monkeypatch.setattr(stores, "WAIT_S", 0.0)
    with Store(default_store(trained)).using("a backup"):
        assert "backups is held by a backup (pid" in said("prune", "--execute", code=75)


@pytest.mark.parametrize("target", ["out", "out.tar", "out.tar.zst", "file://HOME/far"])
def test_a_backup_goes_out_and_comes_in_as_it_is_said(trained: Home, said: Any, target: str) -> None:
    target = target.replace("HOME", str(trained.root))
    said("backup", "current_model")
    lines = said("export", "latest", target).splitlines()
    assert lines[0] == f"{Store(default_store(trained)).ids()[0]} is in {target}, verified"
    words = shlex.split(lines[1].removeprefix(f"to bring it into another store: {PROGRAM} "))
    told = said(*words, "--store", "other")
    assert f"every byte verified\nto restore it: {PROGRAM} restore " in told
    assert Store(trained.root / "other").damage() == []
    if target.startswith("file:"):
        assert said("list", "--store", target) == said("list")
        assert said("verify", "--store", target) == said("verify")
        said("import", target, Store(default_store(trained)).ids()[0])
    else:
        assert "it is no URL; leave the ID out" in said("import", target, "x", code=1)


@pytest.mark.parametrize("name", ["out.tar.gz", "out.tgz", "out.zip"])
def test_an_archive_of_another_kind_is_not_made_a_folder(trained: Home, said: Any, name: str) -> None:
    said("backup", "current_model")
    assert "an archive is a .tar or .tar.zst; name one of these" in said("export", "latest", name, code=1)
    assert not (trained.root / name).exists()


def test_a_backup_does_not_take_the_place_of_the_folder_that_one_is_in(
    trained: Home, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said("backup", "current_model")
    (trained.root / "out").mkdir()
    monkeypatch.chdir(trained.root / "out")
    told = said("export", "latest", ".", "--home", trained.root, code=1)
    assert "that is the folder you are in; name a new folder" in told


def test_every_command_speaks_to_machines(trained: Home, said: Any) -> None:
    for words in (
        ["backup", "current_model"],
        ["list"],
        ["verify"],
        ["restore", "latest"],
        ["prune"],
        ["export", "latest", "out"],
        ["import", "out"],
    ):
        assert isinstance(json.loads(said(*words, "--json")), dict)


def test_what_is_not_there_is_told(trained: Home, said: Any) -> None:
    assert "there is no such folder; check the path" in said("backup", "curent_model", code=1)
    assert "there are no backups in" in said("restore", "2001", code=1)
    said("backup", "current_model")
    assert "there is no such backup" in said("restore", "2001", code=1)
    assert "No such file" in said("import", "absent.tar", code=1)


# -- the bar


def test_a_person_sees_how_far_it_is(trained: Home, said: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert backup_manager.main(["backup", "current_model"]) == 0
    assert "%|" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert backup_manager.main(["verify"]) == 0
    assert capsys.readouterr().err == ""


def test_sizes_are_told_in_units() -> None:
    assert [backup_commands._size(count) for count in (0, 999, 1000, 1_500_000, 2e9, 3e12, 4e15)] == [
        *("0 B", "999 B", "1.0 kB", "1.5 MB", "2.0 GB", "3.0 TB", "4000.0 TB")
    ]
