from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import time
import zipfile
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from longrun import disk, source
from longrun.errors import BadBackup
from longrun.source import Snapshot, faults
from tests.unit.builders import add_checkpoint, content_of, flip_a_bit, plain_model, safetensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from longrun.home import Home


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "PAUSE_S", 0.0)


def held(snapshot: Snapshot) -> dict[str, bytes]:
    return {path: pinned.read(0, 1 << 20) for path, pinned in snapshot.files.items()}


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# -- held still


def test_what_is_held_stays_what_it_was(home: Home) -> None:
    add_checkpoint(home, 5)
    whole = content_of(home.model)
    with Snapshot.take(home.model) as snapshot:
        add_checkpoint(home, 6, keep=1)  # published files are replaced, checkpoint-5 is retired
        assert not (home.model / "checkpoint-5").exists()
        assert held(snapshot) == whole
        shutil.rmtree(home.model)
        assert held(snapshot) == whole
        assert snapshot.changed() == []


def test_a_folder_that_was_swapped_under_its_name_is_not_mixed(model: Path) -> None:
    whole = content_of(model)
    with Snapshot.take(model) as snapshot:
        model.rename(model.with_name("former"))
        plain_model(model, b"another")
        assert held(snapshot) == whole
        assert snapshot.changed() == []


def keep_the_time(path: Path, write: Callable[[], Any]) -> None:
    found = path.stat()
    write()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


CLOCK_REALTIME_COARSE = 5  # of Linux


def wait_for_a_tick(path: Path) -> None:
    """The kernel's times of files are those of its last tick, 1 to 10 ms ago."""
    while time.clock_gettime_ns(CLOCK_REALTIME_COARSE) <= path.stat().st_ctime_ns:
        pass


REWRITES: dict[str, Callable[[Path], Any]] = {
    "appended": lambda path: disk.append_line(path, "x"),
    "cut": lambda path: os.truncate(path, 3),
    "same size": flip_a_bit,
    "same size and time": lambda path: keep_the_time(path, lambda: flip_a_bit(path)),
}


@pytest.mark.parametrize("rewrite", REWRITES)
def test_rewriting_in_place_is_noticed(model: Path, rewrite: str) -> None:
    with Snapshot.take(model) as snapshot:
        wait_for_a_tick(model / "model.safetensors")
        REWRITES[rewrite](model / "model.safetensors")
        assert snapshot.changed() == ["model.safetensors"]


def test_links_that_come_and_go_are_no_change(model: Path) -> None:
    with Snapshot.take(model) as snapshot:
        os.link(model / "config.json", model.parent / "another name")
        assert snapshot.changed() == []


def test_a_folder_that_changes_meanwhile_is_looked_at_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk, walks = source._walk, []

    def walked(folder: Path, follow: bool) -> Any:
        found = list(walk(folder, follow))
        if (len(walks) < 3 and folder == model) and not walks.append(folder):
            plain_model(model / f"sub{len(walks)}")
        return iter(found)

    monkeypatch.setattr(source, "_walk", walked)
    with Snapshot.take(model) as snapshot:
        assert held(snapshot) == content_of(model)
        assert len(snapshot.files) == 8


def test_a_file_that_vanishes_meanwhile_is_no_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open

    def open_once(path: Path, *rest: Any) -> int:
        monkeypatch.setattr(os, "open", opened)
        path.unlink()
        return opened(path, *rest)

    monkeypatch.setattr(os, "open", open_once)
    with Snapshot.take(model) as snapshot:
        assert held(snapshot) == content_of(model)
        assert list(snapshot.files) == ["model.safetensors"]


def test_a_folder_that_never_rests_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = source._walk

    def restless(folder: Path, follow: bool) -> Any:
        found = list(walk(folder, follow))
        disk.write_file(model / "config.json", b"{}", durable=False)
        return iter(found)

    monkeypatch.setattr(source, "_walk", restless)
    before = open_files()
    with pytest.raises(BadBackup, match=r"model: it keeps changing; wait for what writes into it"):
        Snapshot.take(model)
    assert open_files() == before


