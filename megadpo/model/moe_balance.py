"""The load-balancing loss of layers with experts.

For one layer and one set of tokens (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6, for top-k routing as in megatron-core's
switch_load_balancing_loss_func):

    loss = E * sum over experts e of f_e * P_e        1 if all experts get equal shares

E: number of experts. f_e: share of the set's choices (k for each token) that are expert e. P_e: mean over the set of the
softmax over all experts. The sets of tokens, and their weights in the mean over the global batch:

    aux_loss      the real tokens of a micro-batch, weighted by their number, as in megatron-core with per-token loss
    seq_aux_loss  each answer with its prompt, weighted by the number of its pairs; independent of the micro-batches

Its gradient, that of coefficient * (sum over layers of the mean), is added to the DPO loss's. Padding is in no set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from megadpo.data.batches.pack import PackedBatch, Segment
from megadpo.parallel import send

Kind = Literal["none", "aux_loss", "seq_aux_loss"]


@dataclass(frozen=True)
class TokenSets:
    """The token sets of one micro-batch. Q sets, t tokens of this rank."""

    members: torch.Tensor
    """[Q, t] float32: 1 where the token is in the set."""
    sizes: torch.Tensor
    """[Q] float32: tokens of the set, over all ranks with parts of the micro-batch."""
    weights: torch.Tensor
    """[Q] float32: weight of the set. The mean divides by the sum of the weights over the global batch."""


class LoadBalance:
    """The load-balancing loss: its options, and sums over the micro-batches of a global batch."""

    def __init__(self, kind: Kind, coefficient: float, layers: Sequence[int], device: torch.device) -> None:
        """layers: numbers of the layers with experts, from 0."""
        self.kind = kind
        self.coefficient = coefficient
        self.layers = tuple(layers)
        self._sums = torch.zeros(max(self.layers) + 1, dtype=torch.float64, device=device)
        self._total_weight: float | None = None

    @property
    def enabled(self) -> bool:
        return self.kind != "none" and self.coefficient > 0

    def start(self, *, num_tokens: int, num_pairs: int) -> None:
        """Call it before the micro-batches of a global batch, with its real tokens and pairs over all ranks. Clears the
        sums."""
        self._sums.zero_()
        self._total_weight = float(num_tokens if self.kind == "aux_loss" else 2 * num_pairs)

    def sets(self, batch: PackedBatch) -> TokenSets:
        """The sets of a whole micro-batch: members [Q, tokens of the whole run], on the CPU, before they are cut for
        ranks."""
        ranges: list[tuple[tuple[int, int], ...]] = [((0, batch.num_tokens),)] if batch.num_tokens else []
        if self.kind == "seq_aux_loss":
            ranges = answer_sequences(batch.run_segments, batch.num_tokens)
        members = torch.zeros(len(ranges), batch.run_tokens)
        for row, parts in enumerate(ranges):
            for start, end in parts:
                members[row, start:end] = 1.0
        sizes = members.sum(dim=1)
        device = self._sums.device
        if self.kind == "aux_loss":
            return TokenSets(members, send(sizes, device), send(sizes, device))
        pairs_of_answer = torch.zeros(len(ranges), device=device)
        pairs_of_answer.index_add_(0, batch.pairs.flatten().to(device), torch.ones(batch.pairs.numel(), device=device))
        return TokenSets(members, send(sizes, device), pairs_of_answer)

    def attach(
        self,
        probs: torch.Tensor,
        logits: torch.Tensor,
        sets: TokenSets,
        *,
        topk: int,
        layer_number: int,
        group: dist.ProcessGroup,
    ) -> torch.Tensor:
        """Returns `probs` [t, E] unchanged. The backward pass adds the gradient of this layer's loss, from `logits` [t, E].

        group: ranks with parts of this micro-batch. Each computes its own tokens' part of P_e, so the loss and its gradient
        are sums over the ranks. Collectives: one all-reduce of [Q, E] over `group`.
        """
        assert self._total_weight is not None, "LoadBalance.start comes before the first micro-batch"
        scores = torch.softmax(logits, dim=-1, dtype=torch.float32)
        loss = balance_loss(scores, sets, topk=topk, group=group) / self._total_weight
        self._sums[layer_number - 1] += loss.detach()
        attached: torch.Tensor = _Attach.apply(probs, self.coefficient * loss)
        return attached

    def reduced(self) -> torch.Tensor:
        """[layers] float64: the mean over the global batch, without the coefficient; 0 for layers without experts.

        Collectives: if the loss is on, one all-reduce over the world. Tensor- and context-parallel ranks have parts of a
        micro-batch, data-parallel ranks other micro-batches, pipeline ranks other layers.
        """
        if self.enabled:
            dist.all_reduce(self._sums)
        return self._sums


def balance_loss(scores: torch.Tensor, sets: TokenSets, *, topk: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Weighted sum over the sets of this rank's part of E * sum of f_e * P_e; scores [t, E] float32, a softmax."""
    num_experts = scores.shape[1]
    with torch.no_grad():
        chosen = torch.zeros_like(scores).scatter_(1, scores.topk(topk, dim=1).indices, 1.0)
        counts = sets.members @ chosen
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(counts, group=group)
        share = counts / (topk * sets.sizes[:, None])
    mean = (sets.members @ scores) / sets.sizes[:, None]
    return (sets.weights * num_experts * (share * mean).sum(dim=1)).sum()


def answer_sequences(segments: Sequence[Segment], num_tokens: int) -> list[tuple[tuple[int, int], ...]]:
    """The ranges of each answer with its prompt. (Answers are the segments that no other segment sees.)"""
    seen = {keys for segment in segments for keys in segment.keys[:-1]}
    return [s.keys for s in segments if (s.query_start, s.query_end) not in seen and s.query_end <= num_tokens]


def balance_metrics(balances: Iterable[LoadBalance], *, per_layer: bool) -> dict[str, float]:
    """`moe_aux_loss`, the mean over the layers with experts, and (per_layer) `moe_aux_loss_layer_<n>`, n from 0; empty if the
    loss is off. All ranks call it. Collectives: an all-reduce for each of `balances`. Waits for the device as often."""
    on = [balance for balance in balances if balance.enabled]
    if not on:
        return {}
    sums = [sum(chunk) for chunk in zip(*(balance.reduced().tolist() for balance in on), strict=True)]
    layers = {number: sums[number] for number in on[0].layers}
    metrics = {"moe_aux_loss": sum(layers.values()) / len(layers)}
    if per_layer:
        metrics |= {f"moe_aux_loss_layer_{number}": value for number, value in layers.items()}
    return metrics


class _Attach(torch.autograd.Function):
    """The identity of `x`; the gradient of `loss` is 1. (megatron-core's MoEAuxLossAutoScaler does the same with a scale that
    its schedules set.)"""

    @staticmethod
    def forward(ctx, x, loss):  # type: ignore[no-untyped-def]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, torch.ones((), dtype=torch.float32, device=grad.device)
