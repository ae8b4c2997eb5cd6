"""Statistics of a data set, to read before training: lengths, packs, and a pair as the model sees it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from megadpo.data.batches.groups import PairGroups
from megadpo.data.batches.loader import GlobalBatchLoader
from megadpo.data.batches.pack import PackedBatch, pack_pairs
from megadpo.data.pairs import OpenedPairs, TokenizedPair


@dataclass(frozen=True)
class Lengths:
    """Tokens of one kind of text over all pairs."""

    name: str
    mean: float
    median: int
    percent_90: int
    percent_99: int
    longest: int
    total: int


def lengths(dataset: OpenedPairs, *, share_prompt: bool) -> list[Lengths]:
    """Lengths of prompts, of both answers, of the longer sequence, and of a pair in a pack."""
    texts = dataset.text_tokens()
    prompt, chosen, rejected = texts.T
    return [
        _lengths("prompt", prompt),
        _lengths("chosen", chosen),
        _lengths("rejected", rejected),
        _lengths("prompt + longer answer", prompt + np.maximum(chosen, rejected)),
        _lengths("pair in a pack", dataset.packed_tokens(share_prompt=share_prompt)),
    ]


def _lengths(name: str, tokens: npt.NDArray[np.int64]) -> Lengths:
    median, percent_90, percent_99 = np.percentile(tokens, [50, 90, 99], method="higher").tolist()
    return Lengths(name, float(tokens.mean()), median, percent_90, percent_99, int(tokens.max()), int(tokens.sum()))


def share_chosen_longer(dataset: OpenedPairs) -> float:
    """Share (0..1) of pairs whose chosen answer has more tokens. If it is far from 0.5, length predicts the choice."""
    _, chosen, rejected = dataset.text_tokens().T
    return float((chosen > rejected).mean())


@dataclass(frozen=True)
class GroupCounts:
    """What pairs with the same prompt share. Tokens are those that packs compute."""

    prompts: int
    answers: int
    """Distinct ones."""
    tokens: int
    tokens_alone: int
    """Without groups, each pair with its own prompt and two answers."""
    tokens_in_common: int
    """Saved by computing once what answers have in common beyond the prompt."""

    @property
    def saving(self) -> float:
        return self.tokens_alone / self.tokens


def group_counts(groups: PairGroups) -> GroupCounts:
    """Of a whole data set. A group that is split over packs takes more tokens than are counted here."""
    tokens, texts = groups.tree.tokens, groups.text_tokens(groups.prompts)
    number = groups.tree.num_answers
    return GroupCounts(groups.num_prompts, number, tokens, groups.tokens_alone, int(texts.sum()) - tokens)


@dataclass(frozen=True)
class BatchFill:
    """How one global batch is split over ranks and micro-batches."""

    batch: int
    pairs: int
    tokens: int
    """Without padding."""
    micro_batches: int
    """Of each data-parallel rank."""
    fill: float | None
    """Share (0..1) of the token budget that is used; None without sequence packing."""
    imbalance: float
    """1 - (least / most work of a data-parallel rank)."""
    context_imbalance: float | None
    """Attention work of the busiest context-parallel rank / mean over the ranks, for the worst pack. None without context
    parallelism."""


def batch_fills(loader: GlobalBatchLoader, count: int) -> list[BatchFill]:
    """The first `count` global batches of epoch 0, or as many as there are."""
    fills = []
    for batch, (positions, deal) in enumerate(islice(loader.deals(epoch=0), count)):
        tokens, work = loader.totals(positions, [pack for rank in deal for pack in rank])
        rank_work = work.reshape(len(deal), -1).sum(axis=1).tolist()
        parts = [loader.pack(positions[pack]).part for rank in deal for pack in rank if loader.grid.context > 1]
        capacity = None if loader.budget_tokens is None else loader.budget_tokens * len(deal) * len(deal[0])
        fills.append(
            BatchFill(
                batch=batch,
                pairs=len(positions),
                tokens=int(tokens.sum()),
                micro_batches=len(deal[0]),
                fill=None if capacity is None else int(tokens.sum()) / capacity,
                imbalance=1 - min(rank_work) / max(rank_work),
                context_imbalance=max((part.most_work / part.mean_work for part in parts if part), default=None),
            )
        )
    return fills


@dataclass(frozen=True)
class SeenToken:
    """One token of a pack."""

    token_id: int
    position: int
    """Its position in its own sequence, for RoPE."""
    learned: bool
    """Whether its log-probability is in the loss."""


@dataclass(frozen=True)
class SeenSegment:
    """One segment of a pack."""

    name: str
    start: int
    """Its first token's place in the pack."""
    keys: tuple[tuple[int, int], ...]
    """Ranges of the pack that it sees, causally. The last one is the segment itself."""
    tokens: list[SeenToken]


def as_seen(pair: TokenizedPair, *, share_prompt: bool) -> list[SeenSegment]:
    """The segments of a pack that holds this pair only."""
    batch = pack_pairs([pair], share_prompt=share_prompt, pad_to_multiple=1, pad_token_id=0)
    names = ["prompt", "chosen", "rejected"] if share_prompt else ["prompt + chosen", "prompt + rejected"]
    learned = _learned(batch)
    ids, positions = batch.tokens.tolist(), batch.positions.tolist()
    return [
        SeenSegment(
            name,
            segment.query_start,
            segment.keys,
            [SeenToken(ids[at], positions[at], at in learned) for at in range(segment.query_start, segment.query_end)],
        )
        for name, segment in zip(names, batch.segments, strict=True)
    ]


def _learned(batch: PackedBatch) -> set[int]:
    """Places in the pack of the tokens in the loss: each is right after the hidden state that predicts it, or the first of its
    segment."""
    starts = np.repeat([segment.query_start for segment in batch.segments], batch.segment_targets.numpy())
    return set(np.maximum(batch.predict_index.numpy() + 1, starts).tolist())
