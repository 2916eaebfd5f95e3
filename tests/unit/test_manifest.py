from __future__ import annotations

import hashlib
import json
import os
import subprocess
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from longrun import manifest
from longrun.errors import BadBackup
from longrun.manifest import ANY, BackupType, Manifest, StoredFile

if TYPE_CHECKING:
    from pathlib import Path

ID = "20260102T030405Z-manual-abcdef"
DIGEST = "0123456789abcdef" * 4
STAT = (1, 2, 3, 4, 5)


def file(path: str = "model.safetensors", **facts: Any) -> StoredFile:
    known = {"path": path, "size": 3, "mode": 0o644, "mtime_ns": 1_000, "sha256": DIGEST, "stat": STAT}
    return StoredFile(**known | facts)


def manifest_of(*files: StoredFile, **facts: Any) -> Manifest:
    known: dict[str, Any] = {
        "id": ID,
        "sequence": 7,
        "type": BackupType.MANUAL,
        "reason": "before the bad file",
        "created": "2026-01-02T03:04:05+00:00",
        "host": "here",
        "tool": "Longrun 0",
        "source": "/home/current_model",
        "global_step": 10,
        "lineage": "one",
        "base_model": "tiny",
        "faults": (),
        "files": files or (file(), file("checkpoint-10/optimizer.pt", sha256="f" * 64, size=0)),
    }
    return Manifest(**known | facts)


GOOD = manifest_of()


def sealed(values: dict[str, Any]) -> bytes:
    """As whoever wants to deceive would write it: with the right seal."""
    bare = {key: value for key, value in values.items() if key != "seal"}
    canonical = json.dumps(bare, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps(bare | {"seal": hashlib.sha256(canonical).hexdigest()}).encode()


def changed(**values: Any) -> bytes:
    return sealed(json.loads(GOOD.to_json()) | values)


def listing(*entries: dict[str, Any]) -> bytes:
    whole = json.loads(GOOD.to_json())["files"][0]
    return changed(files=[whole | entry for entry in entries])


# -- there and back


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"global_step": None, "lineage": None, "base_model": None, "reason": ""},
        {"type": BackupType.PRE_RECOVERY, "faults": ("it is cut off", "a \udcff name")},
        {"files": (file(stat=()), file("a\nb\\c"), file("-x"), file("\udcff\udcfe"), file("x" * 255))},
    ],
)
def test_a_manifest_comes_back_as_it_was(facts: dict[str, Any]) -> None:
    made = manifest_of(**facts)
    assert manifest.parse(made.to_json().encode(), ID) == made
    assert manifest.parse(made.to_json().encode(), ANY) == made


def test_a_manifest_has_one_file_a_line_and_its_seal_above() -> None:
    lines = GOOD.to_json().splitlines()
    assert [json.loads(line.strip(" ,"))["path"] for line in lines[-4:-2]] == [file.path for file in GOOD.files]
    assert lines[-2:] == [" ]", "}"]


def test_a_manifest_knows_its_sizes_and_contents() -> None:
    made = manifest_of(file("a"), file("b"), file("c", sha256="f" * 64, size=5))
    assert (made.size_bytes, made.digests) == (11, {DIGEST: 3, "f" * 64: 5})
    facts = made.facts()
    assert (facts["files"], facts["bytes"], facts["complete"], facts["id"]) == (3, 11, True, ID)
    assert not manifest_of(faults=("it is cut off",)).complete


def test_an_id_tells_time_and_type_and_is_unlike_any_other() -> None:
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    made = {manifest.new_id(kind, now) for kind in BackupType for _ in range(8)}
    assert len(made) == 8 * len(BackupType)
    assert all(manifest.is_id(found) and found.startswith("20260102T030405Z-") for found in made)


@pytest.mark.parametrize("text", ["", "..", "latest", ID + "/..", ID + "\n", "x" + ID, ID.upper(), ID[:-1]])
def test_what_is_no_id_is_not_taken_for_one(text: str) -> None:
    assert not manifest.is_id(text)


# -- what is not believed

HOSTILE_PATHS = [
    *("..", ".", "", "/etc/passwd", "../x", "a/../../x", "a/./b", "a//b", "a/", "/", "./a", "a\0b"),
    *("x" * 256, "\N{EURO SIGN}" * 86, "x/" * 2047 + "xx", "x/" * 100 + "x", "\ud800"),
]


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_a_path_that_leaves_the_model_or_cannot_be_is_refused(path: str) -> None:
    assert not manifest.is_inside(path)
    with pytest.raises(BadBackup, match=f"manifest of {ID} cannot be trusted: it names a file outside the model"):
        manifest.parse(listing({"path": path}), ID)


@pytest.mark.parametrize("path", ["a", "...", "..a", "a/b/c", "x" * 255, "-rf", " ", "~", "\udcff", "a\nb", "*"])
def test_strange_names_that_can_be_are_taken(path: str) -> None:
    assert manifest.is_inside(path)
    assert manifest.parse(listing({"path": path}), ID).files[0].path == path