def test_a_half_published_model_is_waited_for(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    add_checkpoint(home, 5)
    whole = content_of(home.model)
    disk.remove_file(home.model / "trainer_state.json")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            shutil.copy(home.model / "checkpoint-5" / "trainer_state.json", home.model)

    monkeypatch.setattr(source.time, "sleep", sleep)
    with Snapshot.take(home.model) as snapshot:
        assert held(snapshot) == whole
    assert len(waits) == 3


def test_a_publish_that_was_cut_off_is_taken_in_the_end_and_told(home: Home) -> None:
    add_checkpoint(home, 5)
    disk.remove_file(home.model / "trainer_state.json")
    with Snapshot.take(home.model) as snapshot:
        assert faults(snapshot, hashes(snapshot)) == [
            "its files are not those of checkpoint-5: a publish was cut off (the next daemon finishes it)"
        ]


def test_facts_come_from_the_root_or_else_from_the_newest_checkpoint(home: Home) -> None:
    for step in (9, 10):
        add_checkpoint(home, step)
    with Snapshot.take(home.model) as snapshot:
        assert snapshot.newest_checkpoint() == "checkpoint-10"
        assert snapshot.fact("trainer_state.json", "global_step") == 10
    disk.remove_file(home.model / "trainer_state.json")
    (home.model / "lineage.json").write_text("[")
    with Snapshot.take(home.model) as snapshot:
        assert snapshot.fact("trainer_state.json", "global_step") == 10
        assert snapshot.fact("lineage.json", "lineage") == "one"
        assert snapshot.fact("trainer_state.json", "absent") is None


# -- what is held


def test_files_are_held_in_order_of_their_names(tmp_path: Path) -> None:
    names = ["a", "b/a", "b/c/d", "b.x", "\udcff", "-"]
    for name in names:
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(b"1")
    with Snapshot.take(tmp_path / "model") as snapshot:
        assert list(snapshot.files) == ["-", "a", "b/a", "b/c/d", "b.x", "\udcff"]


def test_a_link_within_the_folder_is_its_file(model: Path) -> None:
    (model / "link").symlink_to("config.json")
    (model / "sub").mkdir()
    (model / "sub" / "link").symlink_to("../link")
    with Snapshot.take(model) as snapshot:
        assert held(snapshot)["sub/link"] == b"{}"


def test_a_folder_may_be_named_by_a_link(model: Path) -> None:
    model.with_name("link").symlink_to(model)
    with Snapshot.take(model.with_name("link")) as snapshot:
        assert (snapshot.folder, len(snapshot.files)) == (model, 2)


def test_a_link_to_the_outside_is_followed_only_when_asked_for(model: Path) -> None:
    """As the hub's cache is made: snapshots of links into blobs."""
    (model.parent / "blob").write_bytes(safetensors(b"blob"))
    (model / "more.safetensors").symlink_to(model.parent / "blob")
    with pytest.raises(BadBackup, match=r"more.safetensors: it is a link to .*blob; --follow stores"):
        Snapshot.take(model)
    with Snapshot.take(model, follow=True) as snapshot:
        assert held(snapshot)["more.safetensors"] == safetensors(b"blob")


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("target", ["absent", "../absent", "link", ".", "..", "/", "sub", "/dev/null"])
def test_a_link_that_leads_to_no_file_is_refused(model: Path, target: str, follow: bool) -> None:
    (model / "sub").mkdir()
    (model / "link").symlink_to(target)
    with pytest.raises(BadBackup, match=r"cannot back up .*link: "):
        Snapshot.take(model, follow=follow)


@pytest.mark.parametrize("follow", [False, True])
def test_links_that_lead_to_each_other_are_refused(model: Path, follow: bool) -> None:
    (model / "a").symlink_to("b")
    (model / "b").symlink_to("a")
    with pytest.raises(BadBackup, match=r"cannot back up .*/[ab]: "):
        Snapshot.take(model, follow=follow)


def make_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path)


