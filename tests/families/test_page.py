"""docs/families.md says what the tests of families hold."""

from __future__ import annotations

from tests.families.page import PAGE, with_families


def test_the_table_of_families_is_that_of_the_cases() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == with_families(written), "write it anew: python -m tests.families.page"
