"""That the table of planted faults has not rotted; `python -m tests.drills.planted` plants them."""

from __future__ import annotations

import ast

import pytest

from tests.drills.planted import FAULTS, REPOSITORY


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_has_its_place_and_a_test(fault):
    ast.parse(fault.planted_in((REPOSITORY / fault.file).read_text()))
    file, _, test = f"tests/{fault.test}".partition("::")
    assert f"def {test.partition('[')[0]}(" in (REPOSITORY / file).read_text() or not test
