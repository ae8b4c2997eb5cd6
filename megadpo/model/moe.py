"""Layers with experts for packs: megatron-core's router, dispatchers and experts, without padding tokens.

megatron-core's `padding_mask` only keeps padding out of the load-balancing loss; the experts still compute it. Here a
`Routing` is passed in its place, and the router sends padding to no expert.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megadpo.config.architecture import Router
from megadpo.data.batches.pack import PackedBatch
from megadpo.model.moe_balance import LoadBalance, TokenSets
from megadpo.parallel import send


@dataclass(frozen=True)
class Routing:
    """What layers with experts need of one micro-batch. t: tokens of this rank, with padding."""

    real: torch.Tensor
    """[t] bool: False for padding."""
    num_real: int
    """Number of real tokens, known without waiting for the GPU."""
    sets: TokenSets | None
    """Token sets of the load-balancing loss; None: there is no such loss."""


def plan_routing(batch: PackedBatch, config: TransformerConfig, balance: LoadBalance | None) -> Routing:
    """The routing of `batch` on this rank; made once for each micro-batch.

    balance: None for a model that is not being trained. Collectives: with the 'allgather' dispatcher, the maximum of one
    number over the ranks that share experts, for which the host waits. (That dispatcher needs the same number of tokens on
    each rank, but packs differ in length.)
    """
    groups = get_default_pg_collection()
    shards = groups.tp.size() if config.sequence_parallel else 1
    rank = groups.tp.rank() if config.sequence_parallel else 0
    tokens = batch.tokens.numel()
    local, filled = tokens // shards, tokens // shards
    if config.moe_token_dispatcher_type == "allgather" and groups.tp_ep.size() > 1:
        filled = most_tokens(local, groups.tp_ep, batch.tokens.device)

    def mine(whole: torch.Tensor) -> torch.Tensor:
        return F.pad(whole[..., rank * local : (rank + 1) * local], (0, filled - local))

    device, real = batch.tokens.device, mine(batch.run_index < batch.num_tokens)

    sets = None
    if balance is not None and balance.enabled:
        whole = balance.sets(batch)
        sets = TokenSets(send(mine(whole.members[:, batch.run_index]), device), whole.sizes, whole.weights)
    return Routing(real=send(real, device), num_real=int(real.sum()), sets=sets)


def most_tokens(local: int, group: dist.ProcessGroup, device: torch.device) -> int:
    """The largest `local` of `group`. Collectives: its maximum; the host waits for it."""
    longest = torch.tensor(local, device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    return int(longest)


class PackRouter(TopKRouter):
    """megatron-core's top-k router with our formulas, since it lacks some. Padding goes to no expert."""

    expert_bias: torch.nn.Parameter | None

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: Any = None,
        *,
        router: Router,
        balance: LoadBalance,
        **further: Any,
    ) -> None:
        """further: arguments of newer versions of megatron-core."""
        super().__init__(config, pg_collection, **further)
        self.router, self.balance = router, balance
        if router.correction_bias:
            # Not with megatron-core's moe_router_enable_expert_bias, which would change it after every step. It is a
            # parameter, so that it is loaded and saved like others.
            bias = torch.zeros(self.num_experts, dtype=torch.float32, device=torch.cuda.current_device())
            del self.expert_bias
            self.expert_bias = torch.nn.Parameter(bias, requires_grad=False)
        # moe_utils.py:1192 uses the name always, but defines it only with Transformer Engine
        if not hasattr(moe_utils, "te_general_gemm"):
            moe_utils.te_general_gemm = None

    def routing(self, logits: torch.Tensor, padding_mask: Routing | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [t, 1, E] -> weights [t, E] in the router's dtype, and whether each token goes to each expert [t, E]
        bool."""
        routing = padding_mask
        assert isinstance(routing, Routing)
        logits = logits.flatten(0, -2)
        probs, chosen = expert_weights(logits, self.router, self.topk, self.expert_bias)
        # Without gradients this is the first pass of a recomputed layer; only the second one counts.
        if self.training and routing.sets is not None and torch.is_grad_enabled():
            probs = self.balance.attach(
                probs,
                logits,
                routing.sets,
                topk=self.topk,
                layer_number=self.layer_number,
                group=self.tp_cp_group,
            )
        return probs, chosen & routing.real[:, None]


class ExpertRow(RowParallelLinear):
    """An expert's second projection. It never reduces over ranks, since the dispatcher does. (With one rank megatron-core's
    layer would reduce itself; the result is then its input tensor, to which a bias can't be added in place.)"""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.explicit_expert_comm = True


def expert_weights(
    logits: torch.Tensor, router: Router, topk: int, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [t, E], bias [E] float32 or None -> weights [t, E] of the logits' dtype, 0 for experts that a token doesn't go
    to; and whether it goes there [t, E] bool. router: see config/architecture.py. Sources: Switch Transformers (arXiv
    2101.03961) for softmax, DeepSeek-V3 (arXiv 2412.19437, eq. 12-16) for sigmoids, groups and the bias."""
    if router.scores == "sigmoid":
        scores = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    elif router.scores == "softmax":
        scores = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    else:
        scores = logits
    choice = scores.detach() if bias is None else scores.detach() + bias
    if router.groups > 1:
        choice = _in_best_groups(choice, router)
    top = choice.topk(topk, dim=-1).indices
    weights = scores.gather(1, top)
    if router.scores == "softmax_of_chosen":
        weights = torch.softmax(weights, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    if router.normalized:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=router.least_sum)
    weights = (weights * router.factor).to(logits.dtype)
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, top, True)
    return torch.zeros_like(logits).scatter(1, top, weights), chosen


def _in_best_groups(choice: torch.Tensor, router: Router) -> torch.Tensor:
    """`choice` [t, E], with -inf for experts outside a token's best groups."""
    grouped = choice.unflatten(-1, (router.groups, -1))
    best = grouped.topk(router.best_of_group, dim=-1).values.sum(dim=-1).topk(router.chosen_groups, dim=-1).indices
    kept = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=choice.device).scatter(1, best, True)
    return grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)


