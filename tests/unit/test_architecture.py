"""The shape of the package, as data: what may import what, and where files may be moved and deleted."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "longrun"

# From the ground up, within a floor too: a module imports only what stands before it.
FLOORS = {
    "values": ["wording", "errors", "job", "plan", "lineage", "rows", "wire", "manifest", "retention"],
    "disk facts": [
        "home",
        "disk",
        "locks",
        "config",
        "jsonl",
        "examine",
        "checkpoint",
        "ledger",
        "archive",
        "missing",
        "by_hand",
        "requests",
        "status",
        "replacing",
        "source",
        "store",
        "backups",
        "transfer",
    ],
    "pulse": ["process", "journal", "notify", "inbox", "worker"],
    "loop": ["context", "fitting", "blame", "preparation", "runs", "recovery", "scheduled", "loop"],
    "programs": ["compose", "commands", "doctor", "demo", "backup_commands"],
}
ORDER = [module for floor in FLOORS.values() for module in floor]

# training/ stands on the ground floors beside the daemon; of the pulse it takes only process and the clock in journal.
FOR_TRAINING = {*FLOORS["values"], *FLOORS["disk facts"], "process", "journal", "training"} - {
    "ledger",
    "archive",
    "requests",
    "source",
    "store",
    "backups",
    "transfer",
}

HEAVY = {"torch", "transformers", "datasets", "accelerate", "trl", "numpy", "pyarrow", "safetensors", "tokenizers"}

# Calls that rename, delete, link, sync or overwrite. What another process may read is touched only in disk.py.
OF_PATHS = {"rename", "unlink", "rmdir", "symlink_to", "hardlink_to", "write_text", "write_bytes"}
OF_MODULES = {
    "os": OF_PATHS | {"replace", "remove", "link", "symlink", "fsync", "fdatasync", "sync", "truncate", "ftruncate"},
    "shutil": {"move", "rmtree", "copy", "copy2", "copyfile", "copytree"},
}
# (module, call): why it may.
ALLOWED = {
    ("checkpoint", "write_text"): "into the staging folder, which only its worker reads before the commit",
    ("wire", "unlink"): "the socket of a former daemon",
    ("locks", "ftruncate"): "a lock's note, which only says who holds it",
    ("demo", "copy"): "a drop into the inbox, as a person makes one with cp",
    ("demo", "write_text"): "the settings of a home that nobody uses yet",
    ("training/prepare", "write_text"): "into a folder that is renamed when it is complete",
    ("training/metrics", "rename"): "the curves of a former lineage: nothing depends on them",
    ("training/metrics", "write_text"): "whose curves these are: nothing depends on it",
}

MODULES = {
    str(path.relative_to(PACKAGE).with_suffix("")): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
}
OUTSIDE_TRAINING = {
    name: tree for name, tree in MODULES.items() if not name.startswith("training/") and name != "__init__"
}


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all modules imported anywhere in the tree, for types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = str(node.module)
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "longrun" else [module]


def own_imports(tree: ast.AST) -> set[str]:
    """Modules of the package that are imported; __version__ is not one."""
    names = {name.split(".")[1] for name in imports(tree) if name.startswith("longrun.")}
    return {name for name in names if not name.startswith("__")}


# -- imports


@pytest.mark.parametrize("module", OUTSIDE_TRAINING)
def test_imports_point_down(module: str) -> None:
    assert module in ORDER, f"{module} has no floor: give it a place in FLOORS"
    above = own_imports(OUTSIDE_TRAINING[module]) - set(ORDER[: ORDER.index(module)])
    assert not above, f"{module} imports {above}, which do not stand below it"


def test_every_module_on_a_floor_exists() -> None:
    assert set(ORDER) == OUTSIDE_TRAINING.keys()


@pytest.mark.parametrize("module", OUTSIDE_TRAINING)
def test_only_training_imports_what_is_heavy(module: str) -> None:
    assert not HEAVY & {name.split(".")[0] for name in imports(OUTSIDE_TRAINING[module])}


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("training/")])
def test_training_knows_nothing_of_the_daemon(module: str) -> None:
    assert own_imports(MODULES[module]) <= FOR_TRAINING


def loaded_by(statement: str) -> set[str]:
    """Names of all modules that a fresh interpreter has loaded after this statement."""
    program = f"import sys; sys.argv = ['daemon.py', 'status']; {statement}; print(*sys.modules)"
    command = [sys.executable, "-c", program]
    bare = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    said = subprocess.run(command, cwd=REPOSITORY, env=bare, check=True, capture_output=True, text=True).stdout
    return set(said.split())


def test_status_stands_on_the_standard_library_and_little_else() -> None:
    loaded = loaded_by("import daemon; from longrun import commands")
    own = {name.removeprefix("longrun.") for name in loaded if name.startswith("longrun.")}
    assert own == {"commands", "disk", "errors", "home", "locks", "requests", "status", "wording"}
    assert not loaded & {*HEAVY, "watchdog", "sqlite3", "tqdm", "zstandard"}


def test_the_daemon_starts_without_what_is_heavy() -> None:
    loaded = loaded_by("import longrun.compose")
    assert "longrun.loop" in loaded
    assert not loaded & HEAVY


# -- pickles: whoever reads one runs what it says

PICKLES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
LOADERS = {"torch", "np", "numpy"}


@pytest.mark.parametrize("module", MODULES)
def test_no_pickle_is_read(module: str) -> None:
    assert not PICKLES & {name.split(".")[0] for name in imports(MODULES[module])}
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            assert owner not in LOADERS, f"{module}.py:{node.lineno}: what the Trainer loads, it loads guarded"


# -- the durable seam


def touches(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Calls that change what is on disk without going through disk.py, each with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if node.func.attr in OF_MODULES.get(owner, set() if owner == "disk" else OF_PATHS):
                yield node.func.attr, node.lineno


@pytest.mark.parametrize("module", MODULES)
def test_nothing_else_renames_syncs_or_deletes(module: str) -> None:
    if module != "disk":
        found = [
            f"{module}.py:{line} {call}" for call, line in touches(MODULES[module]) if (module, call) not in ALLOWED
        ]
        assert not found, f"{found}: use longrun/disk.py, or add it to ALLOWED with the reason"


def test_every_exception_is_still_needed() -> None:
    needed = {(module, call) for module, tree in MODULES.items() for call, _ in touches(tree)}
    assert set(ALLOWED) <= needed


def test_every_call_of_the_seam_is_used() -> None:
    """A durable operation that nobody calls would be drilled for nothing."""
    offered = {node.name for node in MODULES["disk"].body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"}
    used = {
        node.attr
        for tree in MODULES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "disk"
    }
    within = {node.id for node in ast.walk(MODULES["disk"]) if isinstance(node, ast.Name)}
    assert offered <= used | within


# -- errors


@pytest.mark.parametrize("module", MODULES)
def test_no_error_is_swallowed_unseen(module: str) -> None:
    """Saying nothing is right only to an error of which one knows what it means."""
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ExceptHandler) and all(isinstance(step, ast.Pass) for step in node.body):
            known = isinstance(node.type, ast.Name) and node.type.id not in {"Exception", "BaseException", "OSError"}
            assert known, f"{module}.py:{node.lineno}"


def test_the_sentence_about_steps_is_written_once() -> None:
    written = [name for name, tree in MODULES.items() for text in _texts(tree) if "This file will train for" in text]
    assert written == ["plan"]


def _texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
