"""The data room on real human preferences. MEGADPO_DATA names their folder; skipped, saying so, where it is absent.

The texts are offensive: a failing assertion here compares numbers, and never shows a text."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megadpo.config.grid import Grid
from megadpo.data.batches.cut import CONTEXT_BALANCE
from megadpo.data.batches.deal import deal_batch
from megadpo.data.batches.loader import BatchOptions, GlobalBatchLoader
from megadpo.data.batches.rebalance import BALANCE
from megadpo.data.batches.work import WorkModel
from megadpo.data.pairs import PairDataset
from megadpo.data.tokens.dataset import open_dataset
from megadpo.data.tokens.encode import DataSettings
from tests.helpers.tiny_tokenizer import CHATML, tiny_tokenizer

FOLDER = Path(os.environ.get("MEGADPO_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
TRAIN = FOLDER / "hh_train.jsonl"

pytestmark = pytest.mark.skipif(not TRAIN.is_file(), reason=f"no {TRAIN}: set MEGADPO_DATA to the folder that holds it")


@pytest.fixture(scope="module")
def pairs() -> PairDataset:
    return read(TRAIN)


def read(path: Path) -> PairDataset:
    return open_dataset(path, tiny_tokenizer(adds_bos=True), DataSettings(max_total_sequence_length=8192))


def test_every_row_is_a_pair(pairs: PairDataset) -> None:
    assert (len(pairs), pairs.report.rows, pairs.report.tokenized_apart) == (1600, 1600, 0)
    assert pairs.report.shared_prompt_saving > 0.3
    assert len(read(TRAIN.with_name("hh_valid.jsonl"))) == 200


def test_plain_rows_go_through_a_chat_template() -> None:
    settings = DataSettings(max_total_sequence_length=8192, chat_template=CHATML)
    chats = open_dataset(TRAIN, tiny_tokenizer(), settings)
    assert len(chats) == 1600 and chats.report.with_chat_template and chats.report.tokenized_apart == 0


@pytest.fixture(scope="module")
def in_large_vocabulary() -> PairDataset:
    """The same pairs under a byte-level BPE of 8,192 tokens learned from them: lengths as a real model sees them."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=["</s>"], show_progress=False)
    texts = (text for line in TRAIN.open(encoding="utf-8") for text in json.loads(line).values())
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    return open_dataset(TRAIN, tokenizer, DataSettings(max_total_sequence_length=4096))


LLAMA_8B = WorkModel(per_token=13_958_643_712, per_answer_token=1_050_673_152, per_query_key={None: 524_288})


@pytest.mark.parametrize("dp_size", [2, 4])
@pytest.mark.parametrize("share_prompt", [True, False])
def test_an_epoch_is_complete_and_its_ranks_do_the_same_work(
    in_large_vocabulary: PairDataset, dp_size: int, share_prompt: bool
) -> None:
    loaders = [
        GlobalBatchLoader(
            in_large_vocabulary,
            BatchOptions(
                global_batch_size=64,
                shuffle=True,
                seed=42,
                share_prompt=share_prompt,
                pad_token_id=0,
                budget_tokens=4096,
                drop_last=True,
            ),
            work_model=LLAMA_8B,
            grid=Grid(data=dp_size, rank=rank),
        )
        for rank in range(dp_size)
    ]
    seen: list[int] = []
    for batches in zip(*(loader.batches(0) for loader in loaders), strict=True):
        rows = [[row for pack in batch.micro_batches for row in pack.pair_indices.tolist()] for batch in batches]
        work = [int(loaders[0].work[rank_rows].sum()) for rank_rows in rows]  # a row's number is its position here
        assert 1 - min(work) / max(work) <= BALANCE
        seen += [row for rank_rows in rows for row in rank_rows]
    assert len(seen) == 1600 and sorted(seen) == list(range(1600))


def test_full_packs_are_nearly_full(in_large_vocabulary: PairDataset) -> None:
    lengths = in_large_vocabulary.packed_tokens(share_prompt=True)
    (packs,) = deal_batch(lengths, num_ranks=1, budget_tokens=4096)
    filled = sorted((lengths[pack].sum() / 4096 for pack in packs), reverse=True)
    assert np.mean(filled[:-1]) > 0.97, "all but the last"


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_context_parallel_ranks_have_even_work(
    in_large_vocabulary: PairDataset, ranks: int, share_prompt: bool
) -> None:
    loader = GlobalBatchLoader(
        in_large_vocabulary,
        BatchOptions(
            global_batch_size=400, shuffle=True, seed=3, drop_last=True,
            share_prompt=share_prompt, pad_token_id=0, pad_to_multiple=ranks, budget_tokens=4096,
        ),
        grid=Grid(context=ranks),
    )  # fmt: skip
    parts = [pack.part for batch in loader.batches(0) for pack in batch.micro_batches]
    imbalance = [part.most_work / part.mean_work for part in parts if part is not None]
    assert len(imbalance) > 80 and max(imbalance) <= CONTEXT_BALANCE
