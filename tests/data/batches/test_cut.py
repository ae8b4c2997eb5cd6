"""A pack cut for context parallelism: nothing lost, nothing twice, the same keys for every query, even work."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megadpo.data.batches.cut import CONTEXT_BALANCE, _cut_in, _work_before, context_part, cut_run
from megadpo.data.batches.pack import PackedBatch, Segment, pack_pairs
from megadpo.data.pairs import TokenizedPair
from tests.data.batches.test_pack import TWO_PAIRS, pack, visible
from tests.data.builders import tokenized_pairs


def parts_of(batch: PackedBatch, size: int) -> list[PackedBatch]:
    return [context_part(batch, rank, size) for rank in range(size)]


def pairs_of_lengths(lengths: list[tuple[int, int, int]]) -> list[TokenizedPair]:
    return [TokenizedPair(i, *(np.ones(n, dtype=np.int32) for n in ns)) for i, ns in enumerate(lengths)]


def query_key_pairs(batch: PackedBatch) -> int:
    return sum(segment.key_tokens - back for segment in batch.segments for back in range(segment.query_tokens))


@given(tokenized_pairs(), st.booleans(), st.integers(1, 4), st.integers(1, 3))
@example(TWO_PAIRS, True, 2, 8)  # padding longer than a block
def test_every_query_is_on_one_rank_and_sees_what_it_saw(
    pairs: list[TokenizedPair], share_prompt: bool, size: int, multiple: int
) -> None:
    whole = pack(pairs, share_prompt=share_prompt, multiple=multiple * size)
    parts = parts_of(whole, size)
    gathered = torch.cat([part.run_index for part in parts])  # what the all-gather lays out, by place in the run
    assert sorted(gathered.tolist()) == list(range(whole.tokens.numel()))
    assert len({part.tokens.numel() for part in parts}) == 1
    for part in parts:
        assert part.tokens.tolist() == whole.tokens[part.run_index].tolist()
        assert part.positions.tolist() == whole.positions[part.run_index].tolist()
        assert (part.run_tokens, part.run_segments) == (whole.tokens.numel(), whole.segments)
        assert part.run_tokens - part.num_tokens == whole.run_tokens - whole.num_tokens
        ends = [0, *(segment.query_end for segment in part.segments)]
        assert [segment.query_start for segment in part.segments] == ends[:-1] and ends[-1] == part.tokens.numel()
        ranges = [pairwise(segment.keys) for segment in part.segments]
        joined = all(before[1] != after[0] for pairs in ranges for before, after in pairs)
        assert joined or size == 1, "neighbours are one range"
        for query, place in enumerate(part.run_index.tolist()):
            assert gathered[visible(part, query)].tolist() == visible(whole, place)


@given(tokenized_pairs(), st.booleans(), st.integers(1, 4))
def test_every_answer_token_is_predicted_on_one_rank(pairs: list[TokenizedPair], share_prompt: bool, size: int) -> None:
    whole = pack(pairs, share_prompt=share_prompt, multiple=size)
    wanted = list(zip(segments_of(whole), whole.predict_index.tolist(), whole.targets.tolist(), strict=True))
    found = []
    for part in parts_of(whole, size):
        places = part.run_index[part.predict_index].tolist()
        assert len(part.segment_targets) == len(whole.segments)
        assert part.answer_tokens.tolist() == whole.answer_tokens.tolist()  # of the whole pack: averages need it
        assert part.paths.tolist() == whole.paths.tolist()
        found += list(zip(segments_of(part), places, part.targets.tolist(), strict=True))
    assert sorted(found) == sorted(wanted)


def segments_of(batch: PackedBatch) -> list[int]:
    """The segment of each target."""
    return np.repeat(np.arange(len(batch.segment_targets)), batch.segment_targets).tolist()


@given(tokenized_pairs(), st.booleans(), st.integers(2, 4))
def test_work_counts_query_key_pairs(pairs: list[TokenizedPair], share_prompt: bool, size: int) -> None:
    whole = pack(pairs, share_prompt=share_prompt, multiple=size)
    work = [query_key_pairs(part) for part in parts_of(whole, size)]
    assert cut_run(whole.segments, size).work.tolist() == work
    for part in parts_of(whole, size):
        assert part.part is not None
        assert (part.part.most_work, part.part.mean_work) == (max(work), pytest.approx(sum(work) / size))


def test_one_long_sequence_is_cut_zigzag() -> None:
    cut = cut_run((Segment(0, 32768, ((0, 32768),)),), 4)
    assert cut.owners == [0, 1, 2, 3, 2, 1, 0]  # the two middle blocks are neighbours
    assert cut.borders == [0, 4096, 8192, 12288, 20480, 24576, 28672, 32768]
    assert cut.imbalance == 1.0


def test_many_short_pairs_are_cut_once_a_rank() -> None:
    """Even where more cuts would be more even still."""
    whole = pack(pairs_of_lengths([(40, 20, 20)] * 66), multiple=4)
    cut = cut_run(whole.segments, 4)
    assert sorted(cut.owners) == [0, 1, 2, 3] and 1 < cut.imbalance < 1.02


@given(tokenized_pairs(), st.booleans(), st.integers(1, 4), st.data())
def test_ranks_hold_as_many_tokens_in_blocks_of_any_number(
    pairs: list[TokenizedPair], share_prompt: bool, size: int, data: st.DataObject
) -> None:
    segments = pack(pairs, share_prompt=share_prompt, multiple=size).segments
    total = segments[-1].query_end
    blocks = size * data.draw(st.integers(1, total // size))
    cut = _cut_in(blocks, total, size, _work_before(segments))
    held = [sum(end - start for start, end in cut.held_by(rank)) for rank in range(size)]
    assert held == [total // size] * size


LENGTHS = st.tuples(st.integers(8, 3000), st.integers(4, 1200), st.integers(4, 1200))


@given(st.lists(LENGTHS, min_size=1, max_size=12), st.booleans(), st.sampled_from([2, 3, 4, 8]))
@example([(30000, 1400, 1368)], True, 8)
@example([(30000, 1400, 1368)], False, 8)
@example([(3000, 4, 4), *[(8, 4, 4)] * 8], True, 8)
def test_no_rank_has_more_than_a_tenth_above_the_mean(
    lengths: list[tuple[int, int, int]], share_prompt: bool, size: int
) -> None:
    whole = pack(pairs_of_lengths(lengths), share_prompt=share_prompt, multiple=2 * size)
    if whole.num_tokens < 64 * size:
        return  # a few tokens a rank: what they are compared by is less than a rounding
    assert cut_run(whole.segments, size).imbalance <= CONTEXT_BALANCE


def test_what_cannot_be_even_is_as_even_as_it_gets() -> None:
    """Two tokens for two ranks: the second sees two keys, the first one."""
    cut = cut_run((Segment(0, 2, ((0, 2),)),), 2)
    assert cut.work.tolist() == [1, 2] or cut.work.tolist() == [2, 1]
    assert cut.imbalance == pytest.approx(4 / 3)


def test_cutting_twice_or_unevenly_is_refused() -> None:
    whole = pack(TWO_PAIRS, multiple=6)
    with pytest.raises(ValueError, match="a part already"):
        context_part(context_part(whole, 0, 2), 0, 2)
    with pytest.raises(ValueError, match="12 tokens is not a multiple of the 5"):
        context_part(whole, 0, 5)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        context_part(whole, 2, 2)
    assert context_part(whole, 0, 1) is whole


def test_padding_alone() -> None:
    whole = pack_pairs([], share_prompt=True, pad_to_multiple=4, pad_token_id=0)
    for part in parts_of(whole, 4):
        assert (part.num_pairs, part.num_tokens, part.tokens.numel()) == (0, 0, 1)
        assert part.predict_index.numel() == part.segment_targets.sum() == 0
