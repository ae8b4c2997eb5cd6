"""Pairs longer than `max_total_sequence_length`: refused, dropped or cut (`data.on_too_long`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from megadpo.config.problems import DataError, Problem
from megadpo.config.rules_run import SHORTEST_LIMIT
from megadpo.data.pairs import TokenizedPair
from megadpo.data.sources.rows import MOST_PROBLEMS

OnTooLong = Literal["refuse", "drop", "truncate"]


@dataclass
class Limited:
    """What the limit left, in order, and how much it took."""

    pairs: list[TokenizedPair] = field(default_factory=list)
    dropped_too_long: int = 0
    truncated: int = 0
    """Pairs kept that had to be cut."""
    dropped_equal_after_truncation: int = 0
    dropped_unanswered_after_truncation: int = 0
    """Pairs whose cut took every token in the loss from an answer of several turns."""


def apply_limit(
    pairs: Sequence[TokenizedPair],
    *,
    max_tokens: int,
    on_too_long: OnTooLong,
    sources: Sequence[str],
    bos_token_id: int | None,
) -> Limited:
    """Holds every pair to prompt + longer answer <= max_tokens.

    refuse: DataError that names the pairs by their `sources` (file:line). drop: without them. truncate: `truncate`;
    a pair whose answers become equal by that, or lose all that is in the loss, is dropped and counted. Raises
    ValueError for a limit under SHORTEST_LIMIT.
    """
    if max_tokens < SHORTEST_LIMIT:
        raise ValueError(f"max_tokens must be at least {SHORTEST_LIMIT}, got {max_tokens}")
    limited = Limited()
    too_long = [number for number, pair in enumerate(pairs) if pair.longest_sequence_tokens > max_tokens]
    if on_too_long == "refuse" and too_long:
        found = TooLong()
        found.add([(sources[number], pairs[number].longest_sequence_tokens) for number in too_long])
        raise DataError(too_long_problems(found, max_tokens))
    over = set(too_long)
    for number, pair in enumerate(pairs):
        if number not in over:
            limited.pairs.append(pair)
        elif on_too_long == "drop":
            limited.dropped_too_long += 1
        else:
            cut = truncate(pair, max_tokens, bos_token_id)
            if np.array_equal(cut.chosen_ids, cut.rejected_ids):
                limited.dropped_equal_after_truncation += 1
            elif not all(mask is None or mask.any() for mask in (cut.chosen_mask, cut.rejected_mask)):
                limited.dropped_unanswered_after_truncation += 1
            else:
                limited.pairs.append(cut)
                limited.truncated += 1
    return limited


def truncate(pair: TokenizedPair, max_tokens: int, bos_token_id: int | None) -> TokenizedPair:
    """The pair cut to max_tokens: answers before prompt, because only answers are learned from.

    The prompt loses tokens at its left, where a transcript is oldest; a BOS at its start stays, and so does its last
    token, which predicts the answers' first. If that is not enough, answers lose their right end, EOS with it."""
    kept = 1 if bos_token_id is not None and pair.prompt_ids[0] == bos_token_id else 0
    longest_answer = max(pair.chosen_tokens, pair.rejected_tokens)
    prompt_tokens = min(pair.prompt_tokens, max(max_tokens - longest_answer, kept + 1))
    start = pair.prompt_tokens - prompt_tokens
    prompt = np.concatenate([pair.prompt_ids[:kept], pair.prompt_ids[start + kept :]])
    room = max_tokens - len(prompt)
    masks = [None if mask is None else mask[:room] for mask in (pair.chosen_mask, pair.rejected_mask)]
    return TokenizedPair(pair.index, prompt, pair.chosen_ids[:room], pair.rejected_ids[:room], *masks)


@dataclass
class TooLong:
    """Pairs over the limit: how many, the longest, and the first of them."""

    count: int = 0
    longest_tokens: int = 0
    first: list[tuple[str, int]] = field(default_factory=list)
    """file:line and tokens, of at most MOST_PROBLEMS."""

    def add(self, pairs: Sequence[tuple[str, int]]) -> None:
        """Further pairs, by file:line and tokens of prompt and longer answer."""
        self.count += len(pairs)
        self.longest_tokens = max([self.longest_tokens, *(tokens for _, tokens in pairs)])
        self.first += pairs[: MOST_PROBLEMS - len(self.first)]


def too_long_problems(found: TooLong, max_tokens: int) -> list[Problem]:
    """What to say about them; nothing if there are none."""
    fix = (
        f"raise policy.max_total_sequence_length (the longest of {found.count} such pairs needs "
        f"{found.longest_tokens}), or set data.on_too_long to drop or truncate"
    )
    return [
        Problem(
            where=source,
            value=f"a pair of {tokens} tokens (prompt and longer answer)",
            expected=f"at most {max_tokens}",
            fix=fix,
        )
        for source, tokens in found.first
    ]
