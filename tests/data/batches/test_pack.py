"""A pack must show every answer token exactly prompt + the answer so far, at positions 0, 1, 2, ..."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megadpo.config.problems import DataError
from megadpo.data.batches.pack import PackedBatch, Segment, pack_pairs
from megadpo.data.pairs import FlatPairs, TokenizedPair
from tests.data.builders import ids, tokenized_pairs

TWO_PAIRS = [TokenizedPair(7, ids(1, 2, 3), ids(4, 5), ids(6)), TokenizedPair(9, ids(8), ids(9, 10), ids(11, 12, 13))]
PAD = 0


def visible(batch: PackedBatch, query: int) -> list[int]:
    """Where in the run the keys stand that this query sees, by the definition of a segment."""
    segment = next(s for s in batch.segments if s.query_start <= query < s.query_end)
    keys = [place for start, end in segment.keys for place in range(start, end)]
    return keys[: len(keys) - (segment.query_end - 1 - query)]


def answers_of(batch: PackedBatch) -> list[list[tuple[list[int], int]]]:
    """For each answer, for each of its tokens in the loss: the tokens that its prediction sees, and the token."""
    predicted = [
        (batch.tokens[visible(batch, query)].tolist(), target)
        for query, target in zip(batch.predict_index.tolist(), batch.targets.tolist(), strict=True)
    ]
    counts = batch.segment_targets.tolist()
    of_segments = [predicted[end - count : end] for end, count in zip(accumulate(counts), counts, strict=True)]
    return [[one for segment in path for one in of_segments[segment]] for path in paths_of(batch)]


def paths_of(batch: PackedBatch) -> list[list[int]]:
    """The segments that each answer goes through."""
    return [path.tolist() for path in batch.paths.split(batch.path_segments.tolist())] if batch.num_answers else []


def expected_answers(pairs: list[TokenizedPair]) -> list[list[tuple[list[int], int]]]:
    return [
        [
            (pair.prompt_ids.tolist() + answer.tolist()[:number], int(token))
            for number, token in enumerate(answer)
            if mask is None or mask[number]
        ]
        for pair in pairs
        for answer, mask in ((pair.chosen_ids, pair.chosen_mask), (pair.rejected_ids, pair.rejected_mask))
    ]


def pack(pairs: list[TokenizedPair], *, share_prompt: bool = True, multiple: int = 1) -> PackedBatch:
    return pack_pairs(pairs, share_prompt=share_prompt, pad_to_multiple=multiple, pad_token_id=PAD)


@given(tokenized_pairs(), st.booleans(), st.integers(1, 16))
def test_each_answer_token_is_predicted_from_prompt_and_answer_so_far(
    pairs: list[TokenizedPair], share_prompt: bool, multiple: int
) -> None:
    batch = pack(pairs, share_prompt=share_prompt, multiple=multiple)
    assert answers_of(batch) == expected_answers(pairs)
    assert batch.segment_targets.sum() == len(batch.targets)
    assert batch.answer_tokens.tolist() == [len(answer) for answer in expected_answers(pairs)]
    assert batch.pair_indices.tolist() == [pair.index for pair in pairs]


@given(tokenized_pairs(), st.booleans(), st.integers(1, 16))
def test_every_query_sees_its_own_sequence_from_position_zero(
    pairs: list[TokenizedPair], share_prompt: bool, multiple: int
) -> None:
    batch = pack(pairs, share_prompt=share_prompt, multiple=multiple)
    for query in range(batch.tokens.numel()):
        seen = visible(batch, query)
        assert seen[-1] == query
        assert batch.positions[seen].tolist() == list(range(len(seen)))


@given(tokenized_pairs(), st.booleans(), st.integers(1, 16))
def test_segments_cover_the_run_in_order_and_padding_is_the_last(
    pairs: list[TokenizedPair], share_prompt: bool, multiple: int
) -> None:
    batch = pack(pairs, share_prompt=share_prompt, multiple=multiple)
    ends = [0, *(segment.query_end for segment in batch.segments)]
    assert [segment.query_start for segment in batch.segments] == ends[:-1]
    assert ends[-1] == batch.tokens.numel() == batch.positions.numel()
    padding_tokens = batch.run_tokens - batch.num_tokens
    assert ends[-1] % multiple == 0 and padding_tokens <= (multiple if not pairs else multiple - 1)
    assert batch.num_tokens == FlatPairs.of(pairs).packed_tokens(share_prompt=share_prompt).sum()
    assert all(segment.keys[-1][1] == segment.query_end for segment in batch.segments)
    per_pair = 3 if share_prompt else 2
    assert len(batch.segments) == per_pair * len(pairs) + bool(padding_tokens)
    if padding_tokens:
        assert batch.segments[-1] == Segment(
            batch.num_tokens, batch.tokens.numel(), ((batch.num_tokens, batch.tokens.numel()),)
        )
        assert set(batch.tokens[batch.num_tokens :].tolist()) == {PAD}


@given(tokenized_pairs())
def test_a_shared_prompt_changes_the_layout_but_no_answer(pairs: list[TokenizedPair]) -> None:
    shared, repeated = pack(pairs, share_prompt=True), pack(pairs, share_prompt=False)
    assert answers_of(shared) == answers_of(repeated)
    assert repeated.num_tokens - shared.num_tokens == sum(pair.prompt_tokens for pair in pairs)
    # every token of every text stands in the run as often as the layout says
    texts = sorted(t for p in pairs for text in (p.prompt_ids, p.chosen_ids, p.rejected_ids) for t in text.tolist())
    assert sorted(shared.tokens[: shared.num_tokens].tolist()) == texts


def test_a_shared_pack_written_out() -> None:
    batch = pack(TWO_PAIRS, multiple=8)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, PAD, PAD, PAD, PAD]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2, 1, 2, 3, 0, 1, 2, 3]
    assert batch.segments == (
        Segment(0, 3, ((0, 3),)),
        Segment(3, 5, ((0, 3), (3, 5))),
        Segment(5, 6, ((0, 3), (5, 6))),
        Segment(6, 7, ((6, 7),)),
        Segment(7, 9, ((6, 7), (7, 9))),
        Segment(9, 12, ((6, 7), (9, 12))),
        Segment(12, 16, ((12, 16),)),
    )
    assert batch.predict_index.tolist() == [2, 3, 2, 6, 7, 6, 9, 10]
    assert batch.targets.tolist() == [4, 5, 6, 9, 10, 11, 12, 13]
    assert batch.segment_targets.tolist() == [0, 2, 1, 0, 2, 3, 0]
    assert paths_of(batch) == [[0, 1], [0, 2], [3, 4], [3, 5]]
    assert batch.answer_tokens.tolist() == [2, 1, 2, 3]
    assert (batch.num_pairs, batch.num_tokens, batch.run_tokens) == (2, 12, 16)
    assert batch.segments[5].query_tokens == 3 and batch.segments[5].key_tokens == 4


def test_all_tensors_are_int64_even_with_no_pairs() -> None:
    for batch in (pack(TWO_PAIRS), pack([], multiple=4)):
        tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        assert len(tensors) == 10 and {tensor.dtype for tensor in tensors} == {torch.int64}


def test_a_pack_of_no_pairs_is_padding_only() -> None:
    batch = pack([], multiple=6)
    assert batch.tokens.tolist() == [PAD] * 6 and batch.segments == (Segment(0, 6, ((0, 6),)),)
    assert batch.num_tokens == batch.num_pairs == batch.targets.numel() == batch.answer_tokens.numel() == 0


def test_to_moves_every_tensor_and_keeps_the_rest() -> None:
    batch = pack(TWO_PAIRS, multiple=8)
    moved = batch.to("meta")
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert getattr(moved, name).device.type == "meta" and getattr(moved, name).shape == value.shape
        else:
            assert getattr(moved, name) == value
    same = batch.to(torch.device("cpu"))
    assert all(torch.equal(getattr(same, n), v) for n, v in vars(batch).items() if isinstance(v, torch.Tensor))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_to_cuda_brings_the_same_numbers() -> None:
    batch = pack(TWO_PAIRS, multiple=8)
    moved = batch.to("cuda")
    torch.cuda.synchronize()
    assert all(torch.equal(getattr(moved, n).cpu(), v) for n, v in vars(batch).items() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "what"),
    [(ids(), ids(1), ids(2), "prompt"), (ids(1), ids(), ids(2), "chosen"), (ids(1), ids(2), ids(), "rejected")],
)
def test_a_text_without_tokens_is_refused_by_name(prompt, chosen, rejected, what: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match=f"pair 5: .*{what}"):
        pack([TWO_PAIRS[0], TokenizedPair(5, prompt, chosen, rejected)])


def test_an_answer_without_tokens_in_the_loss_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="pair 5: .*rejected"):
        pack([TokenizedPair(5, ids(1), ids(2), ids(3, 4), None, np.zeros(2, dtype=bool))])


def test_tokens_outside_the_loss_stand_in_the_run_and_are_not_predicted() -> None:
    mask = np.array([False, True, False])
    batch = pack([TokenizedPair(0, ids(1), ids(4, 5, 6), ids(7), mask, None)])
    assert batch.tokens.tolist() == [1, 4, 5, 6, 7]
    assert batch.predict_index.tolist() == [1, 0] and batch.targets.tolist() == [5, 7]
    assert batch.segment_targets.tolist() == [0, 1, 1] and batch.answer_tokens.tolist() == [1, 1]


def test_a_multiple_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="pad_to_multiple"):
        pack(TWO_PAIRS, multiple=0)


@given(tokenized_pairs(), st.booleans())
def test_tokens_behind_the_shorter_answer_weigh_less(pairs: list[TokenizedPair], share_prompt: bool) -> None:
    batch = pack_pairs(pairs, share_prompt=share_prompt, pad_to_multiple=1, pad_token_id=PAD, tail_weight=0.25)
    assert batch.token_weights is not None and pack(pairs).token_weights is None
    expected = []
    for chosen, rejected in batch.answer_tokens.reshape(-1, 2).tolist():
        shared = min(chosen, rejected)
        for count in (chosen, rejected):
            expected += [1.0] * shared + [0.25] * (count - shared)
    assert batch.token_weights.tolist() == expected
