"""What is looked at before a daemon touches anything."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import pytest

from longrun import compose

if TYPE_CHECKING:
    from longrun.home import Home


def test_a_python_without_the_packages_is_told_before_anything_is_begun(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    before = sorted(home.root.rglob("*"))
    with pytest.raises(ModuleNotFoundError, match=f"{sys.executable} has no module torch"):
        compose.run(home, {})
    assert sorted(home.root.rglob("*")) == before
