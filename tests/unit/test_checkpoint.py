from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from longrun import checkpoint, disk
from longrun.checkpoint import Damaged, OpenModel, Verifier
from longrun.errors import BadModel, ModelRemoved
from tests.unit.builders import (
    DAMAGES,
    FILES,
    add_checkpoint,
    content_of,
    flip_a_bit,
    lineage_at,
    stage,
    weights,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from longrun.home import Home

KEPT = [
    *("config.json", "lineage.json", "model.safetensors", "optimizer.pt"),
    *("rng_state.pth", "scheduler.pt", "tokenizer.json", "trainer_state.json"),
]


@pytest.fixture
def sealed(home: Home) -> Path:
    folder = stage(home, 5)
    checkpoint.seal(folder, lineage_at(5))
    return folder


# -- verifying


def test_a_sealed_checkpoint_verifies(sealed: Path) -> None:
    found = Verifier().verify(sealed)
    assert (found.path, found.global_step, found.lineage) == (sealed, 5, lineage_at(5))
    assert found.digest == disk.hash_file(sealed / "manifest.json")
    assert sorted(json.loads((sealed / "manifest.json").read_bytes())["files"]) == KEPT


def test_a_checkpoint_that_has_not_changed_is_not_read_again(sealed: Path) -> None:
    verifier = Verifier()
    assert verifier.verify(sealed) is verifier.trust(sealed) is verifier.verify(sealed)


def test_the_digest_tells_different_weights_apart(home: Home, sealed: Path) -> None:
    other = stage(home, 6)
    checkpoint.seal(other, lineage_at(6))
    assert Verifier().verify(sealed).digest != Verifier().verify(other).digest


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", KEPT)
def test_a_damaged_file_is_found(sealed: Path, name: str, damage: str) -> None:
    verifier = Verifier()
    verifier.verify(sealed)
    DAMAGES[damage](sealed / name)
    for looks in (verifier, Verifier()):  # also by one that has seen it whole
        with pytest.raises(Damaged, match=name):
            looks.verify(sealed)


@pytest.mark.parametrize("name", ["extra.bin", ".hidden"])
def test_a_file_too_many_is_damage(sealed: Path, name: str) -> None:
    (sealed / name).write_bytes(b"")
    with pytest.raises(Damaged, match=f"files differ from the manifest: {name}"):
        Verifier().verify(sealed)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b"{}", b"\xff", b"[" * 100_000])