SPECIAL: dict[str, Callable[[str], Any]] = {
    "fifo": os.mkfifo,
    "device": lambda path: os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3)),
    "socket": make_socket,
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_refused_and_does_not_block(model: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    try:
        SPECIAL[kind]("odd")  # the path of a socket must be short
    except PermissionError:
        pytest.skip("only root makes devices")
    before = open_files()
    with pytest.raises((BadBackup, OSError), match=r"odd: it is not a regular file; move it out|No such device.*odd"):
        Snapshot.take(model)
    assert open_files() == before


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "there is no such folder"),
        (lambda path: path.write_bytes(b"1"), "it is not a folder"),
        (lambda path: path.mkdir(), "it is empty"),
        (lambda path: (path / "a" / "b").mkdir(parents=True), "it is empty"),
        (lambda path: path.symlink_to("absent"), "there is no such folder"),
    ],
)
def test_where_there_is_nothing_to_hold_that_is_told(tmp_path: Path, make: Callable[[Path], Any], why: str) -> None:
    make(tmp_path / "model")
    with pytest.raises(BadBackup, match=f"cannot back up .*model: {why}; check the path"):
        Snapshot.take(tmp_path / "model")


def test_folders_in_one_another_have_an_end(tmp_path: Path) -> None:
    deepest = tmp_path / "model" / "/".join("x" * 101)
    deepest.mkdir(parents=True)
    (deepest / "file").write_bytes(b"1")
    with pytest.raises(BadBackup, match=r"deeper than 100 folders"):
        Snapshot.take(tmp_path / "model")


