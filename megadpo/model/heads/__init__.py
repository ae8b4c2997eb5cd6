"""The model's end: log-probabilities of given tokens against a vocabulary shard, without a tokens x vocabulary tensor.

A head is one file or folder here, or in a file that the config names in `plugins`: `@LOGPROB_KERNELS.add(name)` on a
LogpsHead. It is read whenever a config is checked, so it imports torch when it first runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from megadpo.config.known import Known
from megadpo.config.problems import Problem
from megadpo.config.variants import Lazy

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
else:  # a config is checked without torch; a file torch.py in this folder would take the place of this name
    torch, dist = Lazy("torch"), Lazy("torch.distributed")


class LogpsHead:
    """Base of the heads."""

    name: str
    priority: ClassVar[int | None] = None
    """With logprob_kernel auto the head with the highest that can run here does. None: by its name only."""

    def problems(self, known: Known) -> Iterator[Problem]:
        """Why it can't run."""
        yield from ()

    def __call__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        *,
        vocab_start: int,
        group: dist.ProcessGroup,
        chunk_tokens: int,
        softcap: float | None = None,
    ) -> torch.Tensor:
        """log softmax(logits)[target], for each row: logits = hidden @ full_weight^T, or with a softcap c
        c tanh(hidden @ full_weight^T / c).

        hidden [A, h], the same on every rank of `group`; weight [V/tp, h], this rank's rows of the output matrix, the
        first being token `vocab_start`; targets [A] int64 in the full vocabulary. Returns [A] in nats, float32 (float64
        for float64 input), the same on every rank. About `chunk_tokens` x V/tp logits exist at a time, in forward and
        backward. Collectives: one all-gather of [2, A] over `group` in forward, none in backward: the gradient of
        `hidden` is this shard's share, to be summed over the group by whatever made `hidden` whole (the backward of
        megatron-core's copy_to or gather_from region).
        """
        raise NotImplementedError


def combine_shards(parts: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp and target's logit over the whole vocabulary, each [A], from this shard's parts [2, A]: its own
    log-sum-exp, and the target's logit or 0 where another shard holds it. Collectives: one all-gather over `group`."""
    if dist.get_world_size(group) == 1:
        return parts[0], parts[1]
    # One collective for all chunks: log-sum-exp is associative, so shards combine afterwards.
    gathered = [torch.empty_like(parts) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, parts, group=group)
    stacked = torch.stack(gathered)
    return stacked[:, 0].logsumexp(dim=0), stacked[:, 1].sum(dim=0)


def log_sum_squares(
    hidden: torch.Tensor, weight: torch.Tensor, *, group: dist.ProcessGroup, chunk_tokens: int
) -> torch.Tensor:
    """log of the sum over the vocabulary of squared probabilities, [A], without gradient: how likely two tokens drawn
    from softmax(hidden @ full_weight^T) are the same. Arguments and chunks as of a head's call, with one projection more.
    Collectives: one all-gather of [2, A] over `group`."""
    with torch.no_grad():
        parts = hidden.new_empty((2, hidden.shape[0]), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = (hidden[rows] @ weight.t()).to(parts.dtype)
            parts[0, rows], parts[1, rows] = logits.logsumexp(dim=1), (2 * logits).logsumexp(dim=1)
        if dist.get_world_size(group) > 1:
            gathered = [torch.empty_like(parts) for _ in range(dist.get_world_size(group))]
            dist.all_gather(gathered, parts, group=group)
            parts = torch.stack(gathered).logsumexp(dim=0)
        return parts[1] - 2 * parts[0]


def sum_per_answer(token_logps: torch.Tensor, answer_tokens: torch.Tensor) -> torch.Tensor:
    """token_logps [A] in answer order, answer_tokens [K] int64 with sum A -> [K] sums of the same dtype, in a fixed order
    of addition (an index_add would make a resumed GPU run differ in the last bits). Added up in float64: on a CPU the
    kernel adds one token after the other, and in float32 an answer of 32,768 tokens would be 0.03 nats off."""
    if answer_tokens.numel() == 0:
        return token_logps.sum()[None][:0]
    sums = torch.segment_reduce(token_logps.double(), "sum", lengths=answer_tokens, unsafe=True)
    return sums.to(token_logps.dtype)
