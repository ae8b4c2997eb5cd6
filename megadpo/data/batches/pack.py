"""Pairs -> one packed micro-batch: a flat run of tokens, and segments of queries over lists of keys.

    share_prompt:  prompt | chosen | rejected            three segments; both answers see the prompt's keys
    else:          prompt+chosen | prompt+rejected       two segments, the prompt computed twice
    padding:       the last segment, attending to itself only

Shape letters: T tokens of the run (padding included), P pairs, A answer tokens of all 2P answers that are in the loss.
Under context parallelism a rank holds part of the run (data/batches/cut.py): its tokens are queries over everyone's keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megadpo.config.problems import DataError, Problem
from megadpo.data.pairs import LossMask, TokenIds, TokenizedPair


@dataclass(frozen=True)
class Segment:
    """Queries [query_start, query_end) of the run, and the ranges of the run whose keys they see, in order.

    Causal and aligned at the bottom right: with K keys in all, the query at query_end - 1 - i sees the first K - i.
    In a whole run the last range ends at query_end. In part of one, queries count the part's tokens, and keys stand as
    the all-gather over the parts lays them out: part 0's tokens, part 1's, ..."""

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
    """What part of a run one context-parallel rank holds: t of its T tokens, the same number on every rank."""

    run_index: torch.Tensor
    """[t] int64, ascending, on the CPU: where in the whole run each token stands."""
    answer_tokens: torch.Tensor
    """[2P] int64: tokens of each answer that this part predicts; sums to its A."""
    run_segments: tuple[Segment, ...]
    """The segments of the whole run."""
    run_tokens: int
    """T."""
    most_work: int
    """Query-key pairs of the part that has most of them."""
    mean_work: float
    """Query-key pairs of all parts, divided by their number."""


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One micro-batch of P pairs, or the part of it that a context-parallel rank holds. Tensors are int64.

    Of a part, T and A count the part's tokens; pairs, `answer_tokens` and `num_tokens` are the whole micro-batch's."""

    tokens: torch.Tensor
    """[T] token ids."""
    positions: torch.Tensor
    """[T] position of each token in its own sequence: both answers start at len(prompt), padding at 0."""
    segments: tuple[Segment, ...]
    """In order, without gap or overlap, from 0 to T; padding is the last one."""
    predict_index: torch.Tensor
    """[A] where in the run the hidden state stands that predicts this answer token. Answer tokens outside the loss
    (turns of users and tools) stand in the run, but not here."""
    targets: torch.Tensor
    """[A] the answer token itself."""
    answer_index: torch.Tensor
    """[A] ascending, in [0, 2P): 2p is the chosen answer of pair p, 2p + 1 its rejected one."""
    answer_tokens: torch.Tensor
    """[2P] tokens per answer that are in the loss; sums to A."""
    pair_indices: torch.Tensor
    """[P] row of the data file."""
    num_tokens: int
    """T without the padding."""
    part: ContextPart | None = None
    """None: the whole run is here."""
    reference_logps: torch.Tensor | None = None
    """[2P] float32: the reference's, where they are known; rows as in `answer_tokens`."""
    made: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    """What the model made of this run of tokens, by what it is (model/attention.py `once`): copies share it."""

    @property
    def num_pairs(self) -> int:
        return self.pair_indices.numel()

    @property
    def padding_tokens(self) -> int:
        """Of the whole run."""
        return self.run_tokens - self.num_tokens

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
        """[T] int64 on the CPU: where in the whole run each token stands."""
        return torch.arange(self.tokens.numel()) if self.part is None else self.part.run_index

    @property
    def predicted_tokens(self) -> torch.Tensor:
        """[2P] int64: tokens of each answer that are predicted here; sums to A."""
        return self.answer_tokens if self.part is None else self.part.answer_tokens

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on `device`; to CUDA through pinned memory and without waiting for the copy."""
        device = torch.device(device)
        to_cuda = device.type == "cuda"

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if to_cuda and tensor.device.type == "cpu" and not tensor.is_pinned():
                tensor = tensor.pin_memory()  # the caching allocator keeps it until the copy is done
            return tensor.to(device, non_blocking=to_cuda)

        return dataclasses.replace(
            self,
            tokens=move(self.tokens),
            positions=move(self.positions),
            predict_index=move(self.predict_index),
            targets=move(self.targets),
            answer_index=move(self.answer_index),
            answer_tokens=move(self.answer_tokens),
            pair_indices=move(self.pair_indices),
            reference_logps=None if self.reference_logps is None else move(self.reference_logps),
            part=self.part and dataclasses.replace(self.part, answer_tokens=move(self.part.answer_tokens)),
        )


class _FlatRun:
    """The flat run while it grows, as lists of numpy pieces."""

    def __init__(self) -> None:
        self.length = 0
        self.tokens: list[TokenIds] = []
        self.positions: list[np.ndarray] = []
        self.segments: list[Segment] = []
        self.predict_index: list[np.ndarray] = []
        self.targets: list[TokenIds] = []
        self.answer_tokens: list[int] = []

    def append(self, pieces: Sequence[TokenIds], first_position: int, seen: tuple[tuple[int, int], ...] = ()) -> int:
        """Adds one segment made of `pieces`, that also sees the ranges `seen` before itself. Returns its start."""
        start = self.length
        self.tokens.extend(pieces)
        self.length += sum(len(piece) for piece in pieces)
        self.positions.append(np.arange(first_position, first_position + self.length - start, dtype=np.int64))
        self.segments.append(Segment(start, self.length, (*seen, (start, self.length))))
        return start

    def predict(self, answer: TokenIds, mask: LossMask | None, answer_start: int, last_prompt_token: int) -> None:
        """The last prompt token predicts the answer's first token; then each answer token the one after it."""
        index = np.arange(answer_start - 1, answer_start - 1 + len(answer), dtype=np.int64)
        index[0] = last_prompt_token
        if mask is not None:
            index, answer = index[mask], answer[mask]
        self.predict_index.append(index)
        self.targets.append(answer)
        self.answer_tokens.append(len(answer))


