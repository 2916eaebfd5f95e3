from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from longrun import requests

if TYPE_CHECKING:
    from longrun.home import Home


def test_a_request_stays_until_it_is_taken_back(home: Home) -> None:
    assert requests.pending(home, requests.PAUSE) is None
    requests.make(home, requests.PAUSE)
    for _ in range(2):
        assert set(requests.pending(home, requests.PAUSE) or {}) == {"asked_at"}
    assert requests.clear(home, requests.PAUSE)
    assert requests.pending(home, requests.PAUSE) is None
    assert not requests.clear(home, requests.PAUSE)


def test_a_request_carries_what_it_is_for(home: Home) -> None:
    requests.make(home, requests.SKIP, job=7)
    requests.make(home, requests.STOP, now=True)
    assert (requests.pending(home, requests.SKIP) or {})["job"] == 7
    assert (requests.pending(home, requests.STOP) or {})["now"] is True


def test_a_request_of_another_user_was_made_though_it_cannot_be_read(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests.make(home, requests.PAUSE)

    def refused(_: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_bytes", refused)
    assert requests.made(home) == {requests.PAUSE: {}}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"7", b"\xff"])
def test_a_request_that_cannot_be_read_was_still_made(home: Home, content: bytes) -> None:
    (home.requests / requests.STOP).write_bytes(content)
    assert requests.pending(home, requests.STOP) == {}
