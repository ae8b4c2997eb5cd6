"""A chunk of consecutive pairs as token ids, and the limit on their length (`data.on_too_long`)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from megadpo.config.problems import Problem
from megadpo.config.rules_run import SHORTEST_LIMIT
from megadpo.data.pairs import TokenizedPair
from megadpo.data.sources import MOST_PROBLEMS, Place

OnTooLong = Literal["refuse", "drop", "truncate"]


@dataclass(kw_only=True)
class Chunk:
    """Consecutive pairs of a source: those that are kept, in order, and what happened to the others."""

    places: list[Place]
    """The places of all pairs, kept or not."""
    pairs: Sequence[TokenizedPair] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """Field of DataReport -> count."""
    problems: list[Problem] = field(default_factory=list)
    """The first MOST_PROBLEMS problems of pairs that could not be tokenised."""
    too_long: list[tuple[Place, int]] = field(default_factory=list)
    """Place and tokens of each pair over the limit, if such pairs are refused."""

    @property
    def first_row(self) -> int:
        return self.places[0].row

    def lines(self) -> npt.NDArray[np.int64]:
        """The line of each row from first_row to the last pair's; 0 for rows without a pair."""
        lines = np.zeros(self.places[-1].row + 1 - self.first_row, dtype=np.int64)
        lines[[place.row - self.first_row for place in self.places]] = [place.line for place in self.places]
        return lines


def apply_limit(chunk: Chunk, max_tokens: int, on_too_long: OnTooLong, bos_token_id: int | None) -> None:
    """Limits prompt + longer answer to max_tokens for every pair of the chunk, in place.

    What happens to longer pairs: refuse lists them in `too_long`; drop leaves them out and counts them; truncate calls
    `truncate`, and drops and counts a pair whose answers become equal or have no token left in the loss. Raises
    ValueError for a limit under SHORTEST_LIMIT.
    """
    if max_tokens < SHORTEST_LIMIT:
        raise ValueError(f"max_tokens must be at least {SHORTEST_LIMIT}, got {max_tokens}")
    places = {place.row: place for place in chunk.places}
    kept = []
    for pair in chunk.pairs:
        cut = pair
        if pair.longest_sequence_tokens > max_tokens:
            if on_too_long == "refuse":
                chunk.too_long.append((places[pair.index], pair.longest_sequence_tokens))
                continue
            if on_too_long == "drop":
                chunk.counts["dropped_too_long"] += 1
                continue
            cut = truncate(pair, max_tokens, bos_token_id)
            if np.array_equal(cut.chosen_ids, cut.rejected_ids):
                chunk.counts["dropped_equal_after_truncation"] += 1
                continue
            if not all(mask is None or mask.any() for mask in (cut.chosen_mask, cut.rejected_mask)):
                chunk.counts["dropped_unanswered_after_truncation"] += 1
                continue
            chunk.counts["truncated"] += 1
        kept.append(cut)
    chunk.pairs = kept


def truncate(pair: TokenizedPair, max_tokens: int, bos_token_id: int | None) -> TokenizedPair:
    """The pair cut to max_tokens. The prompt is cut first, because only answers are in the loss.

    The prompt loses tokens at its left, where a conversation is oldest. Its BOS stays, and its last token stays, because
    it predicts the first token of each answer. If that is not enough, answers lose tokens at their right, also EOS."""
    kept = 1 if bos_token_id is not None and pair.prompt_ids[0] == bos_token_id else 0
    longest_answer = max(pair.chosen_tokens, pair.rejected_tokens)
    prompt_tokens = min(pair.prompt_tokens, max(max_tokens - longest_answer, kept + 1))
    start = pair.prompt_tokens - prompt_tokens
    prompt = np.concatenate([pair.prompt_ids[:kept], pair.prompt_ids[start + kept :]])
    end = max_tokens - len(prompt)
    chosen_mask, rejected_mask = (None if mask is None else mask[:end] for _, mask in pair.answers)
    return dataclasses.replace(
        pair,
        prompt_ids=prompt,
        whole_prompt_ids=pair.prompt_ids,
        chosen_ids=pair.chosen_ids[:end],
        rejected_ids=pair.rejected_ids[:end],
        chosen_mask=chosen_mask,
        rejected_mask=rejected_mask,
    )


@dataclass
class TooLong:
    """Pairs over the limit: their number, the longest, and the first few."""

    max_tokens: int
    count: int = 0
    longest_tokens: int = 0
    first: list[tuple[Place, int]] = field(default_factory=list)
    """Place and tokens of the first MOST_PROBLEMS."""

    def add(self, pairs: Sequence[tuple[Place, int]]) -> None:
        """Adds pairs. Each is its place and the tokens of prompt + longer answer."""
        self.count += len(pairs)
        self.longest_tokens = max([self.longest_tokens, *(tokens for _, tokens in pairs)])
        self.first += pairs[: MOST_PROBLEMS - len(self.first)]

    def problems(self) -> list[Problem]:
        """A problem for each of the first pairs."""
        fix = (
            f"raise policy.max_total_sequence_length (the longest of {self.count} such pairs needs "
            f"{self.longest_tokens}), or set data.on_too_long to drop or truncate"
        )
        expected = f"at most {self.max_tokens}"
        return [
            Problem(str(place), f"a pair of {tokens} tokens (prompt and longer answer)", expected, fix)
            for place, tokens in self.first
        ]
