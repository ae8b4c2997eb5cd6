"""Ids with their loss masks in one array."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megadpo.data.pairs import largest_id, with_mask, without_mask
from tests.data.builders import ids


@given(st.data(), st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9))
def test_what_is_kept_in_one_array_comes_back(data: Any, tokens: list[int]) -> None:
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens))), dtype=bool)
    stored = with_mask(ids(*tokens), mask)
    back, back_mask = without_mask(stored)
    assert back.tolist() == tokens and back.dtype == stored.dtype == np.int32
    assert back_mask is None if mask.all() else back_mask is not None and back_mask.tolist() == mask.tolist()
    assert largest_id(stored) == max(tokens)


def test_without_a_mask_nothing_is_copied() -> None:
    tokens = ids(3, 0, 7)
    assert with_mask(tokens, None) is tokens and without_mask(tokens)[0] is tokens
