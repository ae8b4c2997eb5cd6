"""Pairs as flat arrays: every id and loss mask comes back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given

from megadpo.data.pairs import FlatPairs, TokenizedPair, largest_id
from tests.data.builders import equal_pairs, ids, tokenized_pairs


@given(tokenized_pairs())
def test_flat_arrays_give_back_every_pair(pairs: list[TokenizedPair]) -> None:
    flat = FlatPairs.of(pairs)
    assert len(flat) == len(pairs) and equal_pairs(flat, pairs)
    assert flat.tokens.dtype == np.int32 and flat.offsets.dtype == np.int64
    assert flat.text_tokens().tolist() == [[p.prompt_tokens, p.chosen_tokens, p.rejected_tokens] for p in pairs]
    answers = [pair.chosen_tokens + pair.rejected_tokens for pair in pairs]
    for prompts, share in ((1, True), (2, False)):
        expected = [prompts * pair.prompt_tokens + answer for pair, answer in zip(pairs, answers, strict=True)]
        assert flat.packed_tokens(share_prompt=share).tolist() == expected
    if pairs:
        assert largest_id(flat.tokens) == max(
            int(text.max()) for p in pairs for text in (p.prompt_ids, p.chosen_ids, p.rejected_ids)
        )


def test_positions_slices_and_views() -> None:
    flat = FlatPairs.of([TokenizedPair(number, ids(3, 0, number), ids(4), ids(5)) for number in range(5)])
    assert flat[-1].index == flat[4].index == 4 and [pair.index for pair in flat[1:3]] == [1, 2]
    assert np.shares_memory(flat[3].prompt_ids, flat.tokens), "a text without a mask is a view, not a copy"
    for outside in (5, -6):
        with pytest.raises(IndexError):
            flat[outside]
