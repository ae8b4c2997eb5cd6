"""Packs pairs into one micro-batch: a flat run of tokens, and segments of queries over lists of keys.

    share_prompt:  prompt | chosen | rejected            three segments; both answers see the prompt's keys
                   prompt | answer | answer | answer     pairs of one group: its prompt and each answer once
                   prompt | begin | rest | rest | answer two answers that begin alike: what they begin with once
    else:          prompt+chosen | prompt+rejected       two segments; the prompt is computed twice
    padding:       the last segment, which sees only itself

Shape letters: T tokens of the run (with padding), S segments, P pairs, K answers (2P if no pairs share one), A predicted
tokens: those in the loss, each once for all answers that it is part of.
With context parallelism a rank holds part of the run (data/batches/cut.py). Its tokens are queries over the keys of all
ranks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megadpo.config.problems import DataError, Problem
from megadpo.data.batches.groups import PairGroups
from megadpo.data.batches.prefixes import PathPiece
from megadpo.data.pairs import Ints, LossMask, TokenIds, TokenizedPair


@dataclass(frozen=True)
class Segment:
    """Queries [query_start, query_end) of the run, and the ranges of keys that they see, in order.

    Causal, aligned at the bottom right: of K keys in all, the query at query_end - 1 - i sees the first K - i.
    In a whole run the ranges are those of the segments that its sequence goes through, prompt first, and its own: the one
    before its own is the segment that it goes on from. In a part of a run, queries are places in this part, and keys are
    places in the all-gather of the parts: tokens of part 0, then of part 1, ..."""

    query_start: int
    query_end: int
    keys: tuple[tuple[int, int], ...]

    @property
    def query_tokens(self) -> int:
        return self.query_end - self.query_start

    @property
    def key_tokens(self) -> int:
        return sum(end - start for start, end in self.keys)

    def rows(self, first: int, last: int, window: int | None = None) -> Segment:
        """Queries [first, last) of this segment, counted from its own first one, with the keys that they see: up to their
        own, and of those only as many as a window of `window` keys a query reaches."""
        behind = self.key_tokens - self.query_tokens + last
        dropped = 0 if window is None else max(0, behind - (last - first) - window + 1)
        keys, place = [], 0
        for start, end in self.keys:
            a, b = max(start, start + dropped - place), min(end, start + behind - place)
            if a < b:
                keys.append((a, b))
            place += end - start
        return Segment(self.query_start + first, self.query_start + last, tuple(keys))


@dataclass(frozen=True, eq=False)
class ContextPart:
    """The part of a run that one context-parallel rank holds: t of its T tokens. t is the same on every rank."""

    run_index: torch.Tensor
    """[t] int64, ascending, on the CPU: each token's place in the whole run."""
    run_segments: tuple[Segment, ...]
    """The segments of the whole run."""
    run_tokens: int
    """T."""
    most_work: int
    """Most query-key pairs of a part."""
    mean_work: float
    """Mean of the parts' query-key pairs."""


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One micro-batch of P pairs, or the part of it that a context-parallel rank holds. Tensors are int64.

    In a part, T and A count only its tokens. S, pairs, `answer_tokens` and `num_tokens` are those of the whole micro-batch."""

    tokens: torch.Tensor
    """[T] token ids."""
    positions: torch.Tensor
    """[T] position of each token in its own sequence: answers start at len(prompt), padding at 0."""
    segments: tuple[Segment, ...]
    """In order, without gap or overlap, from 0 to T. Padding is the last one."""
    predict_index: torch.Tensor
    """[A] the place of the hidden state that predicts this token. Segment by segment: the last token before a segment
    predicts its first one. Answer tokens outside the loss (turns of users and tools) are in the run, but not here."""
    targets: torch.Tensor
    """[A] the token itself."""
    segment_targets: torch.Tensor
    """[S] how many of `targets` are tokens of each segment of the whole run; sums to A."""
    paths: torch.Tensor
    """[sum of `path_segments`] the segments that answer 0 goes through, prompt first, then those of answer 1, ..."""
    path_segments: torch.Tensor
    """[K] how many segments each answer goes through."""
    answer_tokens: torch.Tensor
    """[K] tokens per answer that are in the loss."""
    token_weights: torch.Tensor | None
    """[A] float32: of each target in the preference loss (dpo.ld_alpha). None: 1. No two answers share a target then."""
    pairs: torch.Tensor
    """[P, 2] which answer is the chosen, and which the rejected one of each pair."""
    pair_indices: torch.Tensor
    """[P] row of the data file."""
    num_tokens: int
    """T without the padding."""
    part: ContextPart | None = None
    """None: the whole run is here."""
    weights: torch.Tensor | None = None
    """[P] float32: of each pair's loss. None: 1."""
    reward_gaps: torch.Tensor | None = None
    """[P] float32: the chosen answer's reward minus the rejected one's. NaN, or None for all: the data has none."""
    ranking_shares: torch.Tensor | None = None
    """[P] float32: of each pair in the loss of its ranking, where global batches consist of rankings."""
    reference_logps: torch.Tensor | None = None
    """[K] float32: the reference's log-probabilities, if they are known. The order is that of `answer_tokens`."""
    made: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    """A cache for what the model computes from this run (model/attention.py `once`). Copies of the batch share it."""

    @property
    def num_pairs(self) -> int:
        return self.pair_indices.numel()

    @property
    def num_answers(self) -> int:
        return self.answer_tokens.numel()

    @property
    def run_tokens(self) -> int:
        """Tokens of the whole run, padding included."""
        return self.tokens.numel() if self.part is None else self.part.run_tokens

    @property
    def run_segments(self) -> tuple[Segment, ...]:
        """Of the whole run."""
        return self.segments if self.part is None else self.part.run_segments

    @property
    def run_index(self) -> torch.Tensor:
        """[T] int64 on the CPU: each token's place in the whole run."""
        return torch.arange(self.tokens.numel()) if self.part is None else self.part.run_index

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on `device`. A copy to CUDA uses pinned memory and does not wait."""
        device = torch.device(device)
        to_cuda = device.type == "cuda"

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if to_cuda and tensor.device.type == "cpu" and not tensor.is_pinned():
                tensor = tensor.pin_memory()  # the caching allocator keeps it until the copy is done
            return tensor.to(device, non_blocking=to_cuda)

        tensors: dict[str, Any] = {n: move(value) for n, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **tensors)


class _FlatRun:
    """Builds the flat run, as lists of numpy pieces."""

    def __init__(self) -> None:
        self.length = 0
        self.tokens: list[TokenIds] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[Segment] = []
        self.predict_index: list[np.ndarray] = []
        self.targets: list[TokenIds] = []
        self.segment_targets: list[int] = []
        self.paths: list[list[int]] = []
        self.answer_tokens: list[int] = []
        self._segment_of: dict[int, int] = {}  # node of a tree -> segment

    def answer(self, prompt: TokenIds, answer: TokenIds, mask: LossMask | None, pieces: Sequence[PathPiece]) -> None:
        """Adds an answer, which has the next number, in the `pieces` of prompt + answer; not those that are in the run."""
        sequence = np.concatenate([prompt, answer])
        in_loss = np.concatenate([np.zeros(len(prompt), bool), np.ones(len(answer), bool) if mask is None else mask])
        path: list[int] = []
        for node, start, end in pieces:
            if node not in self._segment_of:
                self._segment_of[node] = len(self.segments)
                seen = self.segments[path[-1]].keys if path else ()
                self.append(sequence[start:end], start, seen, in_loss[start:end])
            path.append(self._segment_of[node])
        self.paths.append(path)
        self.answer_tokens.append(int(in_loss.sum()))

    def append(
        self,
        tokens: TokenIds,
        first_position: int,
        seen: tuple[tuple[int, int], ...] = (),
        in_loss: LossMask | None = None,
    ) -> None:
        """Adds one segment, which sees the ranges `seen`, then itself. in_loss: None for nothing. The token before each
        predicts it; before the first one that is the last one seen."""
        start, self.length = self.length, self.length + len(tokens)
        self.tokens.append(tokens)
        self.positions.append(np.arange(first_position, first_position + len(tokens), dtype=np.int64))
        self.segments.append(Segment(start, self.length, (*seen, (start, self.length))))
        targets = np.empty(0, dtype=np.int64) if in_loss is None else np.flatnonzero(in_loss)
        index = start + targets - 1
        if seen:
            index[targets == 0] = seen[-1][1] - 1
        self.predict_index.append(index)
        self.targets.append(tokens[targets])
        self.segment_targets.append(len(targets))


def pack_pairs(
    pairs: Sequence[TokenizedPair],
    *,
    share_prompt: bool,
    pad_to_multiple: int,
    pad_token_id: int,
    tail_weight: float | None = None,
    groups: PairGroups | None = None,
) -> PackedBatch:
    """Packs P >= 0 pairs, in the given order, into a run of T tokens. T is the next multiple of `pad_to_multiple`.

    With P = 0 the run is `pad_to_multiple` padding tokens, for a data-parallel rank that has no pair. Raises DataError if
    the prompt of a pair has no tokens, or an answer has no tokens in the loss, and ValueError for pad_to_multiple < 1.
    groups: with share_prompt, what these pairs have in common, which is in the run once, where the first pair that has it
    stands. None: no two pairs have anything in common.
    tail_weight: of the tokens of an answer behind the length of the pair's shorter one, counted in the loss (dpo.ld_alpha).
    No two answers have anything but their prompt in common then.
    """
    if pad_to_multiple < 1:
        raise ValueError(f"pad_to_multiple must be at least 1, got {pad_to_multiple}")
    _refuse_empty(pairs)
    run = _FlatRun()
    answers_of_pairs = _append_pairs(run, pairs, _alone(pairs) if groups is None else groups, share_prompt=share_prompt)
    num_tokens = run.length
    padding = -num_tokens % pad_to_multiple if num_tokens else pad_to_multiple
    if padding:
        run.append(np.full(padding, pad_token_id, dtype=np.int32), 0)
    answer_tokens = np.array(run.answer_tokens, dtype=np.int64)
    # numpy, not torch: a parallel torch operation would start OpenMP threads for the loader's thread. With more threads
    # than cores, training's own threads sleep instead of spinning at every barrier (10% of a CPU step).
    return PackedBatch(
        tokens=_join(run.tokens),
        positions=_join(run.positions),
        segments=tuple(run.segments),
        predict_index=_join(run.predict_index),
        targets=_join(run.targets),
        segment_targets=torch.tensor(run.segment_targets, dtype=torch.int64),
        paths=torch.tensor([number for path in run.paths for number in path], dtype=torch.int64),
        path_segments=torch.tensor([len(path) for path in run.paths], dtype=torch.int64),
        answer_tokens=torch.from_numpy(answer_tokens),
        token_weights=None
        if tail_weight is None
        else torch.from_numpy(_token_weights(answer_tokens, answers_of_pairs, tail_weight)),
        pairs=torch.from_numpy(answers_of_pairs),
        pair_indices=torch.tensor([pair.index for pair in pairs], dtype=torch.int64),
        num_tokens=num_tokens,
        weights=_known([pair.weight for pair in pairs], 1.0),
        reward_gaps=_known([pair.rewards[0] - pair.rewards[1] for pair in pairs], math.nan),
    )


def _known(values: Sequence[float], usual: float) -> torch.Tensor | None:
    """float32 [P], or None if all are `usual`."""
    found = np.array(values, dtype=np.float32)
    usually = np.isnan(found) if math.isnan(usual) else found == usual
    return None if usually.all() else torch.from_numpy(found)


def _alone(pairs: Sequence[TokenizedPair]) -> PairGroups:
    texts = [(pair.prompt_tokens, pair.chosen_tokens, pair.rejected_tokens) for pair in pairs]
    return PairGroups.alone(np.array(texts, dtype=np.int64).reshape(-1, 3))


def _append_pairs(run: _FlatRun, pairs: Sequence[TokenizedPair], groups: PairGroups, *, share_prompt: bool) -> Ints:
    """Adds each distinct answer, group by group. Returns int64 [P, 2]: which answer of the run is the chosen, and which the
    rejected one of each pair."""
    pieces = groups.tree.pieces(np.unique(groups.answers).tolist())
    rows = np.empty((len(pairs), 2), dtype=np.int64)
    members: dict[int, list[int]] = {}
    for number, prompt_number in enumerate(groups.prompts.tolist()):
        members.setdefault(prompt_number, []).append(number)
    for of_prompt in members.values():
        prompt = pairs[of_prompt[0]].prompt_ids
        found: dict[int, tuple[int, TokenIds]] = {}  # number of the answer -> row, ids
        for number in of_prompt:
            pair = pairs[number]
            assert np.array_equal(pair.prompt_ids, prompt), "two prompts have the same hash"
            for side, (ids, mask) in enumerate(pair.answers):
                answer = int(groups.answers[number, side])
                if answer not in found:
                    found[answer] = len(run.answer_tokens), ids
                    whole = [PathPiece(answer, 0, len(prompt) + len(ids))]
                    run.answer(prompt, ids, mask, pieces[answer] if share_prompt else whole)
                rows[number, side], same_ids = found[answer]
                assert np.array_equal(ids, same_ids), "two answers have the same hash"
    return rows


def _token_weights(answer_tokens: Ints, answers_of_pairs: Ints, tail_weight: float) -> np.ndarray:
    """[A] float32: 1 for as many of an answer's tokens as its pair's shorter answer has, and `tail_weight` behind them."""
    assert answers_of_pairs.size == len(answer_tokens), "each answer has one pair"
    shared = np.empty_like(answer_tokens)
    shared[answers_of_pairs] = answer_tokens[answers_of_pairs].min(axis=1, keepdims=True)
    starts = np.cumsum(answer_tokens) - answer_tokens
    place = np.arange(answer_tokens.sum()) - starts.repeat(answer_tokens)
    weights: np.ndarray = np.where(place < shared.repeat(answer_tokens), 1.0, tail_weight).astype(np.float32)
    return weights


def _refuse_empty(pairs: Sequence[TokenizedPair]) -> None:
    problems = [
        Problem(
            where=f"pair {pair.index}",
            value=f"no tokens in its {name}",
            expected="at least one token",
            fix=fix,
        )
        for pair in pairs
        for name, ids, mask, fix in (
            ("prompt", pair.prompt_ids, None, "give the pair a prompt, or use a tokenizer that begins a text with BOS"),
            ("chosen answer", pair.chosen_ids, pair.chosen_mask, "give the pair an answer, or remove it"),
            ("rejected answer", pair.rejected_ids, pair.rejected_mask, "give the pair an answer, or remove it"),
        )
        if len(ids) == 0 or not (mask is None or mask.any())
    ]
    if problems:
        raise DataError(problems)


def _join(pieces: Sequence[np.ndarray]) -> torch.Tensor:
    """Concatenates numpy pieces to one int64 tensor. Its length is 0 if there are none."""
    if not pieces:
        return torch.empty(0, dtype=torch.int64)
    return torch.from_numpy(np.concatenate(pieces).astype(np.int64, copy=False))