def test_an_error_leaves_nothing_open(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, opened = open_files(), os.open

    def refuse(path: Path, *rest: Any) -> int:
        if str(path).endswith("model.safetensors"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError):
        Snapshot.take(model)
    monkeypatch.undo()
    assert open_files() == before


def test_as_many_files_are_opened_as_the_system_allows(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(source.resource, "getrlimit", lambda _: (10, 5_000))
    monkeypatch.setattr(source.resource, "setrlimit", lambda _, limits: asked.append(limits))
    Snapshot.take(model).close()
    monkeypatch.setattr(source.resource, "getrlimit", lambda _: (5_000, 5_000))
    Snapshot.take(model).close()
    assert asked == [(5_000, 5_000)]


# -- is it a whole model?


def hashes(snapshot: Snapshot) -> dict[str, str]:
    return {path: disk.hashlib.sha256(content).hexdigest() for path, content in held(snapshot).items()}


def faults_of(folder: Path) -> list[str]:
    with Snapshot.take(folder) as snapshot:
        return faults(snapshot, hashes(snapshot))


def pickled(content: bytes = b"moments" * 20) -> bytes:
    """What torch.save writes: a zip archive."""
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    return file.getvalue()


def trainer_checkpoint(folder: Path, step: int) -> Path:
    """What the Trainer of transformers leaves by itself."""
    plain_model(folder)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(pickled())
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    return folder


def sharded(folder: Path) -> Path:
    plain_model(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model-00002-of-00002.safetensors").write_bytes(safetensors(b"two"))
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return folder


def test_a_model_of_longrun_is_whole_whatever_checkpoints_it_has(home: Home) -> None:
    for step in (5, 6):
        add_checkpoint(home, step)
        assert faults_of(home.model) == []
    assert faults_of(home.model / "checkpoint-6") == []
    shutil.copytree(home.model / "checkpoint-6", home.root / "kept aside")
    assert faults_of(home.root / "kept aside") == []


def test_what_the_trainer_of_transformers_leaves_is_whole(tmp_path: Path) -> None:
    for step in (500, 1000):
        trainer_checkpoint(tmp_path / "out" / f"checkpoint-{step}", step)
    (tmp_path / "out" / "runs").mkdir()
    (tmp_path / "out" / "runs" / "events.out.tfevents.1").write_bytes(b"")
    assert faults_of(tmp_path / "out") == []
    assert faults_of(trainer_checkpoint(tmp_path / "out", 1000)) == []


def test_an_adapter_is_whole(tmp_path: Path) -> None:
    plain_model(tmp_path / "lora")
    (tmp_path / "lora" / "config.json").rename(tmp_path / "lora" / "adapter_config.json")
    (tmp_path / "lora" / "model.safetensors").rename(tmp_path / "lora" / "adapter_model.safetensors")
    assert faults_of(tmp_path / "lora") == []


@pytest.mark.parametrize("name", ["model.gguf", "consolidated.00.pth", "pytorch_model.bin", "old.ckpt", "deep/a.pt"])
def test_weights_have_many_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "model" / name).parent.mkdir(parents=True)
    (tmp_path / "model" / name).write_bytes(b"weights in a format of their own")
    assert faults_of(tmp_path / "model") == []


def test_all_shards_of_an_index_are_needed(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    assert faults_of(folder) == []
    disk.remove_file(folder / "model-00002-of-00002.safetensors")
    assert faults_of(folder) == [
        "model.safetensors.index.json: its shard model-00002-of-00002.safetensors is missing",
    ]


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "pytorch_model-00002-of-00003.bin"])
def test_a_part_of_the_weights_is_no_model_even_where_no_index_says_so(model: Path, name: str) -> None:
    (model / "model.safetensors").rename(model / name)
    kind = name.partition("-")[0]
    assert faults_of(model)[0].startswith(f"{kind}-*-of-00003.")
    assert faults_of(model)[0].endswith(" has 1 of 3 parts")


@pytest.mark.parametrize(
    "name", ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth"]
)
def test_what_a_trainer_saves_beside_the_weights_is_none(model: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(b"something")
    assert faults_of(model) == ["there are no weights in it"]


def test_a_checkpoint_of_a_trainer_without_weights_is_no_whole_one(tmp_path: Path) -> None:
    trainer_checkpoint(tmp_path / "out" / "checkpoint-500", 500)
    trainer_checkpoint(tmp_path / "out" / "checkpoint-1000", 1000)
    (tmp_path / "out" / "checkpoint-1000" / "model.safetensors").unlink()
    assert faults_of(tmp_path / "out") == ["checkpoint-1000: there are no weights in it"]


def test_a_checkpoint_of_parts_that_processes_saved_has_weights(tmp_path: Path) -> None:
    parts = trainer_checkpoint(tmp_path / "out" / "checkpoint-500", 500) / "pytorch_model_fsdp_0"
    parts.mkdir()
    (parts.parent / "model.safetensors").rename(parts / "__0_0.distcp")
    assert faults_of(tmp_path / "out") == []


def test_a_folder_of_whole_models_is_held_to_no_lineage_of_its_own(home: Home) -> None:
    add_checkpoint(home, 5)
    (home.root / "models").mkdir()
    home.model.rename(home.root / "models" / "a")
    assert faults_of(home.root / "models") == []


def test_a_model_of_longrun_that_lost_its_lineage_is_not_whole(home: Home) -> None:
    add_checkpoint(home, 5)
    (home.model / "lineage.json").unlink()
    assert faults_of(home.model) == [
        "it has checkpoints, but no lineage.json: it is being removed, or a part of a model"
    ]


def header(length: int, content: bytes) -> bytes:
    return length.to_bytes(8, "little") + content


WHOLE = safetensors(b"weights")
UNREADABLE = {
    "model.safetensors": [b"[" * 9, header(1, b"{"), header(2, b"[]"), header(9, b'{"w":[1]}'), header(9, b"[" * 9)],
    "model.safetensors.index.json": [b"", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {"w": []}}', b"\xff"],
    "config.json": [b"", b"{", b"\xff", b"[" * 100_000],
    "trainer_state.json": [b"", b'{"global_step": 1'],
}


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 20, len(WHOLE) - 1])
def test_safetensors_that_are_cut_off_are_found(model: Path, length: int) -> None:
    os.truncate(model / "model.safetensors", length)
    assert faults_of(model) == [f"model.safetensors: it is {'cut off' if length else 'empty'}"]


@pytest.mark.parametrize("content", [WHOLE + b"\0", header(1 << 63, b"{}"), header(2, b"{}x")])
def test_safetensors_of_another_length_than_they_say_are_found(model: Path, content: bytes) -> None:
    (model / "model.safetensors").write_bytes(content)
    assert faults_of(model) == ["model.safetensors: it is cut off"]


