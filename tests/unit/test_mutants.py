"""The list of mutants keeps up with the code."""

from __future__ import annotations

import pytest

from tests.mutants import MUTANTS, ROOT, Mutant, describe


@pytest.mark.parametrize("mutant", MUTANTS, ids=describe)
def test_the_line_that_a_mutant_changes_is_there_once(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.before) == 1
    assert mutant.before != mutant.after
    for name in mutant.tests.split():
        assert (ROOT / "tests" / "unit" / name).exists()
