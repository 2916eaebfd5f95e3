from __future__ import annotations

import pytest

from longrun.wording import counted


@pytest.mark.parametrize(("count", "told"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (20_000, "20000 rows")])
def test_one_row_is_not_told_as_many(count, told):
    assert counted(count, "row") == told
