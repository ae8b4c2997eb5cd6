"""Pairs over the limit: refused with their lines, dropped with a count, or cut answers last."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadpo.data.pairs import TokenizedPair
from megadpo.data.sources import Place
from megadpo.data.tokens.chunk import Chunk, OnTooLong, TooLong, apply_limit, truncate
from tests.data.builders import as_lists, equal_pairs, ids, tokenized_pairs

BOS = 99
LONG = TokenizedPair(4, ids(BOS, 1, 2, 3, 4, 5), ids(11, 12, 13), ids(21, 22))
SHORT = TokenizedPair(5, ids(BOS, 1), ids(11), ids(21))


def limit(pairs: list[TokenizedPair], max_tokens: int, on_too_long: OnTooLong, bos_token_id: int | None = BOS) -> Chunk:
    chunk = Chunk(places=[Place("f.jsonl", pair.index + 1, pair.index) for pair in pairs], pairs=pairs)
    apply_limit(chunk, max_tokens, on_too_long, bos_token_id)
    return chunk


@given(tokenized_pairs(), st.integers(3, 20))
def test_no_pair_stays_over_the_limit_and_short_ones_stay_as_they_are(
    pairs: list[TokenizedPair], max_tokens: int
) -> None:
    short = [pair for pair in pairs if pair.longest_sequence_tokens <= max_tokens]
    dropped = limit(pairs, max_tokens, "drop")
    assert equal_pairs(dropped.pairs, short) and dropped.counts["dropped_too_long"] == len(pairs) - len(short)
    cut = limit(pairs, max_tokens, "truncate")
    assert all(pair.longest_sequence_tokens <= max_tokens for pair in cut.pairs)
    masks = [mask for pair in cut.pairs for mask in (pair.chosen_mask, pair.rejected_mask)]
    assert all(mask is None or mask.any() for mask in masks)
    dropped_pairs = cut.counts["dropped_equal_after_truncation"] + cut.counts["dropped_unanswered_after_truncation"]
    assert len(cut.pairs) + dropped_pairs == len(pairs)
    assert cut.counts["truncated"] + dropped_pairs == len(pairs) - len(short)
    assert {tuple(map(str, as_lists(pair))) for pair in short} <= {tuple(map(str, as_lists(p))) for p in cut.pairs}


@given(tokenized_pairs(), st.integers(3, 20))
def test_a_cut_takes_the_prompts_left_before_the_answers_right(pairs: list[TokenizedPair], max_tokens: int) -> None:
    for pair in pairs:
        if pair.longest_sequence_tokens <= max_tokens:
            continue
        cut = truncate(pair, max_tokens, BOS)
        kept_bos = pair.prompt_ids[0] == BOS and pair.prompt_tokens > 1
        body = cut.prompt_ids[1:] if kept_bos else cut.prompt_ids
        assert body.tolist() == pair.prompt_ids[pair.prompt_tokens - len(body) :].tolist() and len(body) >= 1
        assert not kept_bos or cut.prompt_ids[0] == BOS
        if (cut.chosen_tokens, cut.rejected_tokens) != (pair.chosen_tokens, pair.rejected_tokens):
            assert len(body) == 1, "answers are cut only where the prompt has nothing left to give"
        assert cut.chosen_ids.tolist() == pair.chosen_ids[: cut.chosen_tokens].tolist()
        assert cut.longest_sequence_tokens == max_tokens


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (8, (4, [BOS, 2, 3, 4, 5], [11, 12, 13], [21, 22])),
        (5, (4, [BOS, 5], [11, 12, 13], [21, 22])),
        (4, (4, [BOS, 5], [11, 12], [21, 22])),
        (3, (4, [BOS, 5], [11], [21])),
    ],
)
def test_truncation_written_out(max_tokens: int, expected: tuple[int, list[int], list[int], list[int]]) -> None:
    assert as_lists(truncate(LONG, max_tokens, BOS)) == expected


def test_without_bos_only_the_end_of_the_prompt_stays() -> None:
    assert truncate(LONG, 6, None).prompt_ids.tolist() == [3, 4, 5]
    alone = TokenizedPair(0, ids(BOS), ids(11, 12, 13), ids(21))
    assert as_lists(truncate(alone, 3, BOS)) == (0, [BOS], [11, 12], [21])


def test_refusal_names_the_lines_and_the_need() -> None:
    found = TooLong(8)
    found.add(limit([SHORT, LONG], 8, "refuse").too_long)
    (problem,) = found.problems()
    assert problem.where == "f.jsonl:5" and "9 tokens" in str(problem.value) and "at most 8" in problem.expected
    assert "needs 9" in problem.fix and "on_too_long" in problem.fix
    within = limit([SHORT, LONG], 9, "refuse")
    assert within.too_long == [] and equal_pairs(within.pairs, [SHORT, LONG])


def test_refusal_is_bounded_but_counts_all() -> None:
    found = TooLong(8)
    for _ in range(5):
        found.add(limit([LONG] * 100, 8, "refuse").too_long)
    assert len(found.problems()) == 20 and "500 such pairs" in found.problems()[0].fix


def test_lines_of_rows_that_no_pair_was_read_from_are_zero() -> None:
    chunk = Chunk(places=[Place("f.jsonl", line, row) for line, row in ((5, 2), (9, 4))])
    assert chunk.first_row == 2 and chunk.lines().tolist() == [5, 0, 9]


def test_a_pair_whose_answers_the_cut_makes_equal_is_dropped_and_counted() -> None:
    pair = TokenizedPair(1, ids(1), ids(7, 7, 7, 1), ids(7, 7, 7, 2))
    cut = limit([pair, SHORT], 4, "truncate")
    assert equal_pairs(cut.pairs, [SHORT])
    assert cut.counts == {"dropped_equal_after_truncation": 1}


def test_a_limit_too_small_for_anything_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        limit([SHORT], 2, "drop")


def test_a_cut_keeps_masks_and_drops_a_pair_that_loses_its_turns_in_the_loss() -> None:
    def pair(first: int) -> TokenizedPair:
        mask = np.arange(6) >= first
        return TokenizedPair(0, ids(1, 2), ids(*range(10, 16)), ids(*range(20, 26)), mask, None)

    cut = limit([pair(2), pair(4)], 5, "truncate", bos_token_id=None)
    assert cut.counts == {"truncated": 1, "dropped_unanswered_after_truncation": 1}
    assert cut.pairs[0].chosen_mask is not None and cut.pairs[0].rejected_mask is None
    assert cut.pairs[0].chosen_mask.tolist() == [False, False, True, True]
    assert cut.pairs[0].chosen_ids.tolist() == [10, 11, 12, 13]
