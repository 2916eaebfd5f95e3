"""What may be left on a disk when the power fails: states of a home, made from the record of what was done to it.

The rules are those of a careful reader of fsync(2). Kept is what a sync covered: of a file its bytes and size, of a
folder the names in it. Of what was done later, anything may be there and anything missing, for each operation alone:
a new name without the bytes, bytes in part or as zeros, a later name without an earlier one. A rename is one step. It
is durable when the folder that it went into was synced. What is unreachable is lost, whatever of it was synced.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random
    from collections.abc import Collection

NOT_RECORDED = ("ledger.sqlite3", "ledger.sqlite3-wal", "ledger.sqlite3-shm", "worker.sock", "preparer.sock")
FULL, HALF, ZEROS = "full", "half", "zeros"

Entry = list[Any]
Kept = list[tuple[Entry, str]]  # operations that the disk has, in their order, and how much of each


@dataclass
class Node:
    kind: str  # folder, file, link
    names: dict[str, int] = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)
    target: str = ""
    mode: int | None = None
    mtime_ns: int | None = None


@dataclass
class Said:
    """What people, or who dropped a file, were told before the power failed."""

    text: str = ""
    step: int = 0  # saved or trained up to here
    arrived: list[str] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)

    def after(self, before: Said | None) -> Said:
        """All that was said, if this was said after `before`."""
        if before is None:
            return self
        both = Said(before.text + self.text, max(before.step, self.step), before.arrived + self.arrived)
        both.rejected = before.rejected + self.rejected
        return both


class Recording:
    """The record of a home's life: what was on the disk when it began, all of it durable, and what happened then."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log.jsonl"
        self.ledger = folder / "ledger.sqlite3"  # as copies of it begin: ledger-0.sqlite3
        self.start = folder / "start.json"

    def begin(self, home: Path) -> None:
        self.log.parent.mkdir()
        nodes: dict[int, dict[str, Any]] = {}
        look(home, nodes)
        self.start.write_text(json.dumps({"root": home.stat().st_ino, "nodes": nodes}))

    def environment(self, home: Path, *, clones: bool) -> dict[str, str]:
        """What makes every process of the home record itself."""
        ledger = str(home / "state" / "ledger.sqlite3")
        return {"LONGRUN_RECORD": json.dumps({"log": str(self.log), "ledger": ledger, "clones": clones})}

    def say(self, **facts: Any) -> None:
        """Note what the drill itself was told."""
        with self.log.open("a") as file:
            file.write(json.dumps(["said", facts]) + "\n")

    def read(self) -> None:
        start = json.loads(self.start.read_text())
        self.root = start["root"]
        self._nodes = start["nodes"]
        self.entries: list[Entry] = [json.loads(line) for line in self.log.read_text().splitlines()]

    @property
    def sites(self) -> Counter[str]:
        """Who synced, and how often."""
        known = {int(number) for number in self._nodes}
        found: Counter[str] = Counter()
        for entry in self.entries:
            if entry[0] == "name":
                known |= {inode for folder, _, inode in entry[1] if folder in known}
            elif entry[0] == "sync" and entry[1] in known:
                found[entry[2]] += 1
        return found

    def moments(self, site: str) -> list[int]:
        """Right after which entries this site has synced."""
        return [at for at, entry in enumerate(self.entries, 1) if entry[0] == "sync" and entry[2] == site]

    def said(self, cut: int) -> Said:
        found = Said()
        for _, facts in (entry for entry in self.entries[:cut] if entry[0] == "said"):
            found.text += facts.get("message", "") + "\n"
            if facts["event"] in ("saved", "trained"):
                found.step = max(found.step, facts["global_step"])
            elif facts["event"] in ("arrived", "rejected"):
                getattr(found, facts["event"]).append(facts["file"])
        return found

    def ledgers(self, cut: int) -> list[int]:
        return [entry[1] for entry in self.entries[:cut] if entry[0] == "ledger"]

    def nodes(self) -> dict[int, Node]:
        return nodes_of(self._nodes, self.entries)


def nodes_of(start: dict[Any, dict[str, Any]], entries: list[Entry]) -> dict[int, Node]:
    """All that ever were, as they began: what has no name yet cannot be reached."""
    found = {
        int(number): Node(**{**facts, "data": bytearray(facts["data"], "latin-1"), "names": dict(facts["names"])})
        for number, facts in start.items()
    }
    for _, names, kind, extra in (entry for entry in entries if entry[0] == "name" and entry[2]):
        found.setdefault(names[-1][2], Node(kind, target=extra or ""))
    return found


def look(path: Path, nodes: dict[int, dict[str, Any]]) -> int:
    there = path.lstat()
    facts: dict[str, Any] = {"kind": "file", "names": {}, "data": "", "target": "", "mtime_ns": there.st_mtime_ns}
    if path.is_symlink():
        facts |= {"kind": "link", "target": os.fspath(path.readlink())}
    elif path.is_dir():
        names = {entry.name: look(entry, nodes) for entry in path.iterdir() if entry.name not in NOT_RECORDED}
        facts |= {"kind": "folder", "names": names}
    else:
        facts["data"] = path.read_bytes().decode("latin-1")
    nodes[there.st_ino] = facts
    return there.st_ino


