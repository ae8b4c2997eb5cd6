"""Numbers about a data set, and a pair as the model sees it, against the packs that training uses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given

from megadpo.config.grid import Grid
from megadpo.data.batches.loader import BatchOptions, GlobalBatchLoader
from megadpo.data.batches.pack import PackedBatch
from megadpo.data.batches.work import WorkModel
from megadpo.data.pairs import TokenizedPair
from megadpo.data.statistics import as_seen, batch_fills, lengths, share_chosen_longer
from tests.data.builders import dataset, ids, tokenized_pairs

MODEL = WorkModel(per_token=1000, per_answer_token=100, per_query_key={None: 5})


def test_lengths_are_those_of_the_pairs(tmp_path: Path) -> None:
    pairs = dataset(tmp_path, 9)
    found = {row.name: row for row in lengths(pairs, share_prompt=True)}
    prompts = sorted(pair.prompt_tokens for pair in pairs)
    assert (found["prompt"].median, found["prompt"].longest, found["prompt"].total) == (
        prompts[4],
        prompts[-1],
        sum(prompts),
    )
    longest = [pair.longest_sequence_tokens for pair in pairs]
    assert found["prompt + longer answer"].mean == pytest.approx(np.mean(longest))
    assert found["pair in a pack"].total == pairs.packed_tokens(share_prompt=True).sum()
    assert share_chosen_longer(pairs) == np.mean([pair.chosen_tokens > pair.rejected_tokens for pair in pairs])


def test_fills_say_how_even_context_parallel_ranks_are(tmp_path: Path) -> None:
    pairs = dataset(tmp_path, 23)

    def loader(cp_rank: int) -> GlobalBatchLoader:
        return GlobalBatchLoader(
            pairs,
            BatchOptions(
                global_batch_size=8, shuffle=False, seed=1, share_prompt=True, pad_token_id=2,
                pad_to_multiple=2, budget_tokens=160, drop_last=True,
            ),
            grid=Grid(context=2, rank=cp_rank),
        )  # fmt: skip

    def attention_work(pack: PackedBatch) -> int:
        return sum(s.key_tokens - back for s in pack.segments for back in range(s.query_tokens))

    by_rank = [list(loader(rank).batches(0)) for rank in range(2)]
    for fill, *batches in zip(batch_fills(loader(0), 99), *by_rank, strict=True):
        work = [[attention_work(pack) for pack in batch.micro_batches] for batch in batches]
        worst = max(2 * max(pack) / sum(pack) for pack in zip(*work, strict=True))
        assert fill.context_imbalance == pytest.approx(worst) and 1 <= worst <= 1.1


@pytest.mark.parametrize("packed", [True, False])
def test_fills_are_those_of_the_batches(tmp_path: Path, packed: bool) -> None:
    pairs = dataset(tmp_path, 23)

    def loader(rank: int) -> GlobalBatchLoader:
        return GlobalBatchLoader(
            pairs,
            BatchOptions(
                global_batch_size=8, shuffle=True, seed=1, share_prompt=packed, drop_last=True,
                pad_token_id=2, budget_tokens=160 if packed else None, pairs_per_micro_batch=None if packed else 2,
            ),
            work_model=MODEL,
            grid=Grid(data=2, rank=rank),
        )  # fmt: skip

    fills = batch_fills(loader(0), 99)
    assert len(fills) == 2 and len(batch_fills(loader(0), 1)) == 1
    by_rank = [list(loader(rank).batches(0)) for rank in range(2)]
    for fill, *batches in zip(fills, *by_rank, strict=True):
        assert (fill.pairs, fill.tokens) == (8, batches[0].num_tokens)
        assert fill.micro_batches == len(batches[0].micro_batches)
        room = 160 * 2 * fill.micro_batches
        assert fill.fill == (pytest.approx(fill.tokens / room) if packed else None)
        work = [loader(0).work[[row for p in b.micro_batches for row in p.pair_indices]].sum() for b in batches]
        assert fill.imbalance == pytest.approx(1 - min(work) / max(work))
        assert fill.context_imbalance is None


@pytest.mark.parametrize("share_prompt", [True, False])
@given(pairs=tokenized_pairs())
def test_a_pair_as_seen_is_all_its_tokens_with_the_answers_learned(
    share_prompt: bool, pairs: list[TokenizedPair]
) -> None:
    for pair in pairs:
        prompt, chosen, rejected = (text.tolist() for text in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids))
        segments = as_seen(pair, share_prompt=share_prompt)
        expected = [prompt, chosen, rejected] if share_prompt else [prompt + chosen, prompt + rejected]
        assert [[token.token_id for token in segment.tokens] for segment in segments] == expected
        learned = [[token.token_id for token in segment.tokens if token.learned] for segment in segments]
        in_loss = [
            ids_ if mask is None else [token for token, counts in zip(ids_, mask, strict=True) if counts]
            for ids_, mask in ((chosen, pair.chosen_mask), (rejected, pair.rejected_mask))
        ]
        assert learned[-2:] == in_loss and not any(learned[:-2])


def test_a_pair_as_seen_written_out() -> None:
    pair = TokenizedPair(0, ids(5, 6), ids(7, 8, 9), ids(3))
    prompt, chosen, rejected = as_seen(pair, share_prompt=True)
    assert (prompt.start, chosen.start, rejected.start) == (0, 2, 5)
    assert [token.position for token in chosen.tokens] == [2, 3, 4] and rejected.tokens[0].position == 2
    assert rejected.keys == ((0, 2), (5, 6))
