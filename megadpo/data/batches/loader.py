"""Global batches of packed pairs, for one data-parallel rank.

The order of an epoch depends only on (seed, epoch). So neither the number of ranks nor an interruption changes which pairs
share a global batch. Every rank knows all lengths, computes the same deal of the whole global batch, and packs only its
own micro-batches; nothing is communicated. Memory for each pair: 16 bytes for its length and work, and 8 bytes for the
epoch's order; where pairs share something 72 bytes more, and 16 for each beginning that answers have in common. Token ids
stay in the data set.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from megadpo.config.check import micro_batch_multiple
from megadpo.config.grid import Grid
from megadpo.config.problems import DataError, Problem
from megadpo.data.batches.cut import context_part
from megadpo.data.batches.deal import Deal, deal_batch
from megadpo.data.batches.groups import PairGroups, deal_groups
from megadpo.data.batches.mixture import mixed_order, refuse_empty_sets
from megadpo.data.batches.pack import PackedBatch, pack_pairs
from megadpo.data.batches.rankings import first_of_rankings, ranking_shares, refuse_no_rankings, refuse_no_rewards
from megadpo.data.batches.work import WorkModel
from megadpo.data.chosen import ChosenPairs
from megadpo.data.pairs import OpenedPairs
from megadpo.data.sources import MOST_PROBLEMS

if TYPE_CHECKING:
    from megadpo.config.architecture import Architecture
    from megadpo.config.schema import Config

Item = TypeVar("Item")

PREFETCH_BATCHES = 2
"""Global batches packed in advance."""


@dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """One rank's part of a global batch, and facts about the whole batch."""

    micro_batches: list[PackedBatch]
    """This rank's, on the CPU. Every rank has the same number."""
    num_pairs: int
    """Pairs of the whole global batch, over all ranks. The loss is a mean over them."""
    num_tokens: int
    """Tokens of the whole global batch without padding. A shared prompt counts once."""
    pair_indices: list[int]
    """Rows of the data file for the whole global batch, in the order of the epoch."""


ONE_RANK = Grid()


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How pairs become global batches and micro-batches. Sizes count pairs. Exactly one of `budget_tokens` (sequence
    packing) and `pairs_per_micro_batch` is given. Raises ValueError for impossible values."""

    global_batch_size: int
    shuffle: bool
    seed: int
    share_prompt: bool
    group_prompts: bool = False
    """With share_prompt and budget_tokens: pairs with the same prompt go into one pack where they can, and what they share,
    or their answers begin with, is in it once (data/batches/groups.py)."""
    pad_token_id: int
    tail_weight: float | None = None
    """As in pack_pairs. An answer's weights then depend on the other answer of its pair: pairs share prompts only."""
    pad_to_multiple: int = 1
    budget_tokens: int | None = None
    """The most tokens of a micro-batch, padding included."""
    pairs_per_micro_batch: int | None = None
    micro_batch_multiple: int = 1
    """Every rank gets a multiple of this many micro-batches. Some of them may be empty."""
    drop_last: bool
    """Leave out the last global batch of an epoch if it is incomplete (training)."""
    limit_batches: int | None = None
    """At most this many batches of an epoch (dpo.val_batches); None, 0 or less: all."""
    shares: tuple[float, ...] | None = None
    """Of the sets of a ChosenPairs in every epoch (data/batches/mixture.py); their sum is 1. None: every pair once."""
    by_rankings: bool = False
    """A global batch is `global_batch_size` prompts with all of their pairs, each prompt's in one pack (plackett_luce). Needs
    group_prompts, and what group_prompts needs."""
    prefetch: bool = True
    """Pack in one background thread. Packing takes a thousandth of a step."""

    def __post_init__(self) -> None:
        if self.global_batch_size < 1:
            raise ValueError(f"global_batch_size must be at least 1, got {self.global_batch_size}")

    @classmethod
    def from_config(cls, cfg: Config, *, pad_token_id: int, training: bool) -> BatchOptions:
        """Training: the config's order, whole global batches only. Validation: file order, every pair."""
        packing = cfg.policy.sequence_packing
        pairs = cfg.policy.train_micro_batch_size if training else cfg.dpo.val_micro_batch_size
        return cls(
            global_batch_size=cfg.policy.train_global_batch_size if training else cfg.dpo.val_global_batch_size,
            shuffle=cfg.data.shuffle and training,
            seed=cfg.dpo.seed,
            # without packing, every sequence of a micro-batch has its own prompt
            share_prompt=packing.enabled and packing.share_prompt,
            group_prompts=cfg.data.group_prompts,
            pad_token_id=pad_token_id,
            tail_weight=cfg.dpo.ld_alpha,
            pad_to_multiple=cfg.policy.make_sequence_length_divisible_by,
            budget_tokens=packing.train_mb_tokens if packing.enabled else None,
            pairs_per_micro_batch=None if packing.enabled else pairs,
            drop_last=training and cfg.data.drop_last,
            shares=cfg.data.train_shares if training else None,
            limit_batches=None if training else cfg.dpo.val_batches,
            micro_batch_multiple=micro_batch_multiple(cfg),
            by_rankings=cfg.dpo.loss.ranks,
            prefetch=cfg.data.num_workers > 0,
        )


