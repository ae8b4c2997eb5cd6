"""Attention of a packed batch inside megatron-core's SelfAttention: RoPE by positions, then a kernel over segments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megadpo.config.architecture import Attention, Rotary
from megadpo.data.batches.pack import PackedBatch
from megadpo.model.context import attend_over_context
from megadpo.model.delta_rule import DeltaPlan
from megadpo.model.kernels import AttentionKernel, RaggedPlan
from megadpo.model.norm import RMSNorm, norm_of_all_heads
from megadpo.model.rope import Rotation


def once(batch: PackedBatch, key: Hashable, make: Callable[[], Any]) -> Any:
    """The result of make(), cached in the micro-batch `batch` for all chunks of a stage, and for policy and reference.

    key: everything else that it depends on."""
    if key not in batch.made:
        batch.made[key] = make()
    return batch.made[key]


@dataclass
class PackContext(PackedSeqParams):
    """What every layer needs of a pack. It is passed as megatron-core's `packed_seq_params`."""

    rotations: Mapping[Rotary, Rotation] = field(default_factory=dict)
    cos_sin: Mapping[Rotary, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # for joined attention
    kernel: AttentionKernel | None = None
    plans: Mapping[int | None, Any] = field(default_factory=dict)  # window -> the kernel's plan
    delta_plan: DeltaPlan | None = None  # for delta nets
    routing: Any = None  # for layers of experts (model/moe.py)
    context_group: dist.ProcessGroup | None = None  # ranks with the other parts of the pack; None: this is all of it
    keep_gathered: bool = False  # see model/context.py


class PackedAttention(torch.nn.Module):
    """megatron-core's `core_attention` for packs. It also applies RoPE, with cos and sin that are computed once for each
    micro-batch. (megatron-core's packed form computes them in every layer and waits for the host.) And it applies the
    norms of queries and keys for which megatron-core has no place."""

    def __init__(
        self, *, kind: Attention, config: TransformerConfig, pg_collection: Any, joined: bool = False, **_: Any
    ) -> None:
        """joined: `forward` gets the whole projection, three times."""
        super().__init__()
        self.joined, self.groups = joined, kind.num_kv_heads // pg_collection.tp.size()
        self.kind, self.tp_group, self.eps = kind, pg_collection.tp, config.layernorm_epsilon
        if kind.qk_norm in ("head_after_rope", "width"):
            heads = (kind.num_heads, kind.num_kv_heads) if kind.qk_norm == "width" else (1, 1)
            self.q_layernorm, self.k_layernorm = (RMSNorm(config, count * kind.head_dim, self.eps) for count in heads)
        self.softmax_offset: torch.nn.Parameter | None = None
        """[H], the attention sinks of this rank's heads."""
        if kind.sinks:
            sinks = kind.num_heads // pg_collection.tp.size()
            device = torch.cuda.current_device()
            self.softmax_offset = torch.nn.Parameter(torch.zeros(sinks, dtype=config.params_dtype, device=device))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """The parts of tensors that this rank has, in megatron-core's form."""
        state, axes = self.state_dict(prefix="", keep_vars=True), {"softmax_offset": 0}
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)
        return sharded

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackContext | None = None,
    ) -> torch.Tensor:
        """query [T, H, D], key [T, G, D] and value [T, G, E], heads local to the tensor-parallel rank -> [T, H * E].

        joined: each of the three is the projection [T, (H + 2G) D] instead. T counts this rank's tokens. Collectives: under
        context parallelism those of model/context.py; for norms over all heads an all-reduce of [T, 2] over the
        tensor-parallel group, forward and backward.
        """
        pack = packed_seq_params
        assert isinstance(pack, PackContext) and pack.kernel is not None, "the model was called without a PackContext"
        assert attention_mask is None and attention_bias is None, "segments are the mask"
        if self.joined:
            return self._attend_joined(query, pack)
        if self.kind.qk_norm == "width":
            weights = self.q_layernorm.weight, self.k_layernorm.weight
            query, key = norm_of_all_heads(query, key, *weights, self.eps, self.tp_group)
        if self.kind.rotary is not None:
            rotation = pack.rotations[self.kind.rotary]
            query, key = rotation(query), rotation(key)
        if self.kind.qk_norm == "head_after_rope":
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        return self.attend(query, key, value, pack)

    def _attend_joined(self, mixed: torch.Tensor, pack: PackContext) -> torch.Tensor:
        from megadpo.model.qkv import split_and_turn  # which imports Triton

        rotary, plan = self.kind.rotary, pack.plans[self.kind.window]
        assert rotary is not None
        gathers = plan if isinstance(plan, RaggedPlan) and pack.context_group is None else None
        query, key, value = split_and_turn(
            mixed,
            *pack.cos_sin[rotary],
            gathers,
            groups=self.groups,
            width=self.kind.head_dim,
            interleaved=rotary.interleaved,
        )
        return self.attend(query, key, value, pack, is_prepared=gathers is not None)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pack: PackContext,
        *,
        is_prepared: bool = False,
    ) -> torch.Tensor:
        """As forward, for queries and keys after norms and RoPE. is_prepared: keys and values are as the kernel's
        `prepare` gives them."""
        kind, plan = self.kind, pack.plans[self.kind.window]
        assert pack.kernel is not None
        asked: dict[str, Any] = {"scale": kind.scale, "softcap": kind.logit_softcap, "sinks": self.softmax_offset}
        if pack.context_group is None:
            if not is_prepared:
                key, value = pack.kernel.prepare(key, value, plan)
            out = pack.kernel.attend(query, key, value, plan, **asked)
        else:
            out = attend_over_context(
                pack.kernel,
                query,
                key,
                value,
                plan,
                group=pack.context_group,
                keep_gathered=pack.keep_gathered,
                **asked,
            )
        return out.reshape(query.shape[0], -1)


