"""Heads: log-probabilities of given tokens from hidden states and a vocabulary shard, without a tokens x vocabulary tensor.

A head is one file or folder here, or a file that the config names in `plugins`: `@LOGPROB_KERNELS.add(name)` on a
LogpsHead. Every config check imports it, so it must import torch only when it first runs.
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
else:  # a config is checked without torch. No file here may be called torch.py: it would hide this name
    torch, dist = Lazy("torch"), Lazy("torch.distributed")


class LogpsHead:
    """Base of the heads."""

    name: str
    priority: ClassVar[int | None] = None
    """logprob_kernel auto takes the head with the highest priority that can run here. None: it must be named."""

    def problems(self, known: Known) -> Iterator[Problem]:
        """Reasons why it can't run."""
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
        """log softmax(logits)[target] of each row; logits = hidden @ full_weight^T, or with a softcap c
        c tanh(hidden @ full_weight^T / c).

        hidden [A, h], the same on every rank of `group`. weight [V/tp, h]: this rank's rows of the output matrix; the first
        is for token `vocab_start`. targets [A] int64 in the full vocabulary. Returns [A] in nats, float32 (float64 for
        float64 input), the same on every rank. About `chunk_tokens` x V/tp logits exist at a time, in forward and
        backward. Collectives: one all-gather of [2, A] over `group` in forward, none in backward: the gradient of `hidden`
        is this shard's part, which the backward of megatron-core's copy_to or gather_from region sums over the group.
        """
        raise NotImplementedError


def combine_shards(parts: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp over the whole vocabulary, and the target's logit, each [A]. parts [2, A]: this shard's log-sum-exp, and
    the target's logit, or 0 if another shard has it. Collectives: one all-gather over `group`."""
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
    """log of the sum over the vocabulary of squared probabilities, [A], without gradient: the log-probability that two tokens
    drawn from softmax(hidden @ full_weight^T) are equal. Arguments and chunks as in a head's call. Costs one more
    projection. Collectives: one all-gather of [2, A] over `group`."""
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


def sum_per_answer(
    token_logps: torch.Tensor, segment_targets: torch.Tensor, paths: torch.Tensor, path_segments: torch.Tensor
) -> torch.Tensor:
    """token_logps [A] of the targets, and segment_targets, paths and path_segments [K] of a PackedBatch -> [K] sums over the
    answers' tokens, of the same dtype. The order of addition is fixed (with index_add a resumed GPU run would differ in the
    last bits). It adds in float64: on a CPU the kernel adds token by token, and in float32 the sum of 32,768 tokens would be
    wrong by 0.03 nats."""
    if path_segments.numel() == 0:
        return token_logps.sum()[None][:0]
    of_segments = torch.segment_reduce(token_logps.double(), "sum", lengths=segment_targets, unsafe=True)
    # Indexed, not index_select: on a GPU the gradients of a segment in several paths are then summed in a fixed order
    sums = torch.segment_reduce(of_segments[paths], "sum", lengths=path_segments, unsafe=True)
    return sums.to(token_logps.dtype)
