"""The cost of computing a pair. Data-parallel ranks are balanced by it.

It is the number of floating-point operations of one forward pass. Only matrix products count, with 2 operations for each
multiply-add. L layers, hidden size h, H query heads and G key-value heads of size d, MLP width f (of experts: those that a
token goes to, and the shared one), vocabulary V:

    each token          2 L (h d (2 H + 2 G) + 3 h f)     projections and the gated MLP
    each answer token   2 h V                             the head; prompt tokens are not projected
    each query-key pair 4 L H d                           scores and weighted values, for the keys that a query sees; in
                                                          layers with a window, those within it
    instead of these,   6 V D E for each token            reading and writing the states [D, E] of a delta net's V heads

A backward pass costs 2 times that; in attention kernels that recompute the scores, 2.5 times. So the true share of
attention is up to 1/8 higher in a training step with a reference pass. Norms, softmax, padding and the optimizer are left
out: they are small, or equal on every rank. All numbers are integers, because every rank must compute the same deal, and
sums of floats may differ between CPUs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megadpo.config.architecture import Architecture, DeltaNet, Mlp

UNITS_PER_TOKEN = 16
"""The unit of work is 1/16 of a token's cost in the layers, without attention."""


@dataclass(frozen=True)
class WorkModel:
    """Operations of a model's forward pass."""

    per_token: int
    per_answer_token: int
    """In addition to per_token."""
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
            per_token += 2 * (one.weights(arch.hidden_size) + 3 * channels * arch.hidden_size)
            if isinstance(one, DeltaNet):
                per_token += 2 * one.state_products
            else:
                per_query_key[one.window] += 2 * one.num_heads * (one.head_dim + one.value_dim)
        return cls(
            per_token=per_token,
            per_answer_token=2 * arch.hidden_size * arch.vocab_size,
            per_query_key=per_query_key,
        )

    def pair_work(self, text_tokens: npt.NDArray[np.int64], *, share_prompt: bool) -> npt.NDArray[np.int64]:
        """int64 [N]: work of each pair. text_tokens: int64 [N, 3], tokens of prompt, chosen and rejected."""
        prompt, chosen, rejected = text_tokens.T
        answers = chosen + rejected
        tokens = (1 if share_prompt else 2) * prompt + answers
        keys = {window: query_keys(text_tokens, share_prompt=share_prompt, window=window) for window in self.windows}
        return self.work(tokens, answers, keys)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of its layers."""
        return tuple(self.per_query_key)

    def work(
        self,
        tokens: npt.NDArray[np.int64],
        answers: npt.NDArray[np.int64],
        keys: Mapping[int | None, npt.NDArray[np.int64]],
    ) -> npt.NDArray[np.int64]:
        """int64 [N], from counts, each int64 [N]: all tokens, those in answers, and query-key pairs by window."""
        # Divided by their common factor, so that the longest pairs of the largest models fit into int64
        common = math.gcd(self.per_token, self.per_answer_token, *self.per_query_key.values())
        per_token = self.per_token // common
        total = per_token * tokens + self.per_answer_token // common * answers
        for window, operations in self.per_query_key.items():
            total += operations // common * keys[window]
        work: npt.NDArray[np.int64] = UNITS_PER_TOKEN * total // per_token
        return work

    def attention(self, text_tokens: npt.NDArray[np.int64], *, share_prompt: bool) -> int:
        """Operations on query-key pairs, of all pairs of texts together."""
        keys = {w: int(query_keys(text_tokens, share_prompt=share_prompt, window=w).sum()) for w in self.per_query_key}
        return sum(operations * keys[window] for window, operations in self.per_query_key.items())


def query_keys(
    text_tokens: npt.NDArray[np.int64], *, share_prompt: bool, window: int | None = None
) -> npt.NDArray[np.int64]:
    """int64 [N]: keys that the queries of a pair see, summed over them; causal, and of the last `window` ones.

    text_tokens: [N, 1 + K], a prompt and its answers; 0 where there are fewer than K."""
    prompt, *answers = text_tokens.T
    before = keys_up_to(prompt, window)
    in_answers = sum(keys_up_to(prompt + answer, window) - before for answer in answers)
    copies = 1 if share_prompt else (text_tokens[:, 1:] > 0).sum(axis=1)
    return np.asarray(copies * before + in_answers, dtype=np.int64)


def keys_up_to(tokens: npt.NDArray[np.int64], window: int | None) -> npt.NDArray[np.int64]:
    """int64 [N]: keys that the first `tokens` queries of a sequence see, summed over them."""
    near = tokens if window is None else np.minimum(tokens, window)
    return np.asarray(near * (near + 1) // 2 + (tokens - near) * near, dtype=np.int64)