class GlobalBatchLoader:
    """The global batches of a data set, epoch by epoch."""

    def __init__(
        self,
        dataset: OpenedPairs,
        options: BatchOptions,
        *,
        work_model: WorkModel | None = None,
        grid: Grid = ONE_RANK,
    ) -> None:
        """work_model: balances the ranks' work (with budget_tokens only); None: balances their tokens.
        grid: this rank's place. pad_to_multiple is a multiple of the context-parallel size.
        Raises DataError for pairs longer than budget_tokens, and if drop_last leaves no global batch.
        """
        multiple, budget = options.pad_to_multiple, options.budget_tokens
        if multiple % grid.context:
            raise ValueError(f"packs padded to {multiple} tokens can't be cut over {grid.context} ranks")
        self.dataset = dataset
        self.options = options
        self.work_model = work_model
        self.grid = grid
        self.groups: PairGroups | None = None
        """None: no two pairs have a prompt in common, and no two answers begin alike."""
        if options.group_prompts and options.share_prompt and budget is not None:
            groups = PairGroups.of(dataset, share_answers=options.tail_weight is None)
            self.groups = groups if options.by_rankings or groups.tree.tokens < groups.tokens_alone else None
            dataset.release()
        self.lengths = dataset.packed_tokens(share_prompt=options.share_prompt)
        """int64 [pairs]: tokens of each pair in a pack of its own."""
        self.work = self.lengths
        """int64 [pairs]: cost of each pair, to balance the ranks. Not used with groups."""
        if self.groups is not None:
            self.lengths = self.groups.pair_tokens
        elif work_model is not None:
            self.work = work_model.pair_work(dataset.text_tokens(), share_prompt=options.share_prompt)
        self.answers = np.arange(2 * len(dataset)).reshape(-1, 2) if self.groups is None else self.groups.answers
        """int64 [pairs, 2]: number of the chosen and of the rejected answer in the data set."""
        self._reference_logps: npt.NDArray[np.float32] | None = None
        # A pack with its padding must stay within the budget
        self.budget_tokens = None if budget is None else budget // multiple * multiple
        self._refuse_longer_than_budget()
        self.unit, self.units = "pairs", len(dataset)
        """What global_batch_size counts, and how many of them there are."""
        if options.by_rankings:
            assert self.groups is not None and self.budget_tokens is not None, "the rules of plackett_luce"
            refuse_no_rankings(dataset, self.groups, self.budget_tokens)
            self.unit, self.units = "rankings", self.groups.num_prompts
        batches, limit = self._count_batches(), options.limit_batches
        self.batches_per_epoch = batches if limit is None or limit < 1 else min(batches, limit)
        if options.shares is not None:
            assert isinstance(dataset, ChosenPairs) and len(dataset.sets) == len(options.shares)
            refuse_empty_sets(dataset)
        left = self.units % options.global_batch_size if options.drop_last else 0
        self.dropped_per_epoch = 0 if options.shares is not None else left
        """Of `unit`: left out of each epoch by drop_last. With shuffling they differ between epochs."""

    def _count_batches(self) -> int:
        """Global batches of all pairs. Raises DataError where there is none."""
        whole, rest = divmod(self.units, self.options.global_batch_size)
        batches = whole if self.options.drop_last or not rest else whole + 1
        if batches == 0:
            raise DataError(self._too_few())
        return batches

    def _too_few(self) -> Problem:
        return Problem(
            where=self.dataset.report.path,
            value=f"{self.units} {self.unit}",
            expected=f"at least one global batch of {self.options.global_batch_size}",
            fix=f"lower policy.train_global_batch_size to {self.units} or less, or add pairs",
        )

    @classmethod
    def from_config(
        cls,
        dataset: OpenedPairs,
        cfg: Config,
        arch: Architecture,
        *,
        pad_token_id: int,
        training: bool,
        grid: Grid = ONE_RANK,
    ) -> GlobalBatchLoader:
        options = BatchOptions.from_config(cfg, pad_token_id=pad_token_id, training=training)
        if cfg.dpo.loss.reads_rewards and cfg.dpo.computes_preference_loss:
            refuse_no_rewards(dataset, cfg.dpo.loss_type)
        return cls(dataset, options, work_model=WorkModel.of(arch), grid=grid)

    def with_reference_logps(self, logps: npt.NDArray[np.float32]) -> GlobalBatchLoader:
        """The same loader, but its micro-batches include the reference's log-probabilities. logps: float32, one for each
        number in `answers`, computed before training (dpo.reference.mode cached)."""
        loader = copy.copy(self)
        loader._reference_logps = logps
        return loader

    def order(self, epoch: int) -> npt.NDArray[np.int64]:
        """int64 [pairs]: positions of the data set in the order of the epoch. With `shares`, some may be there several times or
        not at all."""
        if self.options.shares is not None:
            return self._mixed(self.options.shares, epoch)
        if not self.options.shuffle and not self.options.by_rankings:
            return np.arange(len(self.dataset), dtype=np.int64)
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.options.seed, epoch])))
        if self.groups is None:
            return generator.permutation(len(self.dataset))
        number = self.groups.num_prompts
        prompts = generator.permutation(number) if self.options.shuffle else np.arange(number)
        if self.options.by_rankings:
            return self.groups.members_of(prompts)
        return self.groups.order(prompts.tolist(), self.options.global_batch_size)

    @property
    def order_unit(self) -> str:
        """What an epoch's order is an order of: it depends on nothing else but (seed, epoch), shares and batch size."""
        if self.groups is None or not self.groups.prompts_in_common:
            return "pairs"
        if self.options.by_rankings:
            return "rankings"
        return "prompts" if self.options.shuffle else "pairs"

    @property
    def mixture(self) -> list[str]:
        """A line for each set of a mixture: the pairs of it in an epoch. Empty without one."""
        if self.options.shares is None or not isinstance(self.dataset, ChosenPairs):
            return []
        sizes = np.bincount(self.dataset.of_set)
        counts = np.bincount(self.dataset.of_set[self.order(0)], minlength=len(sizes))
        return [
            f"{one.report.path}: {count:,} pairs of each epoch ({share:.1%}), {count / size:.2f} passes over its {size:,}"
            for one, share, count, size in zip(self.dataset.sets, self.options.shares, counts, sizes, strict=True)
        ]

    def _mixed(self, shares: tuple[float, ...], epoch: int) -> npt.NDArray[np.int64]:
        assert isinstance(self.dataset, ChosenPairs)
        total = len(self.dataset)
        return mixed_order(
            self.dataset.of_set,
            shares,
            total - total % self.options.global_batch_size if self.options.drop_last else total,
            epoch=epoch,
            seed=self.options.seed if self.options.shuffle else None,
            prompts=self.groups.prompts if self.groups is not None and self.groups.prompts_in_common else None,
        )

    def cut(self, order: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """The positions in `order` as global batches. The last one may be smaller."""
        starts, size = np.arange(len(order)), self.options.global_batch_size
        if self.options.by_rankings and self.groups is not None:
            starts = first_of_rankings(self.groups.prompts[order])
        return np.split(order, starts[size::size]) if len(order) else []

    def batches(self, epoch: int, start_batch: int = 0) -> Iterator[GlobalBatch]:
        """The batches of an epoch from number `start_batch` on. Closing the iterator ends its thread."""
        if not 0 <= start_batch <= self.batches_per_epoch:
            raise ValueError(f"start_batch {start_batch} of an epoch of {self.batches_per_epoch} batches")
        made = self._make(epoch, start_batch)
        yield from prefetched(made, PREFETCH_BATCHES) if self.options.prefetch else made

    def deals(self, epoch: int, start_batch: int = 0) -> Iterator[tuple[npt.NDArray[np.int64], Deal]]:
        """For each global batch: int64 [pairs] positions in the data set, and their deal to all ranks."""
        for positions in self.cut(self.order(epoch))[start_batch : self.batches_per_epoch]:
            yield positions, self._deal(positions)

    def deals_of(self, order: npt.NDArray[np.int64]) -> Iterator[tuple[npt.NDArray[np.int64], Deal]]:
        """The same for the positions in `order`. The last global batch may be smaller."""
        for positions in self.cut(order):
            yield positions, self._deal(positions)

    def _deal(self, positions: npt.NDArray[np.int64]) -> Deal:
        if self.groups is not None and self.budget_tokens is not None:
            return deal_groups(
                self.groups,
                positions,
                num_ranks=self.grid.data,
                budget_tokens=self.budget_tokens,
                work_model=self.work_model,
                micro_batch_multiple=self.options.micro_batch_multiple,
                whole=self.options.by_rankings,
            )
        return deal_batch(
            self.lengths[positions],
            num_ranks=self.grid.data,
            budget_tokens=self.budget_tokens,
            pairs_per_micro_batch=self.options.pairs_per_micro_batch,
            work=self.work[positions],
            micro_batch_multiple=self.options.micro_batch_multiple,
        )

    def totals(
        self, positions: npt.NDArray[np.int64], packs: Sequence[Sequence[int]]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """int64 [packs] each: tokens without padding, and work, of packs of the pairs at `positions`."""
        labels = np.repeat(np.arange(len(packs)), [len(pack) for pack in packs])
        pairs = positions[np.array([number for pack in packs for number in pack], dtype=np.int64)]
        if self.groups is None:
            tokens, work = np.zeros((2, len(packs)), dtype=np.int64)
            np.add.at(tokens, labels, self.lengths[pairs])
            np.add.at(work, labels, self.work[pairs])
            return tokens, work
        return self.groups.totals(pairs, labels, len(packs), self.work_model)

    def _make(self, epoch: int, start_batch: int) -> Iterator[GlobalBatch]:
        for positions, deal in self.deals(epoch, start_batch):
            yield GlobalBatch(
                micro_batches=[self.pack(positions[numbers], positions) for numbers in deal[self.grid.dp_rank]],
                num_pairs=len(positions),
                num_tokens=int(self.totals(positions, [pack for rank in deal for pack in rank])[0].sum()),
                pair_indices=self.dataset.rows[positions].tolist(),
            )
            # Each access maps 64 KiB or more of the file; after a few hundred batches the whole file would be in memory
            self.dataset.release()

    def pack(self, positions: npt.NDArray[np.int64], batch: npt.NDArray[np.int64] | None = None) -> PackedBatch:
        """A micro-batch of these positions of the data set; with context parallelism, this rank's part of it. batch: the
        positions of its global batch, on which the loss of rankings depends."""
        whole = pack_pairs(
            [self.dataset[int(position)] for position in positions],
            share_prompt=self.options.share_prompt,
            pad_to_multiple=self.options.pad_to_multiple,
            pad_token_id=self.options.pad_token_id,
            tail_weight=self.options.tail_weight,
            groups=None if self.groups is None else self.groups.at(positions),
        )
        if self._reference_logps is not None:
            numbers = np.empty(whole.num_answers, dtype=np.int64)
            numbers[whole.pairs.numpy()] = self.answers[positions]
            known = torch.from_numpy(self._reference_logps[numbers])
            whole = dataclasses.replace(whole, reference_logps=known)
        if self.options.by_rankings and self.groups is not None and batch is not None:
            shares = torch.from_numpy(ranking_shares(self.groups, positions, batch))
            whole = dataclasses.replace(whole, ranking_shares=shares)
        return context_part(whole, self.grid.cp_rank, self.grid.context)

    def _refuse_longer_than_budget(self) -> None:
        if self.budget_tokens is None:
            return
        too_long = np.flatnonzero(self.lengths > self.budget_tokens)
        if len(too_long) == 0:
            return
        longest = int(self.lengths.max())
        needed = -(-longest // self.options.pad_to_multiple) * self.options.pad_to_multiple
        advice = f"raise it to {needed} or more (the longest of {len(too_long)} such pairs)"
        if not self.options.share_prompt:
            advice += ", or set policy.sequence_packing.share_prompt: true"
        raise DataError(
            [
                Problem(
                    where=self.dataset.source_of(int(self.dataset.rows[position])),
                    value=f"a pair of {self.lengths[position]} packed tokens",
                    expected=f"at most policy.sequence_packing.train_mb_tokens, here {self.budget_tokens}",
                    fix=advice,
                )
                for position in too_long[:MOST_PROBLEMS]
            ]
        )


def prefetched(source: Iterator[Item], depth: int) -> Iterator[Item]:
    """The items of `source`, in order. A background thread makes the next `depth` items in advance.

    An exception in `source` is raised in place of its item, with its traceback. If this iterator ends, fails or is
    closed, the thread has ended and `source` is closed."""
    end: Any = object()
    pool = ThreadPoolExecutor(1, thread_name_prefix="megadpo-prefetch")
    try:
        ready = deque(pool.submit(next, source, end) for _ in range(depth))
        while (item := ready.popleft().result()) is not end:
            ready.append(pool.submit(next, source, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
        getattr(source, "close", lambda: None)()