def pack_pairs(
    pairs: Sequence[TokenizedPair], *, share_prompt: bool, pad_to_multiple: int, pad_token_id: int
) -> PackedBatch:
    """Packs P >= 0 pairs, in the order given, into a run of T tokens, T the next multiple of `pad_to_multiple`.

    With P = 0 the run is `pad_to_multiple` padding tokens: what a data-parallel rank computes that has no pair left.
    Raises DataError for a pair whose prompt or one of whose answers has no tokens, or no tokens in the loss (nothing
    would predict its first token, or there would be nothing to predict), ValueError for pad_to_multiple < 1.
    """
    if pad_to_multiple < 1:
        raise ValueError(f"pad_to_multiple must be at least 1, got {pad_to_multiple}")
    _refuse_empty(pairs)
    run = _FlatRun()
    for pair in pairs:
        prompt = pair.prompt_ids
        answers = ((pair.chosen_ids, pair.chosen_mask), (pair.rejected_ids, pair.rejected_mask))
        if share_prompt:
            prompt_start = run.append([prompt], 0)
            prompt_range = (prompt_start, prompt_start + len(prompt))
            for answer, mask in answers:
                start = run.append([answer], len(prompt), seen=(prompt_range,))
                run.predict(answer, mask, start, last_prompt_token=prompt_range[1] - 1)
        else:
            for answer, mask in answers:
                start = run.append([prompt, answer], 0) + len(prompt)
                run.predict(answer, mask, start, last_prompt_token=start - 1)
    num_tokens = run.length
    padding = -num_tokens % pad_to_multiple if num_tokens else pad_to_multiple
    if padding:
        run.append([np.full(padding, pad_token_id, dtype=np.int32)], 0)
    answer_tokens = np.array(run.answer_tokens, dtype=np.int64)
    # numpy, not torch: a parallel torch operation would give the loader's thread OpenMP threads of its own, and with
    # more of them than cores the training's stop spinning at every barrier (10% of a CPU step).
    answer_index = np.repeat(np.arange(2 * len(pairs)), answer_tokens)
    return PackedBatch(
        tokens=_join(run.tokens),
        positions=_join(run.positions),
        segments=tuple(run.segments),
        predict_index=_join(run.predict_index),
        targets=_join(run.targets),
        answer_index=torch.from_numpy(answer_index),
        answer_tokens=torch.from_numpy(answer_tokens),
        pair_indices=torch.tensor([pair.index for pair in pairs], dtype=torch.int64),
        num_tokens=num_tokens,
    )


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
    """Concatenates numpy pieces to one int64 tensor; of length 0 if there are none."""
    if not pieces:
        return torch.empty(0, dtype=torch.int64)
    return torch.from_numpy(np.concatenate(pieces).astype(np.int64, copy=False))
