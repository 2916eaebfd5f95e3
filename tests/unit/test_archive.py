from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import pytest

from longrun import archive, disk
from longrun.job import Job, JobState
from tests.unit.builders import content_of, job

if TYPE_CHECKING:
    from pathlib import Path

    from longrun.home import Home

REASON = json.dumps({"kind": "content", "why": "bad", "line": 3})


def claimed(home: Home, finished: Job, content: bytes = b"rows") -> Job:
    home.claimed(finished.number).mkdir(parents=True)
    (home.claimed(finished.number) / finished.name).write_bytes(content)
    home.prepared(finished.number).mkdir()
    (home.prepared(finished.number) / "rows.arrow").write_bytes(b"tokens")
    return finished


def test_a_trained_file_goes_to_trained(home: Home) -> None:
    done = claimed(home, job(1, JobState.TRAINED))
    assert archive.put_away(home, done) == home.trained / "x.jsonl"
    assert content_of(home.trained) == {"x.jsonl": b"rows"}
    assert not home.job(1).exists()


def test_a_rejected_file_goes_with_its_reason(home: Home) -> None:
    refused = claimed(home, job(1, JobState.REJECTED, sha256="ab", reason=REASON))
    assert archive.put_away(home, refused) == home.rejected / "x.jsonl"
    text = (home.rejected / "x.jsonl.reason.json").read_text()
    assert '\n "kind": "content",\n' in text, "a line for each fact, however many rows one names"
    told = json.loads(text)
    assert told == {"file": "x.jsonl", "job": 1, "sha256": "ab", "kind": "content", "why": "bad", "line": 3}
    assert not home.job(1).exists()


def test_putting_away_again_finds_nothing_to_do(home: Home) -> None:
    done = claimed(home, job(1, JobState.TRAINED))
    archive.put_away(home, done)
    assert archive.put_away(home, done) is None
    assert content_of(home.trained) == {"x.jsonl": b"rows"}


