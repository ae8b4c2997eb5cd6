"""Global batches: the order of (seed, epoch) whatever the ranks and wherever a run goes on."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megadpo.config import build_config
from megadpo.config.grid import Grid
from megadpo.config.problems import DataError
from megadpo.data.batches.loader import BatchOptions, GlobalBatch, GlobalBatchLoader, prefetched
from megadpo.data.batches.pack import PackedBatch, pack_pairs
from megadpo.data.batches.work import WorkModel
from megadpo.data.pairs import FlatPairs, PairDataset, TokenizedPair
from megadpo.data.tokens.dataset import open_dataset
from megadpo.data.tokens.encode import DataSettings
from megadpo.families import parse_architecture
from tests.data.batches.test_work import LLAMA_8B
from tests.data.builders import dataset, ids, row, write_rows
from tests.helpers.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairDataset:
    return dataset(tmp_path_factory.mktemp("data"), 23)


def loader(pairs: PairDataset, **changes: Any) -> GlobalBatchLoader:
    defaults: dict[str, Any] = {
        "global_batch_size": 4,
        "shuffle": True,
        "seed": 7,
        "share_prompt": True,
        "pad_token_id": 2,
        "budget_tokens": 160,
        "drop_last": True,
        "prefetch": False,
    }
    ranks = {name: changes.pop(name) for name in ("work_model", "grid") if name in changes}
    return GlobalBatchLoader(pairs, BatchOptions(**{**defaults, **changes}), **ranks)


def equal_batches(some: list[PackedBatch], others: list[PackedBatch]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(value, getattr(other, name)) if isinstance(value, torch.Tensor) else value == getattr(other, name)
        for one, other in zip(some, others, strict=True)
        for name, value in vars(one).items()
    )


def rows_of(batches: list[GlobalBatch]) -> list[list[int]]:
    return [batch.pair_indices for batch in batches]


@given(
    dp_size=st.integers(1, 5),
    size=st.integers(1, 9),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 2**40),
    shuffle=st.booleans(),
    share_prompt=st.booleans(),
    packed=st.booleans(),
    drop_last=st.booleans(),
)
def test_every_layout_trains_on_the_same_pairs_in_the_same_order(
    pairs: PairDataset, dp_size: int, size: int, epoch: int, seed: int, shuffle: bool, share_prompt: bool,
    packed: bool, drop_last: bool,
) -> None:  # fmt: skip
    options = {
        "global_batch_size": size,
        "seed": seed,
        "shuffle": shuffle,
        "share_prompt": share_prompt,
        "budget_tokens": 200 if packed else None,
        "pairs_per_micro_batch": None if packed else 2,
        "drop_last": drop_last,
    }
    alone = loader(pairs, **options)
    expected = list(alone.batches(epoch))
    assert len(expected) == alone.batches_per_epoch
    everything = [index for batch in expected for index in batch.pair_indices]
    assert everything == alone.order(epoch)[: len(everything)].tolist()
    assert len(everything) + alone.dropped_per_epoch == len(pairs)
    assert all(batch.num_pairs == size for batch in expected[: -1 if not drop_last else None])

    by_rank = [list(loader(pairs, grid=Grid(data=dp_size, rank=r), **options).batches(epoch)) for r in range(dp_size)]
    for number, batches in enumerate(zip(*by_rank, strict=True)):
        whole = expected[number]
        assert all(batch.pair_indices == whole.pair_indices for batch in batches)
        assert all((b.num_pairs, b.num_tokens) == (whole.num_pairs, whole.num_tokens) for b in batches)
        assert len({len(batch.micro_batches) for batch in batches}) == 1
        packs = [pack for batch in batches for pack in batch.micro_batches]
        assert sorted(i for pack in packs for i in pack.pair_indices.tolist()) == sorted(whole.pair_indices)
        assert sum(pack.num_tokens for pack in packs) == whole.num_tokens


@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_a_resumed_epoch_goes_on_with_the_same_pairs_on_any_number_of_ranks(
    pairs: PairDataset, split: int, before: int, after: int, epoch: int
) -> None:
    whole = rows_of(list(loader(pairs).batches(epoch)))
    first = list(loader(pairs, grid=Grid(data=before)).batches(epoch))[:split]
    rest = list(loader(pairs, grid=Grid(data=after, rank=after - 1)).batches(epoch, start_batch=len(first)))
    assert rows_of(first) + rows_of(rest) == whole


def test_a_resumed_epoch_is_the_same_bits(pairs: PairDataset) -> None:
    whole = list(loader(pairs, grid=Grid(data=2, rank=1)).batches(1))
    rest = list(loader(pairs, grid=Grid(data=2, rank=1)).batches(1, start_batch=3))
    assert len(rest) == len(whole) - 3 > 0
    assert all(equal_batches(a.micro_batches, b.micro_batches) for a, b in zip(rest, whole[3:], strict=True))


def test_seed_and_epoch_change_the_order_and_no_shuffle_is_the_files(pairs: PairDataset) -> None:
    orders = [loader(pairs, seed=seed).order(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4 and all(sorted(order) == list(range(23)) for order in orders)
    assert loader(pairs, shuffle=False).order(5).tolist() == list(range(23))


def test_the_order_is_pinned(pairs: PairDataset) -> None:
    """A checkpoint's position means something only while this stays as it is."""
    expected = np.random.Generator(np.random.PCG64(np.random.SeedSequence([7, 2]))).permutation(23)
    assert loader(pairs, seed=7).order(2).tolist() == expected.tolist()
    assert loader(pairs, seed=7).order(2)[:6].tolist() == [10, 22, 2, 8, 13, 7]