# -- what is left


def lose_power(recording: Recording, cut: int, dice: random.Random, *, ignored: Collection[str] = ()) -> Kept:
    """What the disk has of the first `cut` entries; syncs by `ignored` did nothing."""
    done = [entry for entry in recording.entries[:cut] if entry[0] in ("name", "data", "size", "mode", "sync")]
    durable = _durable(done, ignored)
    open_ = [at for at, entry in enumerate(done) if at not in durable and entry[0] != "sync"]
    there = _draw(open_, dice)
    return [(entry, there.get(at, FULL)) for at, entry in enumerate(done) if at in durable or at in there]


def _durable(done: list[Entry], ignored: Collection[str]) -> set[int]:
    durable: set[int] = set()
    waiting: dict[int, list[int]] = {}  # by what a sync would have to be of
    for at, entry in enumerate(done):
        if entry[0] == "name":
            waiting.setdefault(entry[1][-1][0], []).append(at)
        elif entry[0] != "sync":
            waiting.setdefault(entry[1], []).append(at)
        elif entry[2] not in ignored:
            durable.update(waiting.pop(entry[1], ()))
    return durable


def _draw(open_: list[int], dice: random.Random) -> dict[int, str]:
    """Which of the operations that nothing made durable are there all the same, and how much of each."""
    if not open_:
        return {}
    one = dice.choice(open_)
    match dice.choice(("none", "all", "one", "all but one", "some", "some", "until one")):
        case "none":
            return {}
        case "all":
            return dict.fromkeys(open_, FULL)
        case "one":
            return {one: dice.choice((FULL, FULL, HALF, ZEROS))}
        case "all but one":
            spoilt = dice.choice(({}, {one: HALF}, {one: ZEROS}))
            return {at: FULL for at in open_ if at != one} | spoilt
        case "until one":
            return {at: FULL for at in open_ if at < one}
    share = dice.random()
    return {at: dice.choice((FULL, FULL, HALF, ZEROS)) for at in open_ if dice.random() < share}


def played(recording: Recording, kept: Kept) -> dict[int, Node]:
    nodes = recording.nodes()
    for entry, how in kept:
        match entry:
            case ["name", names, _, _]:
                _name(nodes, names)
            case ["data", inode, at, text] if inode in nodes:
                _write(nodes[inode].data, at, text.encode("latin-1"), how)
            case ["size", inode, size] if inode in nodes:
                del nodes[inode].data[size:]
                nodes[inode].data.extend(bytes(size - len(nodes[inode].data)))
            case ["mode", inode, mode] if inode in nodes:
                nodes[inode].mode = mode
    return nodes


def _name(nodes: dict[int, Node], names: list[tuple[int, str, int]]) -> None:
    for folder, name, inode in names:
        if folder in nodes and inode:
            nodes[folder].names[name] = inode
        elif folder in nodes:
            nodes[folder].names.pop(name, None)


def _write(data: bytearray, at: int, piece: bytes, how: str) -> None:
    piece = piece[: len(piece) // 2] if how == HALF else bytes(len(piece)) if how == ZEROS else piece
    data.extend(bytes(max(0, at - len(data))))
    data[at : at + len(piece)] = piece


# -- put on a disk


def materialise(nodes: dict[int, Node], root: int, home: Path) -> None:
    places: dict[int, Path] = {}
    _make(nodes, root, home, places)
    for inode, path in places.items():
        node = nodes[inode]
        if node.mode is not None and node.kind == "file":
            path.chmod(node.mode)
        if node.mtime_ns is not None and node.kind == "file":
            os.utime(path, ns=(node.mtime_ns, node.mtime_ns))
    _renew_notes(home, nodes, root)


def _make(nodes: dict[int, Node], inode: int, path: Path, places: dict[int, Path]) -> None:
    node = nodes[inode]
    if inode in places:
        if node.kind == "file":  # a folder has two names only where a rename between them was lost
            os.link(places[inode], path)
        return
    places[inode] = path
    if node.kind == "folder":
        path.mkdir()
        for name, below in node.names.items():
            _make(nodes, below, path / name, places)
    elif node.kind == "link":
        path.symlink_to(node.target)
    else:
        path.write_bytes(node.data)


def put_ledger(recording: Recording, home: Path, number: int | None) -> None:
    """The copy of this number in the home; none where the folder it would be in was lost."""
    if number is None or not (home / "state").is_dir():
        return
    for ending in ("", "-wal"):
        kept = recording.ledger.with_name(f"ledger-{number}.sqlite3{ending}")
        if kept.exists():
            shutil.copy(kept, home / "state" / f"ledger.sqlite3{ending}")


def _renew_notes(home: Path, nodes: dict[int, Node], root: int) -> None:
    """A file of the inbox is known by inode and times, which a loss of power does not change, but this drill does."""
    inbox = nodes[nodes[root].names["inbox"]].names
    for note in home.glob("state/jobs/*/origin.json"):
        try:
            name, inode, *_ = json.loads(note.read_bytes())
        except (ValueError, OSError):
            continue
        if inbox.get(name) == inode:
            now = (home / "inbox" / name).lstat()
            note.write_text(json.dumps([name, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns]))