def test_a_manifest_that_is_none_is_damage(sealed: Path, content: bytes) -> None:
    (sealed / "manifest.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"manifest.json cannot be read"):
        Verifier().verify(sealed)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": None},
        {"files": None},
        {"files": []},
        {"files": ["model.safetensors"]},
        {"files": {}},
        {"files": {"model.safetensors": None}},
        {"files": {"model.safetensors": {}}},
        {"files": {"model.safetensors": {"size": 8}}},
        {"files": {"model.safetensors": {"size": "8", "sha256": ""}}},
        {"files": {"model.safetensors": {"size": 1e999, "sha256": ""}}},
        {"files": {"model.safetensors": {"size": 8, "sha256": None}}},
        {"files": {"../state": {"size": 1, "sha256": ""}}},
        {"files": {"..": {"size": 1, "sha256": ""}}},
        {"files": {"a\0b": {"size": 1, "sha256": ""}}},
    ],
)
def test_a_manifest_that_says_something_impossible_is_damage(sealed: Path, change: dict[str, Any]) -> None:
    manifest = json.loads((sealed / "manifest.json").read_bytes())
    (sealed / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(Damaged):
        Verifier().verify(sealed)


@pytest.mark.parametrize("missing", ["version", "files"])
def test_a_manifest_without_a_part_is_damage(sealed: Path, missing: str) -> None:
    manifest = json.loads((sealed / "manifest.json").read_bytes())
    del manifest[missing]
    (sealed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match=missing):
        Verifier().verify(sealed)


def test_any_flipped_bit_of_a_manifest_is_damage(sealed: Path) -> None:
    verifier, path = Verifier(), sealed / "manifest.json"
    whole = path.read_bytes()
    for place in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(Damaged):
            verifier.verify(sealed)


@pytest.mark.parametrize("more", [b"\n", b" "])
def test_a_manifest_with_more_behind_it_is_damage(sealed: Path, more: bytes) -> None:
    path = sealed / "manifest.json"
    path.write_bytes(path.read_bytes() + more)
    with pytest.raises(Damaged, match=r"manifest.json is not as it was written"):
        Verifier().verify(sealed)


def test_a_manifest_that_is_a_link_is_damage(sealed: Path) -> None:
    path = sealed / "manifest.json"
    path.symlink_to(path.rename(sealed.with_name("elsewhere.json")))
    with pytest.raises(Damaged, match=r"manifest.json is not a file"):
        Verifier().verify(sealed)


def test_a_folder_without_a_manifest_is_no_checkpoint(sealed: Path) -> None:
    (sealed / "manifest.json").unlink()
    with pytest.raises(Damaged, match=r"it has no manifest.json"):
        Verifier().verify(sealed)


def test_what_is_no_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").write_bytes(b"")
    with pytest.raises(Damaged, match=r"manifest.json"):
        Verifier().verify(tmp_path / "checkpoint-5")


def test_a_checkpoint_under_another_number_is_damage(sealed: Path) -> None:
    sealed.rename(sealed.with_name("checkpoint-6"))
    with pytest.raises(Damaged, match="global step 5 in the trainer state, 5 in the lineage"):
        Verifier().verify(sealed.with_name("checkpoint-6"))


def test_trainer_state_and_lineage_must_agree(home: Home) -> None:
    folder = stage(home, 5)
    checkpoint.seal(folder, lineage_at(6))
    with pytest.raises(Damaged, match="global step 5 in the trainer state, 6 in the lineage"):
        Verifier().verify(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null"])
def test_a_sealed_trainer_state_must_tell_the_step(home: Home, content: bytes) -> None:
    folder = stage(home, 5)
    (folder / "trainer_state.json").write_bytes(content)
    checkpoint.seal(folder, lineage_at(5))
    with pytest.raises(Damaged, match="its trainer state cannot be read"):
        Verifier().verify(folder)


def test_bytes_are_read_once(sealed: Path) -> None:
    read: list[int] = []
    verifier = Verifier(read.append)
    verifier.verify(sealed)
    first = sum(read)
    assert first == sum((sealed / name).stat().st_size for name in KEPT)
    verifier.verify(sealed)
    assert sum(read) == first


def test_what_our_worker_committed_is_taken_as_read(sealed: Path) -> None:
    read: list[int] = []
    verifier = Verifier(read.append)
    assert verifier.trust(sealed) == Verifier().verify(sealed)
    verifier.verify(sealed)
    assert read == []


# -- the newest


def newest(home: Home) -> tuple[checkpoint.Checkpoint | None, list[str]]:
    told: list[str] = []
    return checkpoint.newest(home, Verifier(), told.append), told


def test_there_is_no_newest_where_there_is_no_model(home: Home) -> None:
    assert newest(home) == (None, [])
    home.model.mkdir()
    assert newest(home) == (None, [])
    assert checkpoint.steps(home.model) == []


def test_checkpoints_are_ordered_by_number(home: Home) -> None:
    for step in (9, 10, 100):
        add_checkpoint(home, step)
    for foreign in ("checkpoint-007", "checkpoint-", "checkpoint-1.tmp", "xcheckpoint-1"):
        (home.model / foreign).mkdir()
    assert checkpoint.steps(home.model) == [100, 10, 9]
    found, told = newest(home)
    assert found is not None
    assert (found.global_step, told) == (100, [])


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(home: Home) -> None:
    add_checkpoint(home, 9)
    flip_a_bit(add_checkpoint(home, 10) / "optimizer.pt")
    found, told = newest(home)
    assert found is not None
    assert found.global_step == 9
    assert told[0].startswith("checkpoint-10 is damaged (optimizer.pt does not have the SHA-256")
    assert checkpoint.steps(home.model) == [9]
    assert [path.name.split(".")[0] for path in home.set_aside.iterdir()] == ["checkpoint-10"]


def test_a_model_without_a_good_checkpoint_is_not_silently_begun_anew(home: Home) -> None:
    flip_a_bit(add_checkpoint(home, 9) / "optimizer.pt")
    for _ in range(2):
        with pytest.raises(BadModel, match=r"no checkpoint in it verifies. restore a backup .* or `rm -rf"):
            newest(home)


def test_a_folder_that_is_not_ours_is_not_overwritten(home: Home) -> None:
    home.model.mkdir()
    (home.model / "config.json").write_text("{}")
    with pytest.raises(BadModel, match=r"it is not empty, but it has no lineage.json and no checkpoint"):
        newest(home)


def test_a_file_in_the_place_of_the_model_is_no_model(home: Home) -> None:
    home.model.write_bytes(b"")
    with pytest.raises(BadModel, match="not empty"):
        newest(home)
    assert not checkpoint.clear_remains(home)
    assert home.model.is_file()


def test_a_model_that_is_being_removed_is_not_set_aside(home: Home) -> None:
    (add_checkpoint(home, 9) / "optimizer.pt").unlink()
    (home.model / "lineage.json").unlink()
    with pytest.raises(BadModel):
        newest(home)
    assert checkpoint.steps(home.model) == [9]


@pytest.mark.parametrize("moment", ["verify", "set_aside"])
def test_a_model_may_vanish_at_any_look(home: Home, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    (add_checkpoint(home, 9) / "optimizer.pt").unlink()

    def vanish(*_: object) -> None:
        shutil.rmtree(home.model)
        raise FileNotFoundError

    monkeypatch.setattr(
        *{"verify": (Verifier, "verify", vanish), "set_aside": (checkpoint, "set_aside", vanish)}[moment]
    )
    assert newest(home) == (None, [])


def test_remains_of_a_removed_model_are_set_aside(home: Home) -> None:
    add_checkpoint(home, 9)
    add_checkpoint(home, 10)
    for path in home.model.iterdir():
        if path.is_file():
            path.unlink()
    assert checkpoint.clear_remains(home)
    assert newest(home) == (None, [])
    assert len(list(home.set_aside.iterdir())) == 2


def test_a_publish_that_met_the_removal_left_remains_too(home: Home) -> None:
    add_checkpoint(home, 5)
    disk.remove_file(home.model / "lineage.json")
    kept = content_of(home.model)
    assert not checkpoint.clear_remains(home)  # a daemon that did not know this model leaves it to a person
    assert not checkpoint.clear_remains(home, "another")
    assert content_of(home.model) == kept
    assert checkpoint.clear_remains(home, "one")
    assert list(home.model.iterdir()) == []


def test_one_published_file_that_came_behind_the_removal_is_set_aside_too(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when whoever published it is killed right after, before it could say a word."""
    add_checkpoint(home, 5)

    def move_behind_a_removal(source: Path, target: Path) -> None:
        if target.name != "model.safetensors":
            move(source, target)
            return
        shutil.rmtree(home.model / "checkpoint-6", ignore_errors=True)
        for path in home.model.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        move(source, target)
        raise KeyboardInterrupt

    move = disk.move
    with OpenModel(home, checkpoint.newest(home, Verifier(), print)) as model:
        monkeypatch.setattr(disk, "move", move_behind_a_removal)
        with pytest.raises(KeyboardInterrupt):
            model.commit(stage(home, 6), lineage_at(6), keep=2)
    monkeypatch.undo()
    assert [path.name for path in home.model.iterdir()] == ["model.safetensors"]
    assert not checkpoint.clear_remains(home, "another")
    assert checkpoint.clear_remains(home, "one")
    assert newest(home) == (None, [])


def test_files_of_the_same_names_that_somebody_else_puts_there_are_no_remains(home: Home) -> None:
    add_checkpoint(home, 5)
    elsewhere = home.root / "elsewhere"
    shutil.copytree(home.model, elsewhere)
    shutil.rmtree(home.model)
    home.model.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy2(elsewhere / name, home.model / name)
    assert not checkpoint.clear_remains(home, "one")
    with pytest.raises(BadModel):
        newest(home)


def test_only_remains_are_cleared(home: Home) -> None:
    assert not checkpoint.clear_remains(home)
    add_checkpoint(home, 9)
    assert not checkpoint.clear_remains(home)
    (home.model / "lineage.json").unlink()
    before = content_of(home.model)
    assert not checkpoint.clear_remains(home)
    assert content_of(home.model) == before


# -- committing


def test_the_first_commit_makes_the_whole_model_at_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = watch_renames(monkeypatch)
    with OpenModel(home, None) as model:
        model.glance()  # nothing to miss yet
        saved = model.commit(stage(home, 5), lineage_at(5), keep=2)
        model.check()
    assert [target for target in moves if home.root / "current_model" in (target, *target.parents)] == [home.model]
    assert Verifier().verify(home.model / "checkpoint-5") == saved
    assert not list(home.staging.iterdir())


def test_the_published_model_is_the_checkpoint_without_what_only_a_resume_needs(home: Home) -> None:
    folder = add_checkpoint(home, 5)
    published = {path.name for path in home.model.iterdir() if path.is_file()}
    resume_only = {"manifest.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert published == {path.name for path in folder.iterdir()} - resume_only
    assert all((home.model / name).read_bytes() == (folder / name).read_bytes() for name in published)
    assert not (folder / "training_args.bin").exists()


def test_small_files_are_published_as_copies(home: Home) -> None:
    folder = add_checkpoint(home, 5)
    (home.model / "config.json").write_text("edited in place")
    assert (folder / "config.json").read_text() == "{}"


@pytest.mark.parametrize("gone", ["", "checkpoint-5"])
def test_a_publish_that_meets_a_removal_says_so(home: Home, gone: str) -> None:
    add_checkpoint(home, 5)
    (home.model / "model.safetensors").unlink()
    shutil.rmtree(home.model / gone)
    with pytest.raises(ModelRemoved, match="current_model/ was removed"):
        checkpoint.publish(home, home.model / "checkpoint-5")


def test_published_weights_stay_when_their_checkpoint_goes(home: Home) -> None:
    folder = add_checkpoint(home, 5)
    shutil.rmtree(folder)
    assert (home.model / "model.safetensors").read_bytes() == weights(5)


def test_a_model_may_be_where_a_link_says(home: Home) -> None:
    home.model.symlink_to(home.root / "elsewhere")
    add_checkpoint(home, 5)
    add_checkpoint(home, 6)
    assert home.model.is_symlink()
    assert checkpoint.steps(home.root / "elsewhere") == [6, 5]


def test_an_unfinished_first_commit_is_no_obstacle(home: Home) -> None:
    (home.staging / "model" / "checkpoint-3").mkdir(parents=True)
    add_checkpoint(home, 5)
    assert checkpoint.steps(home.model) == [5]


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_model_that_appeared_meanwhile_is_not_replaced(home: Home, what: str) -> None:
    with OpenModel(home, None) as model:
        home.model.mkdir()
        (home.model / "x").write_bytes(b"1") if what == "file" else (home.model / "x").mkdir()
        with pytest.raises(ModelRemoved, match="appeared while a new model was being trained"):
            model.commit(stage(home, 5), lineage_at(5), keep=2)
    assert [path.name for path in home.model.iterdir()] == ["x"]


def test_a_model_that_appears_at_the_last_moment_is_not_replaced(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with OpenModel(home, None) as model:
        staged = stage(home, 5)
        home.model.mkdir()
        (home.model / "x").mkdir()
        monkeypatch.setattr(OpenModel, "check", lambda _: None)
        with pytest.raises(ModelRemoved, match="appeared"):
            model.commit(staged, lineage_at(5), keep=2)
    assert [path.name for path in home.model.iterdir()] == ["x"]


def test_another_fault_of_the_first_rename_is_raised_as_it_is(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    real = disk.rename

    def full(source: Path, target: Path) -> None:
        if target == home.model:
            raise OSError(errno.ENOSPC, "full")
        real(source, target)

    monkeypatch.setattr(disk, "rename", full)
    with OpenModel(home, None) as model, pytest.raises(OSError, match="full"):
        model.commit(stage(home, 5), lineage_at(5), keep=2)


def open_model(home: Home) -> OpenModel:
    return OpenModel(home, checkpoint.newest(home, Verifier(), print))


def remove(home: Home) -> None:
    shutil.rmtree(home.model)


def replace_by_empty(home: Home) -> None:
    shutil.rmtree(home.model)
    home.model.mkdir()


def replace_by_other(home: Home) -> None:
    shutil.rmtree(home.model)
    add_checkpoint(home, 7, "two")


def replace_by_file(home: Home) -> None:
    shutil.rmtree(home.model)
    home.model.write_bytes(b"")


def replace_by_copy(home: Home) -> None:
    shutil.copytree(home.model, home.root / "copy")
    shutil.rmtree(home.model)
    (home.root / "copy").rename(home.model)


@pytest.mark.parametrize("change", [remove, replace_by_empty, replace_by_other, replace_by_file, replace_by_copy])
def test_a_model_that_was_removed_never_comes_back(home: Home, change: Callable[[Home], None]) -> None:
    add_checkpoint(home, 5)
    with open_model(home) as model:
        model.glance()
        staged = stage(home, 6)
        change(home)
        left = content_of(home.model)
        for look in (model.glance, model.check, lambda: model.commit(staged, lineage_at(6), keep=2)):
            with pytest.raises(ModelRemoved):
                look()
    assert content_of(home.model) == left


def test_another_lineage_in_the_same_folder_is_another_model(home: Home) -> None:
    add_checkpoint(home, 5)
    with open_model(home) as model:
        (home.model / "lineage.json").write_text(lineage_at(5, "two").to_json())
        model.glance()
        with pytest.raises(ModelRemoved, match="replaced"):
            model.check()


def test_a_model_that_is_gone_cannot_be_opened(home: Home) -> None:
    add_checkpoint(home, 5)
    found = checkpoint.newest(home, Verifier(), print)
    shutil.rmtree(home.model)
    with pytest.raises(ModelRemoved, match="was removed"):
        OpenModel(home, found)


def test_a_removal_right_before_the_rename_is_noticed(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    add_checkpoint(home, 5)
    with open_model(home) as model:
        staged = stage(home, 6)
        real = disk.rename_into

        def late(source: Path, name: str, folder: int) -> None:
            shutil.rmtree(home.model)
            real(source, name, folder)

        monkeypatch.setattr(disk, "rename_into", late)
        with pytest.raises(ModelRemoved, match="was removed"):
            model.commit(staged, lineage_at(6), keep=2)
    assert not home.model.exists()


def test_a_model_restored_at_the_last_moment_is_not_mixed_with_the_one_before(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_checkpoint(home, 5)
    shutil.copytree(home.model, home.root / "restored")
    real = os.rename

    def met(source: Path, target: Path | str, **options: Any) -> None:
        if Path(target).name == "checkpoint-6":
            shutil.rmtree(home.model)
            real(home.root / "restored", home.model)
        real(source, target, **options)

    with open_model(home) as model:
        staged = stage(home, 6)
        monkeypatch.setattr(os, "rename", met)
        with pytest.raises(ModelRemoved):
            model.commit(staged, lineage_at(6), keep=2)
    assert checkpoint.steps(home.model) == [5]


def test_a_removal_that_meets_the_rename_leaves_no_old_model(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    add_checkpoint(home, 5)
    with open_model(home) as model:
        staged = stage(home, 6)
        real = disk.rename_into

        def met(source: Path, name: str, folder: int) -> None:
            for path in list(home.model.iterdir()):  # what rm -rf has listed; it fails at the folder itself
                path.unlink() if path.is_file() else shutil.rmtree(path)
            real(source, name, folder)

        monkeypatch.setattr(disk, "rename_into", met)
        with pytest.raises(ModelRemoved):
            model.commit(staged, lineage_at(6), keep=2)
    assert newest(home) == (None, [])


@pytest.mark.parametrize("step", ["publish", "retire", "_checkpoint"])
def test_a_removal_after_the_rename_is_told_as_one(home: Home, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    add_checkpoint(home, 5)
    with open_model(home) as model:
        staged = stage(home, 6)
        real = getattr(checkpoint, step)

        def gone(*arguments: Any) -> Any:
            shutil.rmtree(home.model)
            return real(*arguments)

        monkeypatch.setattr(checkpoint, step, gone)
        with pytest.raises(ModelRemoved):
            model.commit(staged, lineage_at(6), keep=2)


def test_a_commit_that_met_a_full_disk_can_be_made_again(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    add_checkpoint(home, 5)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with open_model(home) as model:
        with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
            patched.setattr(checkpoint, "publish", full)
            model.commit(stage(home, 6), lineage_at(6), keep=2)
        model.commit(stage(home, 6), lineage_at(6), keep=2)
    assert checkpoint.steps(home.model) == [6, 5]
    assert json.loads((home.model / "trainer_state.json").read_bytes())["global_step"] == 6
    assert not home.set_aside.exists()


def test_somebody_elses_folder_in_the_way_of_a_commit_is_set_aside(home: Home) -> None:
    add_checkpoint(home, 5)
    with open_model(home) as model:
        (home.model / "checkpoint-6").mkdir()
        model.commit(stage(home, 6), lineage_at(6), keep=2)
    assert len(list(home.set_aside.iterdir())) == 1
    assert Verifier().verify(home.model / "checkpoint-6").global_step == 6


# -- publishing and retiring


def watch_renames(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    moves: list[Path] = []
    real = os.rename

    def rename(source: Path, target: Any, **options: Any) -> None:
        moves.append(Path(target))
        real(source, target, **options)

    monkeypatch.setattr(os, "rename", rename)
    return moves


def test_trainer_state_is_published_last(home: Home, disk_log: list[str]) -> None:
    with OpenModel(home, None) as model:
        model.commit(stage(home, 5, vocab__json=b"5"), lineage_at(5), keep=2)
        disk_log.clear()
        model.commit(stage(home, 6, vocab__json=b"6"), lineage_at(6), keep=2)
    renamed = [line.removeprefix("rename ") for line in disk_log if line.startswith("rename ")]
    published = [name for name in renamed[renamed.index("checkpoint-6") + 1 :] if not name.startswith("published-")]
    changed = ["lineage.json", "model.safetensors", "vocab.json", "trainer_state.json"]  # config.json is the same
    assert [name for name in published if name in FILES or name in changed] == changed
    assert disk_log[disk_log.index("rename trainer_state.json") + 1] == "sync current_model"


@pytest.mark.parametrize("first", [True, False])
def test_every_byte_is_durable_before_the_checkpoint_has_its_name(home: Home, disk_log: list[str], first: bool) -> None:
    if not first:
        add_checkpoint(home, 5)
    disk_log.clear()
    add_checkpoint(home, 6)
    before = disk_log[: disk_log.index("rename current_model" if first else "rename checkpoint-6")]
    assert {f"sync {name}" for name in (*KEPT, "manifest.json", "checkpoint-6")} <= set(before)
    if first:  # the published copies and the folder that becomes the model
        assert before[-1] == "sync model"
        assert before.count("sync config.json") >= 2
    assert "sync current_model" in disk_log[len(before) :] or first


def test_published_weights_are_replaced_and_never_rewritten(home: Home) -> None:
    add_checkpoint(home, 5)
    with (home.model / "model.safetensors").open("rb") as reader:
        add_checkpoint(home, 6)
        assert reader.read() == weights(5)
    assert (home.model / "model.safetensors").read_bytes() == weights(6)
    assert (home.model / "checkpoint-5" / "model.safetensors").read_bytes() == weights(5)


def test_publishing_again_repairs_what_was_cut_off(home: Home) -> None:
    folder = add_checkpoint(home, 5)
    whole = content_of(home.model)
    (home.model / "trainer_state.json").unlink()
    (home.model / "config.json").write_text("[]")
    (home.staging / "published-config.json").write_text("half")
    checkpoint.publish(home, folder)
    assert content_of(home.model) == whole
    assert not list(home.staging.iterdir())


def test_weights_under_former_names_are_not_mixed_with_new_ones(home: Home) -> None:
    with OpenModel(home, None) as model:
        first = stage(home, 5, **{"model-1_of_2__safetensors": b"shard", "model__safetensors__index__json": b"{}"})
        model.commit(first, lineage_at(5), keep=2)
        assert (home.model / "model-1-of-2.safetensors").exists()
        model.commit(stage(home, 6), lineage_at(6), keep=2)
    assert [path.name for path in home.model.glob("*.safetensors*")] == ["model.safetensors"]


def test_the_newest_checkpoints_are_kept_by_number(home: Home) -> None:
    for step in (8, 9, 10, 11):
        add_checkpoint(home, step)
    checkpoint.retire(home, 3)
    assert checkpoint.steps(home.model) == [11, 10, 9]
    checkpoint.retire(home, 0)
    assert checkpoint.steps(home.model) == [11]


def test_a_commit_retires_what_is_beyond_the_limit(home: Home) -> None:
    for step in (8, 9, 10):
        add_checkpoint(home, step, keep=2)
    assert checkpoint.steps(home.model) == [10, 9]


def test_published_files_that_outlived_a_removal_are_set_aside_while_their_lineage_is_known(home):
    shutil.rmtree(add_checkpoint(home, 4, "one"))
    assert not checkpoint.clear_remains(home)  # a start cannot tell it from a person's choice
    assert not checkpoint.clear_remains(home, "another lineage")
    assert checkpoint.clear_remains(home, "one")
    assert checkpoint.newest(home, Verifier(), print) is None
    assert any(path.name.startswith("lineage.json") for path in home.set_aside.iterdir())


def test_a_glance_notices_that_all_checkpoints_are_gone(home):
    path = add_checkpoint(home, 4)
    newest = checkpoint.newest(home, Verifier(), print)
    with OpenModel(home, newest) as model:
        shutil.rmtree(path)
        with pytest.raises(ModelRemoved):
            model.glance()


def test_a_checkpoint_can_be_read_by_whoever_can_read_its_neighbours(home: Home) -> None:
    folder = stage(home, 5)
    (folder / "model.safetensors").chmod(0o600)  # as safetensors leaves it
    checkpoint.seal(folder, lineage_at(5))
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~current_umask()}


def current_umask() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return umask
