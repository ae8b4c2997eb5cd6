"""The two forms of a preference pair: text as a file holds it, and token ids as the model sees it.

No torch here. Formats (formats.py) make `PreferencePair`s, tokenization.py makes `TokenizedPair`s, pack.py makes
micro-batches of those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

TokenIds: TypeAlias = npt.NDArray[np.int32]
"""Token ids of one text, int32 [n]."""

Message: TypeAlias = Mapping[str, Any]
"""One chat message: `role` and `content` are strings; further keys (`reasoning_content`, `tool_calls`, `name`, ...)
reach the chat template as they are, except that arguments of tool calls are objects even where the file has JSON text."""

LossMask: TypeAlias = npt.NDArray[np.bool_]
"""Whether each token of an answer is in the loss, bool [n]."""


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Two answers to one prompt, before tokenisation. Each field is a text or a tuple of messages.

    An answer of several messages ends in the assistant's; the others may be the user's, a tool's or the assistant's.
    """

    prompt: str | tuple[Message, ...]
    chosen: str | tuple[Message, ...]
    rejected: str | tuple[Message, ...]
    row: int
    """Row of the file, from 0, blank lines not counted."""
    line: int
    """Line of the file, from 1; of a Parquet or Arrow file, a folder or a hub dataset, the row from 1."""
    path: str
    tools: tuple[Mapping[str, Any], ...] | None = None
    """Tools that the chat template is told of."""
    is_transcript: bool = False
    """The three texts are parts of Human/Assistant transcripts (formats_transcript.py). With a chat template their
    turns become messages."""

    @property
    def source(self) -> str:
        """`file:line`, as error messages name it."""
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, eq=False)
class TokenizedPair:
    """A pair as token ids, each int32 [n]. `prompt_ids + chosen_ids` is one sequence of the model, and
    `prompt_ids + rejected_ids` the other; the answers hold their end-of-sequence token."""

    index: int
    """Row of the file, from 0: what logs and evaluation files call the pair."""
    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    chosen_mask: LossMask | None = None
    """None: every token of the answer is in the loss. Otherwise at least one is."""
    rejected_mask: LossMask | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def chosen_tokens(self) -> int:
        return len(self.chosen_ids)

    @property
    def rejected_tokens(self) -> int:
        return len(self.rejected_ids)

    @property
    def longest_sequence_tokens(self) -> int:
        """Length of the longer of prompt+chosen and prompt+rejected: what `max_total_sequence_length` bounds."""
        return self.prompt_tokens + max(self.chosen_tokens, self.rejected_tokens)

    def packed_tokens(self, *, share_prompt: bool) -> int:
        """Tokens that the pair takes in a pack: the prompt counts once if shared, else twice."""
        prompts = 1 if share_prompt else 2
        return prompts * self.prompt_tokens + self.chosen_tokens + self.rejected_tokens


def with_mask(ids: TokenIds, mask: LossMask | None) -> TokenIds:
    """Ids and loss mask in one int32 array, as data is kept and hashed: a token outside the loss as its complement."""
    return ids if mask is None else np.where(mask, ids, ~ids)


def without_mask(stored: TokenIds) -> tuple[TokenIds, LossMask | None]:
    """What `with_mask` was made of; a view of the ids where every token is in the loss."""
    mask = stored >= 0
    return (stored, None) if mask.all() else (np.where(mask, stored, ~stored), mask)


def largest_id(stored: TokenIds) -> int:
    """The largest token id of an array that `with_mask` made."""
    return max(int(stored.max()), ~int(stored.min()))
