"""Manifests and archives made to harm: refused in one sentence, and nothing is written but in tmp/ and the staging."""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import tarfile

import pytest
import zstandard

from longrun import manifest as manifests
from tests.drills.test_kills import LITTLE
from tests.drills.world import World, tree

HUGE = 1 << 40


def sealed(values):
    values = {key: value for key, value in values.items() if key != "seal"}
    return json.dumps(values | {"seal": manifests._seal(values)}).encode()


def with_file(**changes):
    """The first file of the list is changed, and the seal fits."""
    return lambda values: sealed(values | {"files": [values["files"][0] | changes, *values["files"][1:]]})


def with_value(**changes):
    return lambda values: sealed(values | changes)


def also(*paths):
    """More files are listed, with a content that is there."""
    return lambda values: sealed(
        values | {"files": [*values["files"], *({**values["files"][0], "path": path} for path in paths)]}
    )


PAPERS = {
    "a path above": with_file(path="../../../canary/evil"),
    "an absolute path": with_file(path="/tmp/longrun-evil"),
    "a path with dots within": with_file(path="a/../../evil"),
    "an empty part in a path": with_file(path="a//b"),
    "a NUL in a path": with_file(path="a\0b"),
    "a lone surrogate in a path": with_file(path="\ud800"),
    "a name too long": with_file(path="a" * 256),
    "a path that is no word": with_file(path=["a"]),
    "a file twice": also("twice", "twice"),
    "a file that is a folder too": also("both", "both/below"),
    "a digest with a path": with_file(sha256="../../" + "0" * 58),
    "a digest in capitals": with_file(sha256="A" * 64),
    "two sizes of a content": with_file(size=1),
    "a negative size": with_file(size=-1),
    "a size beyond all disks": with_file(size=1 << 61),
    "a size that is true": with_file(size=True),
    "a time beyond the clock": with_file(mtime_ns=1 << 70),
    "another field": with_value(evil=1),
    "an id with a path": with_value(id="../../../canary/evil"),
    "an id of another": with_value(id="20260101T000000Z-manual-abcdef"),
    "a version to come": with_value(version=2),
    "no files": with_value(files=[]),
    "a changed byte": lambda values: json.dumps(values | {"reason": "another"}).encode(),
    "no seal": lambda values: json.dumps({key: value for key, value in values.items() if key != "seal"}).encode(),
    "brackets without end": lambda values: b"[" * 1_000_000,
    "a number without end": lambda values: b'{"format": ' + b"9" * 1_000_000 + b"}",
    "not JSON": lambda values: b"\xff\xfe\0",
    "a gigabyte of spaces": None,  # a sparse file
    "much in little": lambda values: (b"[" + b"{}," * (manifests.MAX_BYTES // 3))[:-1] + b"]",
}  # fmt: skip


def write_paper(path, values, how):
    if how is None:
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            file.truncate(1 << 30)
    else:
        path.write_bytes(how(values))


def into_the_store(world, how):
    """The manifest of a backup in the store is exchanged."""
    backup = world.ids["second"]
    path = world.store.folder(backup) / "manifest.json"
    write_paper(path, json.loads(path.read_bytes()), how)
    return [("restore", backup), ("verify",), ("export", backup, "out"), ("export", backup, "out.tar"),
            ("prune", backup, "--execute")]  # fmt: skip


def into_a_folder(world, how):
    path = world.home / "brought" / "backup.json"
    write_paper(path, json.loads(path.read_bytes()), how)
    return [("import", "brought")]


def into_an_archive(world, how):
    path = world.home / "paper"
    with tarfile.open(world.home / "brought.tar") as archive:
        name = archive.next().name
        values = json.loads(archive.extractfile(name).read())
    write_paper(path, values, how)
    with tarfile.open(world.home / "evil.tar", "w") as archive:
        archive.add(path, name)
        archive.add(world.home / "brought" / "model", f"{world.ids['away']}/model")
    path.unlink()
    return [("import", "evil.tar")]


# -- archives whose manifest is good


def rewritten(change, suffix=".tar"):
    """The good archive with `change(member, content)` giving the members that stand in each one's place."""

    def write(world):
        made = io.BytesIO()
        with tarfile.open(world.home / "brought.tar") as old, tarfile.open(fileobj=made, mode="w") as new:
            for member in old:
                for out, content in change(member, old.extractfile(member).read()):
                    new.addfile(out, io.BytesIO(content))
        content = made.getvalue()
        (world.home / f"evil{suffix}").write_bytes(
            zstandard.ZstdCompressor().compress(content) if suffix == ".tar.zst" else content
        )
        return [("import", f"evil{suffix}")]

    return write


def member_of(name, kind=tarfile.REGTYPE, size=0, link="", **headers):
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname, member.pax_headers = kind, size, link, headers
    return member


def last_as(**changes):
    """The weights' member comes as something else."""

    def change(member, content):
        if member.name.endswith("/model/model.safetensors"):
            member = member_of(**{"name": member.name, **changes})
            content = content[: member.size]
        yield member, content

    return change


def first(make):
    """Something comes before everything else."""
    state = []

    def change(member, content):
        if not state:
            state.append(True)
            yield make, b"evil"
        yield member, content

    return change


def after_the_papers(make):
    def change(member, content):
        yield member, content
        if member.name.endswith("/SHA256SUMS"):
            yield make, b"evil" * (make.size // 4)

    return change


def raw(name, content):
    def write(world):
        (world.home / name).write_bytes(content() if callable(content) else content)
        return [("import", name)]

    return write


def cut(share):
    def write(world):
        whole = (world.home / "brought.tar.zst").read_bytes()
        (world.home / "evil.tar.zst").write_bytes(whole[: int(len(whole) * share)])
        return [("import", "evil.tar.zst")]

    return write


def a_bomb():
    """A manifest of ten gigabytes in a few kilobytes, as far as anyone reads."""
    made = io.BytesIO()
    header = member_of("20260101T000000Z-manual-abcdef/backup.json", size=10 << 30).tobuf(tarfile.GNU_FORMAT)
    with zstandard.ZstdCompressor().stream_writer(made, closefd=False) as out:
        out.write(header)
        for _ in range(10 << 4):
            out.write(bytes(1 << 20))
    return made.getvalue()


def a_long_header():
    """A name of a hundred megabytes, as GNU tar and pax allow."""
    made = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(made, closefd=False) as out:
        out.write(member_of("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=60 << 20).tobuf(tarfile.GNU_FORMAT))
        for _ in range(60):
            out.write(b"a" * (1 << 20))
        out.write(member_of("x").tobuf(tarfile.GNU_FORMAT))
    return made.getvalue()


EVIL = "../../canary/evil"
ARCHIVES = {
    "a member above": rewritten(last_as(name=EVIL)),
    "a member at the root": rewritten(last_as(name="/tmp/longrun-evil")),
    "a member above, by pax": rewritten(after_the_papers(member_of("x", size=4, path=EVIL))),
    "a symbolic link": rewritten(last_as(kind=tarfile.SYMTYPE, link="/etc/passwd")),
    "a hard link": rewritten(last_as(kind=tarfile.LNKTYPE, link="/etc/passwd")),
    "a device": rewritten(last_as(kind=tarfile.CHRTYPE)),
    "a FIFO": rewritten(last_as(kind=tarfile.FIFOTYPE)),
    "a folder in a file's place": rewritten(last_as(kind=tarfile.DIRTYPE)),
    "a shorter content": rewritten(last_as(size=10)),
    "a link before all": rewritten(first(member_of("20260101T000000Z-manual-abcdef", tarfile.SYMTYPE, link="/"))),
    "a file before all": rewritten(first(member_of("hello", size=4))),
    "a file too many": rewritten(after_the_papers(member_of("20260101T000000Z-manual-abcdef/model/x", size=4))),
    "a large SHA256SUMS": rewritten(
        lambda member, content: [(member_of(member.name, size=50 << 20), bytes(50 << 20))]
        if member.name.endswith("SUMS") else [(member, content)], ".tar.zst"
    ),
    "a member missing": rewritten(lambda m, content: [] if m.name.endswith("optimizer.pt") else [(m, content)]),
    "a member twice": rewritten(lambda m, content: [(m, content)] * (1 + m.name.endswith("optimizer.pt"))),
    "a changed content": rewritten(lambda m, content: [(m, content[::-1] if "optimizer" in m.name else content)]),
    "cut in its middle": cut(0.5),
    "cut near its end": cut(0.97),
    "nothing": raw("evil.tar", b""),
    "nothing, compressed": raw("evil.tar.zst", b""),
    "zeros": raw("evil.tar", bytes(100_000)),
    "noise": raw("evil.tar.zst", b"\x28\xb5\x2f\xfd" + b"\xa5" * 1000),
    "a bomb": raw("evil.tar.zst", a_bomb),
    "a name without end": raw("evil.tar.zst", a_long_header),
}  # fmt: skip


# -- folders whose manifest is good


def instead(make):
    """The weights of an exported folder are something else."""

    def write(world):
        path = world.home / "brought" / "model" / "model.safetensors"
        path.unlink()
        make(path)
        return [("import", "brought")]

    return write


def grow(path):
    with path.open("wb") as file:
        file.truncate(HUGE)


FOLDERS = {
    "a link to a secret": instead(lambda path: path.symlink_to("/etc/passwd")),
    "a FIFO in a folder": instead(os.mkfifo),
    "an endless device": instead(lambda path: path.symlink_to("/dev/zero")),
    "a folder for a file": instead(lambda path: path.mkdir()),
    "a terabyte of nothing": instead(grow),
}

PLACES = (into_the_store, into_a_folder, into_an_archive)
LAWFUL = {("an id of another", into_a_folder)}  # a folder has no name of its own that its id could belie
PLACED = {
    f"{name}, {place.__name__.replace('_', ' ')}": functools.partial(place, how=how)
    for name, how in PAPERS.items()
    for place in PLACES
    if (name, place) not in LAWFUL
}
CASES = PLACED | ARCHIVES | FOLDERS


@pytest.fixture
def canary(quick):
    """What stands around the home: nothing in it may change."""
    folder = quick / "canary"
    (folder / "below").mkdir(parents=True)
    (folder / "below" / "bird").write_text("alive")
    return folder


def seen(world):
    """The home, but for the lock's note and for contents: those that fit their digest may stay, no backup has them."""
    named = world.store.objects.relative_to(world.home)
    return {path: content for path, content in tree(world.home, without=world.store.root / "lock").items()
            if not path.startswith(str(named))}  # fmt: skip


def test_what_is_hostile_is_refused_and_harms_nothing(campaign, hand, quick, canary):
    whole = World.make(quick / "whole", weights_bytes=LITTLE // 3)

    def attempt(name, dice):
        world = whole.copy(quick / "world")
        commands = CASES[name](world)
        around, inside = tree(canary), seen(world)
        for words in commands:
            outcome = hand.do(*words, home=world.home)
            outcome.check_told()
            assert outcome.code == 1, outcome
            assert tree(canary) == around
            assert seen(world) == inside, outcome
        assert not os.path.lexists("/tmp/longrun-evil")
        assert hand.do("list", home=world.home).code == 0
        shutil.rmtree(world.home)

    campaign.run("hostile, it is refused and harms nothing", list(CASES), attempt, small=30)