class PackAlltoAll(MoEAlltoAllTokenDispatcher):
    """megatron-core's dispatcher with the right number of rows: it would count padding too (0.17 and newer, and its fused
    kernel)."""

    num_real_rows: int

    def preprocess(self, routing_map: torch.Tensor) -> torch.Tensor:
        """routing_map [t, E] bool -> tokens of each local expert."""
        counts = super().preprocess(routing_map)
        self.num_out_tokens = self.num_real_rows
        return counts


class PackMoELayer(MoELayer):
    """megatron-core's layer with experts, for packs whose lengths differ between the ranks that share the experts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(self.token_dispatcher) is MoEAlltoAllTokenDispatcher:  # megatron-core takes no class for it
            self.token_dispatcher.__class__ = PackAlltoAll

    def forward(
        self, hidden_states: torch.Tensor, intermediate_tensors: None = None, padding_mask: Routing | None = None
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [t, 1, h] -> ([t, 1, h], no bias). Collectives: the dispatcher's."""
        assert isinstance(padding_mask, Routing), "PackTransformerLayer hands the routing over"
        mix = functools.partial(self._mix, routing=padding_mask)
        if self.moe_layer_recompute:
            return tensor_parallel.checkpoint(mix, False, hidden_states), None
        return mix(hidden_states), None

    def _mix(self, hidden: torch.Tensor, *, routing: Routing) -> torch.Tensor:
        """megatron-core's steps, with padding up to the number of tokens of `routing`."""
        tokens = hidden.shape[0]
        shared = self.shared_experts_compute(hidden)
        filled = F.pad(hidden, (0, 0, 0, 0, 0, routing.real.numel() - tokens))
        probs, chosen = self.route(filled, routing)
        self.token_dispatcher.num_real_rows = routing.num_real * self.config.moe_router_topk
        dispatched, probs = self.dispatch(*self.preprocess(filled, probs, chosen))
        output, _ = self.routed_experts_compute(dispatched, probs)
        output = self.postprocess(self.combine(output), None)[:tokens]
        return output if shared is None else output + shared