def test_a_crash_between_reason_and_file_leaves_no_second_reason(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = claimed(home, job(1, JobState.REJECTED, reason=REASON))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(archive.disk, "rename", interrupt)
        archive.put_away(home, refused)
    assert sorted(content_of(home.rejected)) == ["x.jsonl.reason.json"], "no file is there without its reason"
    archive.put_away(home, refused)
    assert sorted(content_of(home.rejected)) == ["x.jsonl", "x.jsonl.reason.json"]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_copy_that_was_cut_off_is_not_kept(home: Home) -> None:
    done = claimed(home, job(1, JobState.TRAINED))
    (home.claimed(1) / ".x.jsonl.0123abcd.tmp").write_bytes(b"ro")
    assert archive.claimed_files(home, 1) == [home.claimed(1) / "x.jsonl"]
    archive.put_away(home, done)
    assert content_of(home.trained) == {"x.jsonl": b"rows"}


@pytest.mark.parametrize("state", [JobState.TRAINED, JobState.REJECTED])
def test_a_folder_that_a_person_removed_is_made_again(home: Home, state: JobState) -> None:
    home.trained.rmdir()
    home.rejected.rmdir()
    assert archive.put_away(home, claimed(home, job(1, state))) is not None


def test_files_of_one_name_are_all_kept(home: Home) -> None:
    for number in range(1, 4):
        archive.put_away(home, claimed(home, job(number, JobState.TRAINED, name="a.jsonl.gz"), b"%d" % number))
    assert content_of(home.trained) == {"a.jsonl.gz": b"1", "a.2.jsonl.gz": b"2", "a.3.jsonl.gz": b"3"}


@pytest.mark.parametrize(
    ("taken", "free"),
    [
        ([], "x.jsonl"),
        (["x.jsonl"], "x.2.jsonl"),
        (["x.jsonl", "x.2.jsonl"], "x.3.jsonl"),
        (["x.2.jsonl"], "x.jsonl"),
    ],
)
def test_a_free_name_is_the_first_that_is_not_taken(tmp_path: Path, taken: list[str], free: str) -> None:
    for name in taken:
        (tmp_path / name).symlink_to("dangling")
    assert archive.free_name(tmp_path, "x.jsonl") == tmp_path / free


@pytest.mark.parametrize("stem", ["x" * 249, "\N{EURO SIGN}" * 83, "\udcff" * 249])
def test_the_longest_names_are_put_away_with_reasons_of_their_own(home: Home, stem: str) -> None:
    for number in (1, 2):
        archive.put_away(home, claimed(home, job(number, JobState.REJECTED, name=f"{stem}.jsonl", reason=REASON)))
    files = [path for path in home.rejected.iterdir() if not path.name.endswith(archive.REASON)]
    assert len(files) == 2
    assert {archive._reason_path(path) for path in files} == set(home.rejected.glob("*.reason.json"))
    assert sorted(json.loads(path.read_bytes())["job"] for path in home.rejected.glob("*.reason.json")) == [1, 2]


def test_long_names_that_begin_alike_have_reasons_of_their_own(home: Home) -> None:
    for number, length in ((1, 245), (2, 249)):
        name = f"{'x' * length}.jsonl"
        archive.put_away(home, claimed(home, job(number, JobState.REJECTED, name=name, reason=REASON)))
    assert sorted(json.loads(path.read_bytes())["job"] for path in home.rejected.glob("*.reason.json")) == [1, 2]


# -- back to the inbox


@pytest.mark.parametrize("name", ["x.jsonl", "rejected/x.jsonl"])
def test_a_rejected_file_is_taken_back_without_its_reason(home: Home, name: str) -> None:
    archive.put_away(home, claimed(home, job(1, JobState.REJECTED, reason=REASON)))
    assert archive.drop_again(home, name) == home.inbox / "x.jsonl"
    assert content_of(home.inbox) == {"x.jsonl": b"rows"}
    assert content_of(home.rejected) == {}


def test_a_trained_file_stays_in_trained(home: Home) -> None:
    (home.trained / "x.jsonl").write_bytes(b"rows")
    (home.inbox / "x.jsonl").write_bytes(b"waits")
    assert archive.drop_again(home, "x.jsonl") == home.inbox / "x.2.jsonl"
    assert content_of(home.trained) == {"x.jsonl": b"rows"}
    assert content_of(home.inbox) == {"x.jsonl": b"waits", "x.2.jsonl": b"rows"}


def test_what_is_nowhere_cannot_be_taken_back(home: Home) -> None:
    home.inbox.rmdir()
    with pytest.raises(FileNotFoundError):
        archive.drop_again(home, "x.jsonl")
    assert content_of(home.root / "inbox") == {}


def test_a_put_file_appears_whole_under_a_free_name(home: Home, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"rows")
    names = [archive.put(home, tmp_path / "x.jsonl").name for _ in range(2)]
    assert names == ["x.jsonl", "x.2.jsonl"]
    assert set(content_of(home.inbox).values()) == {b"rows"}
    assert not (home.inbox / "x.jsonl").samefile(tmp_path / "x.jsonl")


# -- back into the queue


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def trained(number: int, content: bytes, **facts: Any) -> Job:
    return job(number, JobState.TRAINED, sha256=sha256(content), **facts)


def test_a_trained_file_is_found_by_its_bytes_under_any_name_it_was_given(home: Home) -> None:
    for number in range(1, 4):
        archive.put_away(home, claimed(home, trained(number, b"%d" % number), b"%d" % number))
    trained_files = archive.Trained(home)
    found = [trained_files.find(trained(number, b"%d" % number)) for number in range(1, 5)]
    assert found == [home.trained / name for name in ("x.jsonl", "x.2.jsonl", "x.3.jsonl")] + [None]
    (home.trained / "x.jsonl").unlink()
    assert archive.Trained(home).find(trained(3, b"3")) == home.trained / "x.3.jsonl"
    assert archive.Trained(home).find(trained(2, b"2", name="y.jsonl")) is None


def test_many_files_of_one_name_are_read_once_each_and_again_when_they_change(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(1, 9):
        archive.put_away(home, claimed(home, trained(number, b"%d" % number), b"%d" % number))
    read: list[Path] = []
    real = disk.hash_file
    monkeypatch.setattr(disk, "hash_file", lambda path, *rest: read.append(path) or real(path, *rest))
    trained_files = archive.Trained(home)
    assert all(trained_files.find(trained(number, b"%d" % number)) for number in range(1, 9))
    assert len(read) == len(set(read)) == 8
    (home.trained / "x.jsonl").write_bytes(b"another")
    assert trained_files.find(trained(1, b"1")) is None
    assert trained_files.find(trained(9, b"another")) == home.trained / "x.jsonl"


def test_a_file_that_goes_before_it_can_be_claimed_again_leaves_no_folder(home: Home) -> None:
    assert not archive.claim_again(home, trained(3, b"rows"), home.trained / "gone.jsonl")
    assert not home.job(3).exists()


def test_each_of_two_files_with_the_same_bytes_is_found_once(home: Home) -> None:
    for number in (1, 2):
        archive.put_away(home, claimed(home, trained(number, b"rows")))
    first = archive.Trained(home).find(trained(1, b"rows"))
    assert first is not None
    second = archive.Trained(home).find(trained(2, b"rows"), {first})
    assert second == home.trained / "x.2.jsonl"
    assert archive.Trained(home).find(trained(3, b"rows"), {first, second}) is None


@pytest.mark.parametrize("stem", ["x" * 249, "\N{EURO SIGN}" * 83, "\udcff" * 249])
def test_the_longest_names_are_found_too(home: Home, stem: str) -> None:
    name = f"{stem}.jsonl"
    for content in (b"1", b"2"):
        archive.put_away(home, claimed(home, trained(1, content, name=name), content))
    for content in (b"1", b"2"):
        found = archive.Trained(home).find(trained(1, content, name=name))
        assert found is not None
        assert found.read_bytes() == content


def test_only_a_regular_file_that_can_be_read_is_found(home: Home, tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(b"rows")
    (home.trained / "x.jsonl").symlink_to(tmp_path / "rows")
    (home.trained / "x.2.jsonl").mkdir()
    assert archive.Trained(home).find(trained(1, b"rows")) is None
    home.trained.rename(home.root / "moved away")
    assert archive.Trained(home).find(trained(1, b"rows")) is None


def test_a_file_is_claimed_again_into_a_folder_that_is_durable_before(home: Home, disk_log: list[str]) -> None:
    done = trained(7, b"rows")
    (home.trained / "x.2.jsonl").write_bytes(b"rows")
    archive.claim_again(home, done, home.trained / "x.2.jsonl")
    assert archive.claimed_files(home, 7) == [home.claimed(7) / "x.jsonl"]
    assert content_of(home.trained) == {}
    assert disk_log == [
        "sync claimed",
        "sync 000007",
        "sync jobs",
        "rename x.jsonl",
        "sync claimed",
        "sync trained",
    ]


@pytest.mark.parametrize("moved", [False, True])
def test_a_crash_before_the_ledger_knew_leaves_a_trained_file(
    home: Home, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    done = trained(1, b"rows")
    (home.trained / "x.jsonl").write_bytes(b"rows")
    if moved:
        archive.claim_again(home, done, home.trained / "x.jsonl")
    else:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(archive.disk, "rename", interrupt)
            archive.claim_again(home, done, home.trained / "x.jsonl")
    archive.put_away(home, done)
    assert content_of(home.trained) == {"x.jsonl": b"rows"}
    assert not home.job(1).exists()


# -- retention


def test_nothing_expires_unless_it_was_asked_for(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (home.trained, home.rejected):
        (folder / "x.jsonl").write_bytes(b"")
        (folder / "a person's folder").mkdir()
    assert list(archive.expired(home, 0)) == []
    assert list(archive.expired(home, 1)) == []
    later = archive.time.time() + 1.1 * archive.SECONDS_A_DAY
    monkeypatch.setattr(archive.time, "time", lambda: later)
    assert list(archive.expired(home, 1)) == [home.trained / "x.jsonl", home.rejected / "x.jsonl"]
    home.rejected.rename(home.root / "moved away")
    assert list(archive.expired(home, 1)) == [home.trained / "x.jsonl"]