def test_training_drops_the_rest_and_says_how_much_and_validation_does_not(pairs: PairDataset) -> None:
    training, validation = loader(pairs), loader(pairs, drop_last=False, shuffle=False)
    assert (training.batches_per_epoch, training.dropped_per_epoch) == (5, 3)
    assert (validation.batches_per_epoch, validation.dropped_per_epoch) == (6, 0)
    last = list(validation.batches(0))[-1]
    assert last.num_pairs == 3 and last.pair_indices == [20, 21, 22]


@pytest.mark.parametrize(("limit", "batches"), [(None, 6), (0, 6), (2, 2), (99, 6)])
def test_validation_may_be_limited(pairs: PairDataset, limit: int | None, batches: int) -> None:
    limited = loader(pairs, drop_last=False, shuffle=False, limit_batches=limit)
    assert limited.batches_per_epoch == len(list(limited.batches(0))) == batches


@pytest.mark.parametrize("packed", [True, False])
def test_training_shuffles_whole_batches_and_validation_takes_the_files_order(pairs: PairDataset, packed: bool) -> None:
    cfg = build_config(
        {
            "policy": {
                "model_name": "some/model",
                "train_global_batch_size": 6,
                "train_micro_batch_size": 3,
                "max_total_sequence_length": 90,
                "make_sequence_length_divisible_by": 4,
                "sequence_packing": {"enabled": packed, "train_mb_tokens": 181},
            },
            "dpo": {"seed": 5, "val_global_batch_size": 4, "val_micro_batch_size": 2, "val_batches": 2},
            "data": {"train_data_path": "train.jsonl", "num_workers": 0},
        }
    )
    arch = parse_architecture(LLAMA_8B)
    expected = {
        True: loader(pairs, seed=5).order(0)[:18].tolist(),
        False: list(range(8)),
    }
    for training, size in ((True, 6), (False, 4)):
        made = GlobalBatchLoader.from_config(pairs, cfg, arch, pad_token_id=2, training=training)
        batches = list(made.batches(0))
        assert [index for batch in batches for index in batch.pair_indices] == expected[training]
        assert {batch.num_pairs for batch in batches} == {size}
        packs = [pack for batch in batches for pack in batch.micro_batches]
        assert all(pack.tokens.numel() % 4 == 0 for pack in packs)
        work = WorkModel.of(arch).pair_work(pairs.text_tokens(), share_prompt=packed)
        assert made.work.tolist() == work.tolist()
        if packed:
            assert made.budget_tokens == 180
        else:
            assert {pack.num_pairs for pack in packs} == {size // 2}
        assert {len(pack.segments) >= 3 * pack.num_pairs for pack in packs} == {packed}


def test_packs_stay_within_the_budget_with_their_padding(pairs: PairDataset) -> None:
    for budget in range(150, 190):
        (batch,) = loader(pairs, budget_tokens=budget, pad_to_multiple=16, global_batch_size=23).batches(0)
        lengths = [pack.tokens.numel() for pack in batch.micro_batches]
        assert len(lengths) > 1 and all(length <= budget and length % 16 == 0 for length in lengths)


def test_unpacked_micro_batches_hold_so_many_pairs_in_order(pairs: PairDataset) -> None:
    (batch,) = loader(
        pairs, budget_tokens=None, pairs_per_micro_batch=3, global_batch_size=8, shuffle=False, limit_batches=1
    ).batches(0)
    assert [pack.pair_indices.tolist() for pack in batch.micro_batches] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_ranks_without_pairs_get_padding(pairs: PairDataset) -> None:
    (batch,) = loader(
        pairs, grid=Grid(data=4, rank=3), global_batch_size=2, budget_tokens=500, pad_to_multiple=8, limit_batches=1
    ).batches(0)
    (pack,) = batch.micro_batches
    assert pack.num_pairs == 0 and pack.tokens.tolist() == [2] * 8 and batch.num_pairs == 2


def test_the_work_model_decides_what_ranks_get(pairs: PairDataset) -> None:
    """Long prompts and long answers in turn, as many tokens each: by tokens, one rank gets all the long answers."""
    texts = [(96, 2, 2), (2, 49, 49)] * 8
    flat = FlatPairs.of(
        [TokenizedPair(row, *(ids(*range(3, 3 + length)) for length in lengths)) for row, lengths in enumerate(texts)]
    )
    made = PairDataset(
        flat.tokens, flat.offsets, flat.rows, flat.identities, flat.values, np.arange(1, 17), pairs.report
    )

    def answers(**options: Any) -> list[int]:
        options = {"global_batch_size": 16, "budget_tokens": 2000, "grid": Grid(data=2), "shuffle": False, **options}
        ((positions, deal),) = loader(made, **options).deals(0)
        assert positions.tolist() == list(range(16))
        return [sum(sum(texts[number][1:]) for pack in rank for number in pack) for rank in deal]

    answers_cost_all = WorkModel(per_token=1, per_answer_token=10**6, per_query_key={None: 0})
    assert answers() == [32, 784]
    assert min(answers(work_model=answers_cost_all)) > 400


def test_a_pair_over_the_budget_is_refused_at_its_line_with_the_need(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p.jsonl", [row(0), row(1, prompt="the " * 60), row(2)])
    long = open_dataset(path, tiny_tokenizer(), DataSettings(max_total_sequence_length=500))
    tokens = int(long.packed_tokens(share_prompt=True)[1])
    with pytest.raises(DataError) as refused:
        loader(long, budget_tokens=tokens - 1, global_batch_size=1, pad_to_multiple=4)
    (problem,) = refused.value.problems
    assert problem.where == f"{path}:2" and "train_mb_tokens" in problem.expected
    needed = -(-tokens // 4) * 4
    assert f"raise it to {needed} or more" in problem.fix
    loader(long, budget_tokens=needed, global_batch_size=1, pad_to_multiple=4)
    loader(long, budget_tokens=tokens, global_batch_size=1)
    with pytest.raises(DataError, match="share_prompt"):
        loader(long, budget_tokens=needed, global_batch_size=1, share_prompt=False)


def test_fewer_pairs_than_a_global_batch_are_refused_in_training(pairs: PairDataset) -> None:
    with pytest.raises(DataError, match=r"23 pairs.*global batch of 24.*lower policy.train_global_batch_size to 23"):
        loader(pairs, global_batch_size=24)
    assert loader(pairs, global_batch_size=24, drop_last=False).batches_per_epoch == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": Grid(context=2), "pad_to_multiple": 3}, "padded to 3"),
        ({"global_batch_size": 0}, "global_batch_size"),
        ({"budget_tokens": None}, "either"),
        ({"pairs_per_micro_batch": 2}, "either"),
    ],
)
def test_impossible_arguments_are_refused(pairs: PairDataset, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        next(loader(pairs, **changes).batches(0))


def test_a_start_outside_the_epoch_is_refused(pairs: PairDataset) -> None:
    assert list(loader(pairs).batches(0, start_batch=5)) == []
    for start in (6, -1):
        with pytest.raises(ValueError, match="start_batch"):
            next(loader(pairs).batches(0, start_batch=start))


def test_token_ids_are_released_after_every_batch(pairs: PairDataset) -> None:
    released: list[int] = []
    batches = list(loader(dataclasses.replace(pairs, release=lambda: released.append(1))).batches(0))
    assert len(released) == len(batches) == 5


# In the background


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("megadpo-prefetch")]


def test_packing_ahead_changes_nothing(pairs: PairDataset) -> None:
    here, ahead = (list(loader(pairs, prefetch=prefetch).batches(0)) for prefetch in (False, True))
    assert rows_of(here) == rows_of(ahead)
    assert all(equal_batches(a.micro_batches, b.micro_batches) for a, b in zip(here, ahead, strict=True))
    assert not prefetch_threads()


def test_packing_happens_in_one_other_thread(pairs: PairDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def noting(*args: Any, **options: Any) -> PackedBatch:
        names.append(threading.current_thread().name)
        return pack_pairs(*args, **options)

    monkeypatch.setattr("megadpo.data.batches.loader.pack_pairs", noting)
    list(loader(pairs, prefetch=True).batches(0))
    assert set(names) == {"megadpo-prefetch_0"}
    names.clear()
    list(loader(pairs, prefetch=False).batches(0))
    assert set(names) == {threading.current_thread().name}


def test_leaving_an_epoch_early_ends_the_thread(pairs: PairDataset) -> None:
    batches = loader(pairs, prefetch=True).batches(0)
    next(batches)
    assert len(prefetch_threads()) == 1
    batches.close()  # type: ignore[attr-defined]
    assert not prefetch_threads()


def test_a_failure_in_the_background_reaches_the_caller(pairs: PairDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def failing(*args: Any, **options: Any) -> PackedBatch:
        calls.append(1)
        if len(calls) > 3:
            raise MemoryError("planted")
        return pack_pairs(*args, **options)

    monkeypatch.setattr("megadpo.data.batches.loader.pack_pairs", failing)
    batches = loader(pairs, prefetch=True, budget_tokens=400).batches(0)
    for _ in range(3):
        next(batches)
    with pytest.raises(MemoryError, match="planted"):
        next(batches)
    assert not prefetch_threads()


class Source:
    """0, 1, 2, ...; notes what was made and whether it was closed."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.made: list[int] = []
        self.closed = False
        self.items = self._items(fail_at)

    def _items(self, fail_at: int | None) -> Iterator[int]:
        try:
            for number in itertools.count():
                if number == fail_at:
                    raise KeyError("planted")
                self.made.append(number)
                yield number
        finally:
            self.closed = True


def test_no_more_than_depth_is_made_ahead() -> None:
    source = Source()
    ahead = prefetched(source.items, 2)
    assert next(ahead) == 0
    end = time.monotonic() + 10
    while len(source.made) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(source.made) == 3, "one taken, two ready"
    ahead.close()  # type: ignore[attr-defined]
    assert source.closed and not prefetch_threads()


def test_an_exception_comes_in_place_of_its_item() -> None:
    source = Source(fail_at=3)
    ahead = prefetched(source.items, 2)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="planted") as raised:
        next(ahead)
    assert "_items" in "".join(traceback.format_tb(raised.value.__traceback__)), "the traceback shows where"
    assert source.closed and not prefetch_threads()


def test_a_loader_with_reference_numbers_brings_them_with_each_pack(pairs: PairDataset) -> None:
    table = np.arange(2 * len(pairs), dtype=np.float32)
    plain = loader(pairs)
    made = plain.with_reference_logps(table)
    for batch in made.batches(0):
        for pack in batch.micro_batches:
            assert pack.reference_logps is not None
            assert pack.reference_logps.tolist() == table.reshape(-1, 2)[pack.pair_indices.numpy()].ravel().tolist()
    assert all(pack.reference_logps is None for batch in plain.batches(0) for pack in batch.micro_batches)
