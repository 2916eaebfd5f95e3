from __future__ import annotations

import pytest

from longrun.wording import counted, unpinned


@pytest.mark.parametrize(("count", "told"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (20_000, "20000 rows")])
def test_one_row_is_not_told_as_many(count, told):
    assert counted(count, "row") == told


def test_a_pinned_name_is_known_without_its_commit() -> None:
    assert unpinned("org/name@0123abc") == "org/name"
    assert unpinned("/models/a@b") == "/models/a@b"
    assert unpinned("tiny") == "tiny"
