"""Answers that begin alike: what is found, what a pack makes of it, and that every answer stays what it is."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadpo.data.batches import prefixes
from megadpo.data.batches.cut import context_part
from megadpo.data.batches.groups import PairGroups, deal_groups
from megadpo.data.batches.pack import PackedBatch, Segment, pack_pairs
from megadpo.data.batches.prefixes import LEAST_TOKENS, PathPiece
from megadpo.data.chosen import ChosenPairs
from megadpo.data.pairs import FlatPairs, TokenizedPair
from tests.data.batches.test_groups import MODEL, dataset, loader, random_ids
from tests.data.batches.test_pack import answers_of, expected_answers, paths_of, visible
from tests.data.builders import branching_pairs, ids, pairs_that_begin_alike


def packed(pairs: list[TokenizedPair], multiple: int = 1) -> PackedBatch:
    groups = PairGroups.of(FlatPairs.of(pairs))
    return pack_pairs(pairs, share_prompt=True, pad_to_multiple=multiple, pad_token_id=0, groups=groups)


def of_answers(*answers: np.ndarray, prompt: np.ndarray | None = None) -> list[TokenizedPair]:
    """All pairs of them."""
    prompt = ids(1, 2) if prompt is None else prompt
    return [TokenizedPair(row, prompt, a, b) for row, (a, b) in enumerate(combinations(answers, 2))]


def begun(length: int, *rest: int) -> np.ndarray:
    return np.concatenate([np.full(length, 7, np.int32), ids(*rest)])


def test_a_tree_written_out() -> None:
    pairs = pairs_that_begin_alike()
    groups = PairGroups.of(FlatPairs.of(pairs))
    # 6 answers, 2 prompts; then what a and b share, below what c shares with them, and what the last two share
    tree = groups.tree
    assert groups.answers.tolist() == [[0, 1], [2, 3], [4, 5]] and tree.num_answers == 6
    assert [tree.path(answer) for answer in range(6)] in (
        [[6, 8, 9, 0], [6, 8, 9, 1], [6, 8, 2], [6, 3], [7, 10, 4], [7, 10, 5]],
        [[6, 9, 10, 0], [6, 9, 10, 1], [6, 9, 2], [6, 3], [7, 8, 4], [7, 8, 5]],
    )
    ends = [[int(tree.ends[node]) for node in tree.path(answer)] for answer in range(6)]
    assert ends == [[9, 27, 44, 47], [9, 27, 44, 49], [9, 27, 31], [9, 15], [3, 23, 24], [3, 23, 27]]
    assert tree.tokens == 9 + 18 + 17 + 3 + 5 + 4 + 6 + 3 + 20 + 1 + 4
    assert groups.prompt_tokens.tolist() == [9, 9, 3] and groups.answer_tokens.tolist() == [[38, 40], [22, 6], [21, 24]]
    assert groups.pair_tokens.tolist() == [9 + 35 + 3 + 5, 9 + 22 + 6, 3 + 20 + 1 + 4]


def test_a_pack_written_out() -> None:
    batch = packed(pairs_that_begin_alike(), multiple=16)
    assert batch.segments == (
        Segment(0, 9, ((0, 9),)),
        Segment(9, 27, ((0, 9), (9, 27))),
        Segment(27, 44, ((0, 9), (9, 27), (27, 44))),
        Segment(44, 47, ((0, 9), (9, 27), (27, 44), (44, 47))),
        Segment(47, 52, ((0, 9), (9, 27), (27, 44), (47, 52))),
        Segment(52, 56, ((0, 9), (9, 27), (52, 56))),
        Segment(56, 62, ((0, 9), (56, 62))),
        Segment(62, 85, ((62, 85),)),  # nobody but these two goes on from the prompt
        Segment(85, 86, ((62, 85), (85, 86))),
        Segment(86, 90, ((62, 85), (86, 90))),
        Segment(90, 96, ((90, 96),)),
    )
    assert paths_of(batch) == [[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 5], [0, 6], [7, 8], [7, 9]]
    assert batch.positions[47:57].tolist() == [44, 45, 46, 47, 48, 27, 28, 29, 30, 9]
    assert batch.segment_targets.tolist() == [0, 12, 13, 1, 3, 3, 6, 20, 1, 4, 0]
    assert batch.answer_tokens.tolist() == [26, 28, 15, 6, 21, 24]
    assert (batch.num_tokens, batch.run_tokens, batch.num_answers) == (90, 96, 6)
    assert batch.predict_index[batch.segment_targets.cumsum(0)[6]].item() == 64, "the prompt's last, in its own segment"


@given(branching_pairs(), st.integers(1, 16))
def test_every_answer_is_predicted_from_its_own_sequence(pairs: list[TokenizedPair], multiple: int) -> None:
    batch = packed(pairs, multiple)
    expected = expected_answers(pairs)
    found = answers_of(batch)
    for number, answers in enumerate(batch.pairs.tolist()):
        for side, answer in enumerate(answers):
            assert found[answer] == expected[2 * number + side]
            assert batch.answer_tokens[answer] == len(found[answer])
    for query in range(batch.num_tokens):
        seen = visible(batch, query)
        assert seen[-1] == query and batch.positions[seen].tolist() == list(range(len(seen)))


@given(branching_pairs())
def test_tokens_and_work_are_those_of_the_pack(pairs: list[TokenizedPair]) -> None:
    groups, batch = PairGroups.of(FlatPairs.of(pairs)), packed(pairs)
    positions = np.arange(len(pairs))
    (tokens,), (work,) = groups.totals(positions, np.zeros(len(pairs), np.int64), 1, MODEL)
    assert tokens == groups.tree.tokens == batch.num_tokens
    assert groups.pair_tokens.tolist() == [
        pack_pairs([pair], share_prompt=True, pad_to_multiple=1, pad_token_id=0, groups=groups.at(positions[n : n + 1]))
        .num_tokens
        for n, pair in enumerate(pairs)
    ]  # fmt: skip
    seen = [s.key_tokens - back for s in batch.segments for back in range(s.query_tokens)] if pairs else []
    keys = 5 * sum(seen) + 2 * sum(min(keys, 6) for keys in seen)
    answer_tokens = tokens - sum(len(prompt) for prompt in {tuple(pair.prompt_ids.tolist()) for pair in pairs})
    assert work == 16 * (3000 * tokens + 500 * answer_tokens + keys) // 3000


@given(branching_pairs())
def test_nothing_longer_than_a_few_tokens_is_computed_twice(pairs: list[TokenizedPair]) -> None:
    """Of two answers with one prompt, that the other begins alike is seen; and no piece that is shared is a short one."""
    groups = PairGroups.of(FlatPairs.of(pairs))
    tree = groups.tree
    if (
        tree.tokens
        == PairGroups.made(groups.prompts, groups.answers, groups.prompt_tokens, groups.answer_tokens).tree.tokens
    ):
        return  # less than LEAST_SHARE
    inner = np.arange(tree.num_answers + groups.num_prompts, len(tree.ends))
    assert (tree.sizes(inner) >= LEAST_TOKENS).all() and (tree.sizes(np.arange(tree.num_answers)) > 0).all()
    for pair, answers in zip(pairs, groups.answers.tolist(), strict=True):
        stored = [np.where(True if mask is None else mask, text, ~text) for text, mask in pair.answers]
        most = min(map(len, stored)) - 1
        common = next((n for n in range(most) if stored[0][n] != stored[1][n]), most)
        one, other = (tree.path(answer) for answer in answers)
        together = tree.ends[max(set(one) & set(other), key=lambda node: tree.ends[node])] - pair.prompt_tokens
        assert together <= common < together + LEAST_TOKENS


def test_where_masks_differ_answers_part() -> None:
    one, other = begun(60, 8), begun(60, 9)
    mask = np.ones(61, dtype=bool)
    mask[40] = False
    (pair,) = of_answers(one, other)
    assert PairGroups.of(FlatPairs.of([pair])).pair_tokens == 2 + 60 + 1 + 1
    assert PairGroups.of(FlatPairs.of([replace(pair, chosen_mask=mask)])).pair_tokens == 2 + 40 + 21 + 21


@pytest.mark.parametrize(("common", "pieces"), [(LEAST_TOKENS - 1, 0), (LEAST_TOKENS, 1)])
def test_few_tokens_in_common_are_left_alone(common: int, pieces: int) -> None:
    pairs = of_answers(begun(common, 8), begun(common, 9))
    tree = PairGroups.of(FlatPairs.of(pairs)).tree
    assert len(tree.ends) == 3 + pieces
    # below a piece that is shared, the same
    nested = of_answers(begun(40, *[5] * common, 8), begun(40, *[5] * common, 9), begun(40, 6))
    assert len(PairGroups.of(FlatPairs.of(nested)).tree.ends) == 4 + 1 + pieces


@pytest.mark.parametrize(("others", "found"), [(1000 - 64, True), (1001 - 64, False)])
def test_a_data_set_in_which_they_save_little_is_left_alone(others: int, found: bool) -> None:
    """20 tokens of 1,000 are saved, or of one more."""
    rng = np.random.default_rng(0)
    pair = of_answers(begun(20, 8), begun(20, 9))[0]  # 2 + 21 + 21 tokens
    rest = TokenizedPair(1, random_ids(rng, 20), random_ids(rng, 20), random_ids(rng, others - 20))
    tree = PairGroups.of(FlatPairs.of([pair, rest])).tree
    assert (len(tree.ends) == 4 + 2 + 1) is found


def test_an_answer_that_another_begins_with() -> None:
    pairs = of_answers(begun(30), begun(30, 5, 6), begun(29, 5))
    assert packed(pairs[:1]).num_tokens == 2 + 29 + 1 + 3, "each keeps a token of its own"
    batch = packed(pairs)
    assert batch.num_tokens == 2 + 29 + 1 + 3 + 1
    assert [found[-1] for found in answers_of(batch)] == [found[-1] for found in expected_answers(pairs)[:2]] + [
        expected_answers(pairs)[3][-1]
    ]


def test_only_what_a_pack_shares_is_apart() -> None:
    """Of a tree of four answers, a pack of two has the pieces of these two."""
    pairs = pairs_that_begin_alike()[:2]
    pairs += [TokenizedPair(2, pairs[0].prompt_ids, pairs[0].chosen_ids, pairs[1].rejected_ids, pairs[0].chosen_mask)]
    groups = PairGroups.of(FlatPairs.of(pairs))
    for number, expected in ((0, [(44, 3), (0, 5)]), (1, [(9, 22), (0, 6)]), (2, [(9, 38), (0, 6)])):
        one = groups.at(np.array([number]))
        batch = pack_pairs([pairs[number]], share_prompt=True, pad_to_multiple=1, pad_token_id=0, groups=one)
        first, *rest = (segment.query_tokens for segment in batch.segments)
        assert [(first, rest[0]), (0, rest[1])] == expected
    assert groups.tree.pieces([3]) == {3: [PathPiece(3, 0, 15)]}


def test_texts_of_several_sets() -> None:
    some, others = dataset(pairs_that_begin_alike()), dataset(pairs_that_begin_alike(seed=1))
    both = ChosenPairs.of([some, others], [np.array([2, 0]), np.array([1, 2])])
    flat = FlatPairs.of(list(both))
    texts = np.flatnonzero(both.text_tokens().ravel() > 4)
    assert len(texts) < 12
    assert (both.first_tokens(texts, 4) == flat.first_tokens(texts, 4)).all()
    for number in range(12):
        assert both.text(number).tolist() == flat.text(number).tolist()
    assert PairGroups.of(both).tree.tokens == PairGroups.of(flat).tree.tokens


def test_a_hash_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = pairs_that_begin_alike()
    want = PairGroups.of(FlatPairs.of(pairs)).tree.tokens
    monkeypatch.setattr(prefixes, "_FACTOR", 0)
    assert PairGroups.of(FlatPairs.of(pairs)).tree.tokens == want


def alike_groups(sizes: list[int]) -> list[TokenizedPair]:
    """All pairs of so many answers to each prompt, of which half begin alike with 40 tokens, two at least."""
    rng = np.random.default_rng(0)
    pairs: list[TokenizedPair] = []
    for size in sizes:
        begin = random_ids(rng, 40)
        answers = [
            np.concatenate([begin[: 40 * (number < max(2, size / 2))], random_ids(rng, int(rng.integers(2, 30)))])
            for number in range(size)
        ]
        of_prompt = of_answers(*answers, prompt=random_ids(rng, 20))
        pairs += [replace(pair, index=len(pairs) + row) for row, pair in enumerate(of_prompt)]
    return pairs


@pytest.mark.parametrize("budget", [160, 220, 1000])
def test_packs_stay_within_their_budget_whatever_is_split(budget: int) -> None:
    made = dataset(alike_groups([8, 4, 2, 2]))
    whole = loader(made, global_batch_size=len(made), budget_tokens=budget, work_model=MODEL)
    assert whole.groups is not None
    ((positions, deal),) = whole.deals(0)
    packs = [whole.pack(positions[numbers]) for rank in deal for numbers in rank]
    tokens, _ = whole.totals(positions, [numbers for rank in deal for numbers in rank])
    assert [pack.num_tokens for pack in packs] == tokens.tolist() and tokens.max() <= budget
    assert sorted(row for pack in packs for row in pack.pair_indices.tolist()) == list(range(len(made)))
    if budget == 1000:
        assert len(packs) == 1 and tokens[0] == whole.groups.tree.tokens < whole.groups.tokens_alone / 3


def test_a_pair_that_fits_only_with_its_beginning_once_is_taken() -> None:
    made = dataset(of_answers(begun(100, 8), begun(100, 9)))
    assert len(list(loader(made, budget_tokens=104, global_batch_size=1).batches(0))) == 1
    with pytest.raises(Exception, match="204 packed tokens"):
        loader(made, budget_tokens=104, global_batch_size=1, group_prompts=False)


def test_pairs_of_different_prompts_keep_their_order() -> None:
    made = dataset([replace(pair, index=n) for n, pair in enumerate(alike_groups([2] * 30))])
    one, other = loader(made), loader(made, group_prompts=False)
    assert one.groups is not None and other.groups is None
    assert one.order(3).tolist() == other.order(3).tolist() and one.answers.tolist() == other.answers.tolist()


def test_weights_by_the_pair_share_prompts_only() -> None:
    pairs = pairs_that_begin_alike()
    groups = PairGroups.of(FlatPairs.of(pairs), share_answers=False)
    assert len(groups.tree.ends) == 6 + 2 and groups.tree.tokens < groups.tokens_alone


def test_ranks_deal_alike() -> None:
    made = dataset(alike_groups([4, 4, 3, 2, 2, 2]))
    groups = PairGroups.of(made)
    options = {"num_ranks": 2, "budget_tokens": 400, "work_model": MODEL, "micro_batch_multiple": 1}
    positions = np.arange(len(made))
    again = PairGroups.of(dataset(list(made)))
    assert deal_groups(groups, positions, **options) == deal_groups(again, positions, **options)  # type: ignore[arg-type]


@given(branching_pairs(), st.integers(2, 4))
def test_every_part_predicts_its_tokens_for_all_answers(pairs: list[TokenizedPair], size: int) -> None:
    whole = packed(pairs, multiple=size)
    parts = [context_part(whole, rank, size) for rank in range(size)]
    assert sum(part.segment_targets for part in parts).tolist() == whole.segment_targets.tolist()  # type: ignore[union-attr]
    assert sum(len(part.targets) for part in parts) == len(whole.targets)
    gathered = np.concatenate([part.run_index.numpy() for part in parts])
    for part in parts:
        for query, place in enumerate(part.run_index.tolist()):
            assert gathered[visible(part, query)].tolist() == visible(whole, place)
