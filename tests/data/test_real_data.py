"""The data room on real human preferences. MEGADPO_DATA names their folder; skipped, saying so, where it is absent.

The texts are offensive: a failing assertion here compares numbers, and never shows a text."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from megadpo.data.dataset import DataSettings, PairDataset
from megadpo.data.loader import GlobalBatchLoader
from megadpo.data.plan import plan_global_batch
from megadpo.data.rebalance import BALANCE
from tests.helpers.tiny_tokenizer import CHATML, tiny_tokenizer

FOLDER = Path(os.environ.get("MEGADPO_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
TRAIN = FOLDER / "hh_train.jsonl"

pytestmark = pytest.mark.skipif(not TRAIN.is_file(), reason=f"no {TRAIN}: set MEGADPO_DATA to the folder that holds it")


@pytest.fixture(scope="module")
def pairs() -> PairDataset:
    return read(TRAIN)


def read(path: Path) -> PairDataset:
    return PairDataset.with_settings(path, tiny_tokenizer(adds_bos=True), DataSettings(max_total_sequence_length=8192))


def test_every_row_is_a_pair(pairs: PairDataset) -> None:
    assert (len(pairs), pairs.report.rows, pairs.report.tokenized_apart) == (1600, 1600, 0)
    assert pairs.report.shared_prompt_saving > 0.3
    assert len(read(TRAIN.with_name("hh_valid.jsonl"))) == 200


def test_plain_rows_go_through_a_chat_template() -> None:
    settings = DataSettings(max_total_sequence_length=8192, chat_template=CHATML)
    chats = PairDataset.with_settings(TRAIN, tiny_tokenizer(), settings)
    assert len(chats) == 1600 and chats.report.with_chat_template and chats.report.tokenized_apart == 0


def test_an_epoch_over_two_ranks_is_balanced_and_complete(pairs: PairDataset) -> None:
    loaders = [
        GlobalBatchLoader(
            pairs,
            global_batch_size=64,
            shuffle=True,
            seed=42,
            dp_rank=rank,
            dp_size=2,
            share_prompt=True,
            pad_token_id=2,
            budget_tokens=8192,
            drop_last=True,
        )
        for rank in range(2)
    ]
    seen: list[int] = []
    for batches in zip(*(loader.batches(0) for loader in loaders), strict=True):
        tokens = [sum(pack.num_tokens for pack in batch.micro_batches) for batch in batches]
        assert 1 - min(tokens) / max(tokens) <= BALANCE
        seen += [index for batch in batches for pack in batch.micro_batches for index in pack.pair_indices.tolist()]
    assert len(seen) == 1600 and sorted(seen) == list(range(1600))


def test_full_packs_are_nearly_full(pairs: PairDataset) -> None:
    lengths = pairs.packed_tokens(share_prompt=True)
    (packs,) = plan_global_batch(lengths, num_ranks=1, budget_tokens=8192)
    assert np.mean([lengths[pack].sum() for pack in packs]) / 8192 > 0.97
