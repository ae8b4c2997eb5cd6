"""How much a pair costs to compute: what data-parallel ranks are balanced by.

Floating-point operations of one forward pass, counting matrix products, 2 for each multiply and add, with L layers,
hidden size h, H query heads and G key-value heads of size d, MLP width f (of experts: those that a token goes to, and the
shared one), vocabulary V:

    each token          2 L (h d (2 H + 2 G) + 3 h f)     projections and the gated MLP
    each answer token   2 h V                             the head; prompt tokens are not projected
    each query-key pair 4 L H d                           scores and weighted values, of keys a query sees: in layers with
                                                          a window, those within it

A backward pass costs twice that, in attention kernels that recompute the scores two and a half times, so that the true
weight of attention is up to an eighth higher with a reference pass beside it. Left out because it is small or the same
on every rank: norms, the softmax, padding, the optimizer. Whole numbers throughout: every rank must come to the same
plan, and sums of floats may differ between CPUs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megadpo.config.architecture import Architecture, Mlp

UNITS_PER_TOKEN = 16
"""Work is counted in sixteenths of what one token costs in the layers, attention apart."""


@dataclass(frozen=True)
class WorkModel:
    """Operations of a model."""

    per_token: int
    per_answer_token: int
    """What comes on top of per_token."""
    per_query_key: Mapping[int | None, int]
    """By the window of the layers: None where queries see all keys before them."""

    @classmethod
    def of(cls, arch: Architecture) -> WorkModel:
        """The formulas above."""
        per_token, per_query_key = 0, Counter[int | None]()
        for layer in arch.layers:
            one, mlp = layer.attention, layer.feed_forward
            if isinstance(mlp, Mlp):
                channels = mlp.ffn_size
            else:
                channels = mlp.per_token * mlp.mlp.ffn_size + (mlp.shared_ffn_size or 0)
            heads = (one.num_heads + one.num_kv_heads) * (one.head_dim + one.value_dim)
            per_token += 2 * arch.hidden_size * (heads + 3 * channels)
            per_query_key[one.window] += 2 * one.num_heads * (one.head_dim + one.value_dim)
        return cls(
            per_token=per_token,
            per_answer_token=2 * arch.hidden_size * arch.vocab_size,
            per_query_key=per_query_key,
        )

    def pair_work(self, text_tokens: npt.NDArray[np.int64], *, share_prompt: bool) -> npt.NDArray[np.int64]:
        """int64 [N], in units of 1 / UNITS_PER_TOKEN, from int64 [N, 3]: tokens of prompt, chosen and rejected."""
        prompt, chosen, rejected = text_tokens.T
        answers = chosen + rejected
        tokens = (1 if share_prompt else 2) * prompt + answers
        # In lowest terms, so that the longest pairs of the largest models stay within int64
        common = math.gcd(self.per_token, self.per_answer_token, *self.per_query_key.values())
        per_token = self.per_token // common
        total = per_token * tokens + self.per_answer_token // common * answers
        for window, operations in self.per_query_key.items():
            total += operations // common * query_keys(text_tokens, share_prompt=share_prompt, window=window)
        work: npt.NDArray[np.int64] = UNITS_PER_TOKEN * total // per_token
        return work

    def attention(self, text_tokens: npt.NDArray[np.int64], *, share_prompt: bool) -> int:
        """Operations on query-key pairs, of all pairs of texts together."""
        keys = {w: int(query_keys(text_tokens, share_prompt=share_prompt, window=w).sum()) for w in self.per_query_key}
        return sum(operations * keys[window] for window, operations in self.per_query_key.items())


def query_keys(
    text_tokens: npt.NDArray[np.int64], *, share_prompt: bool, window: int | None = None
) -> npt.NDArray[np.int64]:
    """int64 [N]: keys that the queries of a pair see, summed over them; causal, and of the last `window` ones."""

    def up_to(place: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Seen by the first `place` tokens of a sequence."""
        near = place if window is None else np.minimum(place, window)
        return near * (near + 1) // 2 + (place - near) * near

    prompt, chosen, rejected = text_tokens.T
    in_answers = sum(up_to(prompt + answer) - up_to(prompt) for answer in (chosen, rejected))
    return np.asarray((1 if share_prompt else 2) * up_to(prompt) + in_answers, dtype=np.int64)