HOSTILE = {
    "no JSON": b"{",
    "empty": b"",
    "not UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "null": b"null",
    "nested without end": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000,
    "a number without end": b'{"sequence": ' + b"9" * 10_000 + b"}",
    "nothing": b"{}",
    "another format": changed(format="tar"),
    "another version": changed(version=2),
    "no version": changed(version=None),
    "a bad seal": GOOD.to_json().replace("before", "behind").encode(),
    "a seal that is none": json.dumps({**json.loads(GOOD.to_json()), "seal": None}).encode(),
    "a field too many": changed(extra=1),
    "another id": changed(id="20260102T030405Z-manual-abcdee"),
    "an id with a slash": changed(id="../" + ID),
    "an id that is a number": changed(id=3),
    "another type": changed(type="full"),
    "no type": changed(type=None),
    "a reason that is none": changed(reason=None),
    "a source that is a list": changed(source=["/"]),
    "a time that is none": changed(created="yesterday"),
    "a time without zone": changed(created="2026-01-02T03:04:05"),
    "a time before all time": changed(created="0001-01-01T00:00:00+14:00"),
    "a time after all time": changed(created="9999-12-31T23:59:59-14:00"),
    "a lineage that is a number": changed(lineage=1),
    "a base that is a list": changed(base_model=[]),
    "a step that is a word": changed(global_step="10"),
    "a step that is true": changed(global_step=True),
    "a sequence that is a fraction": changed(sequence=1.0),
    "a sequence that is true": changed(sequence=True),
    "faults that are numbers": changed(faults=[1]),
    "faults that are nothing": changed(faults=None),
    "no files": changed(files=[]),
    "files by name": changed(files={"a": {}}),
    "files that are words": changed(files=["a"]),
    "files that are null": changed(files=None),
    "a file twice": listing({"path": "a"}, {"path": "a"}),
    "a file that is a folder": listing({"path": "a/b/c"}, {"path": "a"}),
    "a path that is a number": listing({"path": 1}),
    "a file with a field too many": listing({"link": "/etc"}),
    "a digest in capitals": listing({"sha256": DIGEST.upper()}),
    "a digest cut short": listing({"sha256": DIGEST[:-1]}),
    "a digest and more": listing({"sha256": DIGEST + "\n"}),
    "a digest that is a path": listing({"sha256": "../../" + DIGEST[6:]}),
    "a digest that is nothing": listing({"sha256": None}),
    "less than no bytes": listing({"size": -1}),
    "more bytes than there are": listing({"size": 1 << 63}),
    "a size that is true": listing({"size": True}),
    "a size that is a fraction": listing({"size": 3.0}),
    "a size without end": GOOD.to_json().replace('"size": 3', '"size": 1e999').encode(),
    "a mode that is a word": listing({"mode": "0644"}),
    "a time too large": listing({"mtime_ns": 1 << 63}),
    "a time that is a fraction": listing({"mtime_ns": 0.5}),
    "facts that are words": listing({"stat": ["1"]}),
    "facts that are nothing": listing({"stat": None}),
    "too few facts": listing({"stat": [1, 2, 3]}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_manifest_that_cannot_be_believed_is_refused_with_a_sentence(case: str) -> None:
    with pytest.raises(BadBackup, match=rf"the manifest of {ID} cannot be (trusted|read): ."):
        manifest.parse(HOSTILE[case], ID)


@pytest.mark.parametrize("missing", json.loads(GOOD.to_json()))
def test_a_manifest_without_a_field_is_refused(missing: str) -> None:
    values = json.loads(GOOD.to_json())
    del values[missing]
    for content in (sealed(values), json.dumps(values).encode()):
        if missing != "seal" or content != sealed(values):
            with pytest.raises(BadBackup):
                manifest.parse(content, ID)


def test_a_changed_byte_is_never_read_as_something_else() -> None:
    whole = GOOD.to_json().encode()
    for at in range(len(whole)):
        for bit in (1, 32):
            flipped = whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :]
            try:
                found = manifest.parse(flipped, ID)
            except BadBackup:
                continue
            assert found == GOOD, "only white space may differ"
            assert json.loads(flipped) == json.loads(whole)


def test_no_file_becomes_a_program_of_another_user() -> None:
    assert manifest.parse(listing({"mode": 0o106755}), ID).files[0].mode == 0o755


# -- for sha256sum

NAMES = {
    "plain": b"model.safetensors",
    "below a folder": b"checkpoint-1/a b",
    "newline": b"a\nb",
    "carriage return": b"a\rb",
    "backslash": b"a\\nb",
    "leading dash": b"--check",
    "leading blank": b"  a",
    "no UTF-8": b"\xff\xfe",
    "star": b"*a",
}


@pytest.mark.parametrize("name", NAMES)
def test_sha256sum_understands_the_list_for_any_name(tmp_path: Path, name: str) -> None:
    path = os.fsdecode(NAMES[name])
    made = manifest_of(file(path, sha256=hashlib.sha256(b"abc").hexdigest()))
    (tmp_path / "model" / path).parent.mkdir(parents=True)
    (tmp_path / "model" / path).write_bytes(b"abc")
    (tmp_path / "SHA256SUMS").write_bytes(made.to_sums())
    check = ["sha256sum", "--strict", "-c", "../SHA256SUMS"]
    assert subprocess.run(check, cwd=tmp_path / "model", capture_output=True, check=False).returncode == 0
    (tmp_path / "model" / path).write_bytes(b"abd")
    assert subprocess.run(check, cwd=tmp_path / "model", capture_output=True, check=False).returncode == 1