def test_safetensors_without_tensors_are_whole(model: Path) -> None:
    (model / "model.safetensors").write_bytes(header(2, b"{}"))
    assert faults_of(model) == []


@pytest.mark.parametrize(("name", "content"), [(name, one) for name, all_ in UNREADABLE.items() for one in all_])
def test_what_cannot_be_read_is_found(model: Path, name: str, content: bytes) -> None:
    (model / name).write_bytes(content)
    assert len(faults_of(model)) == 1
    assert faults_of(model)[0].startswith(f"{name}: it ")


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin"])
def test_what_torch_saved_and_was_cut_off_is_found(model: Path, name: str) -> None:
    (model / name).write_bytes(pickled())
    assert faults_of(model) == []
    os.truncate(model / name, len(pickled()) - 30)
    assert faults_of(model) == [f"{name}: it is cut off"]
    os.truncate(model / name, 0)
    assert faults_of(model) == [f"{name}: it is empty"]


@pytest.mark.parametrize("state", [None, "{}", "[]", "null", '{"global_step": 499}', '{"global_step": "500"}'])
def test_a_checkpoint_must_say_its_own_step(tmp_path: Path, state: str | None) -> None:
    folder = trainer_checkpoint(tmp_path / "out" / "checkpoint-500", 500)
    if state is None:
        disk.remove_file(folder / "trainer_state.json")
    else:
        (folder / "trainer_state.json").write_text(state)
    told = "its trainer_state.json is missing or says another step: the checkpoint was cut off"
    assert faults_of(tmp_path / "out") == [f"checkpoint-500: {told}"]
    assert faults_of(folder) == []  # a folder by itself may have any name


@pytest.mark.parametrize("name", ["optimizer.pt", "lineage.json", "tokenizer.json", "model.safetensors"])
def test_a_checkpoint_is_held_against_its_manifest(home: Home, name: str) -> None:
    path = add_checkpoint(home, 5) / name
    flip_a_bit(path)
    assert f"checkpoint-5: {name} does not have the SHA-256 of its manifest" in faults_of(home.model)
    path.unlink()
    assert f"checkpoint-5: {name} is missing" in faults_of(home.model)


def test_a_file_that_the_manifest_does_not_know_is_found(home: Home) -> None:
    (add_checkpoint(home, 5) / "extra").write_bytes(b"1")
    assert faults_of(home.model) == ["checkpoint-5: extra is not in its manifest"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"files": []}', b'{"files": {"a": 1}}', b"[" * 100_000])
def test_a_manifest_that_cannot_be_read_is_found(home: Home, content: bytes) -> None:
    (add_checkpoint(home, 5) / "manifest.json").write_bytes(content)
    assert faults_of(home.model) == ["checkpoint-5: manifest.json cannot be read"]


def test_a_folder_without_weights_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes(b"{}")
    assert faults_of(tmp_path / "model") == ["there are no weights in it"]


def test_a_lineage_without_a_checkpoint_cannot_be_gone_on_from(home: Home) -> None:
    shutil.rmtree(add_checkpoint(home, 5))
    assert faults_of(home.model) == ["it has a lineage, but no checkpoint to go on from"]


# -- a model of Longrun is more than its shape


def test_a_checkpoint_without_its_manifest_is_found(home: Home) -> None:
    """Such a model could be restored, but no daemon would go on from it."""
    disk.remove_file(add_checkpoint(home, 5) / "manifest.json")
    assert faults_of(home.model) == ["checkpoint-5: it has no manifest.json"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_published_file_that_is_missing_is_found(home: Home, name: str) -> None:
    """As when somebody ended an rm -rf half-way."""
    add_checkpoint(home, 5)
    disk.remove_file(home.model / name)
    assert faults_of(home.model) == [f"{name} is missing, unlike in checkpoint-5"]


def test_a_published_file_that_has_rotted_is_found(home: Home) -> None:
    add_checkpoint(home, 5)
    (home.model / "config.json").write_bytes(b"[]")
    assert faults_of(home.model) == ["config.json is not that of checkpoint-5"]
