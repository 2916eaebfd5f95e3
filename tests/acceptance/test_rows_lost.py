"""The benchmark that the README begins with, for the one line of it that must never change."""

from __future__ import annotations

from bench import rows_lost


def test_longrun_loses_no_row_and_goes_on_with_all_that_the_optimizer_knows(tmp_path):
    results = tmp_path / "RESULTS.md"
    assert rows_lost.main(["--only", "Longrun", "--rounds", "1", "--results", str(results)]) == 0
    (line,) = [line for line in results.read_text().splitlines() if line.startswith("| Longrun |")]
    assert line.startswith("| Longrun | 0 | 0 | 35 of 35 | 1.00 1.00 1.00 1.00 1.00 | 0 5 13 21 34 | on from step ")