class GatedSelfAttention(SelfAttention):
    """megatron-core's, with an output gate beside each head's query, as the projection has them in a model's folder.
    megatron-core's own order is all queries of a group and then all gates."""

    def get_query_key_value_tensors(
        self, hidden_states: torch.Tensor, *_: Any, output_gate: bool = False, split_qkv: bool = True, **__: Any
    ) -> tuple[torch.Tensor, ...]:
        """hidden_states [t, 1, h] -> query [T, 1, H, D], key and value [T, 1, G, D], gate [T, 1, H, D], heads local.

        Collectives: those of `linear_qkv`."""
        assert output_gate and split_qkv
        mixed, _bias = self.linear_qkv(hidden_states)
        per_group = self.config.num_attention_heads // self.config.num_query_groups
        mixed = mixed.unflatten(-1, (-1, 2 * per_group + 2, self.hidden_size_per_attention_head))
        queries, key, value = mixed.split((2 * per_group, 1, 1), dim=3)
        query, gate = queries.unflatten(3, (per_group, 2)).flatten(2, 3).unbind(3)
        return self.q_layernorm(query), self.k_layernorm(key.squeeze(3)), value.squeeze(3), gate

    def _apply_output_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """In their own dtype, as transformers does; megatron-core compiles it, for each number of tokens anew."""
        return x * gate.reshape(x.shape).sigmoid()


class JoinedSelfAttention(SelfAttention):
    """megatron-core's, whose projection goes on to PackedAttention whole: it makes queries, keys and values of it."""

    def get_query_key_value_tensors(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        mixed, _bias = self.linear_qkv(hidden_states)
        return mixed, mixed, mixed


class PackTransformerLayer(TransformerLayer):
    """megatron-core's layer for packs. It passes the pack's routing to the experts as `padding_mask`, the only argument that
    megatron-core passes on to them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # by default torch.enable_grad: then a norm there would save its input in evaluation and in recomputed passes
        self.bias_dropout_add_exec_handler = contextlib.nullcontext

    def forward(self, *args: Any, packed_seq_params: Any, **kwargs: Any) -> Any:
        kwargs["padding_mask"] = packed_seq_params.routing
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
