"""Multi-head latent attention of packed batches: keys and values of all heads, and in most models queries too, are
projected from narrow latents (DeepSeek-V2, arXiv 2405.04434, section 2.1).

megatron-core's MLASelfAttention takes positions from the place in a sequence, not per token, and has one epsilon for all
norms. Parameters have its names.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megadpo.config.architecture import Attention
from megadpo.model.attention import PackContext, PackedAttention


class ReplicatedLinear(torch.nn.Module):
    """x [..., inputs] @ weight^T; every tensor-parallel rank has the whole weight. With sequence parallelism each rank has
    its own tokens, and the weight is marked so that megatron-core sums its gradient over the ranks."""

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class LatentAttention(MegatronModule):
    """Replaces megatron-core's SelfAttention. RoPE rotates the last channels of a head. For keys these are the same in all
    heads, and are projected from the hidden state together with the latent."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        kind: Attention,
        norm: Any,
        column: Any,
        row: Any,
        pg_collection: Any,
        **_: Any,
    ) -> None:
        """norm, column, row: classes of the layer implementation (model/decoder.py)."""
        super().__init__(config)
        latent = kind.latent
        assert latent is not None
        self.kind, self.latent, self.tp_group = kind, latent, pg_collection.tp
        hidden, heads, group = config.hidden_size, kind.num_heads, {"tp_group": pg_collection.tp}
        usual = {"config": config, "bias": False, "is_expert": False, **group}
        column = functools.partial(
            column, init_method=config.init_method, gather_output=False, skip_bias_add=False, **usual
        )
        norm = functools.partial(norm, config, eps=latent.norm_eps)
        if latent.q_rank is None:
            self.linear_q_proj = column(hidden, heads * kind.head_dim)
        else:
            self.linear_q_down_proj = ReplicatedLinear(config, hidden, latent.q_rank)
            self.q_layernorm = norm(hidden_size=latent.q_rank)
            self.linear_q_up_proj = column(latent.q_rank, heads * kind.head_dim)
        self.linear_kv_down_proj = ReplicatedLinear(config, hidden, latent.kv_rank + latent.rope_dim)
        self.kv_layernorm = norm(hidden_size=latent.kv_rank)
        self.linear_kv_up_proj = column(latent.kv_rank, heads * (kind.head_dim - latent.rope_dim + kind.value_dim))
        self.core_attention = PackedAttention(kind=kind, config=config, pg_collection=pg_collection)
        self.linear_proj = row(
            heads * kind.value_dim,
            hidden,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **usual,
        )
        selective = config.recompute_granularity == "selective"
        self.recomputes_core = selective and "core_attn" in config.recompute_modules

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: None, *, packed_seq_params: PackContext, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [t, 1, h] -> the same shape, and no bias. t: this rank's tokens with sequence parallelism.

        Collectives over the tensor-parallel group: those of the linear layers; for the keys' rotated channels an all-gather
        in forward and a reduce-scatter in backward with sequence parallelism, else an all-reduce in backward. With context
        parallelism those of model/context.py.
        """
        query = self._queries(hidden_states, packed_seq_params)
        key, value = self._keys_and_values(hidden_states, packed_seq_params)

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return self.core_attention.attend(query, key, value, packed_seq_params)

        if self.recomputes_core and self.training:
            out = checkpoint(attend, False, query, key, value)
        else:
            out = attend(query, key, value)
        out, _bias = self.linear_proj(out[:, None])
        return out, None

    def _queries(self, hidden: torch.Tensor, pack: PackContext) -> torch.Tensor:
        """[T, H, D] of this rank's heads."""
        if self.latent.q_rank is None:
            flat, _ = self.linear_q_proj(hidden)
        else:
            flat, _ = self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden)))
        plain, turned = self._apart(flat, self.kind.head_dim - self.latent.rope_dim, self.latent.rope_dim)
        return torch.cat((plain, self._turn(turned, pack)), dim=-1)

    def _keys_and_values(self, hidden: torch.Tensor, pack: PackContext) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, H, D] and [T, H, E] of this rank's heads."""
        latent, turned = self.linear_kv_down_proj(hidden).split((self.latent.kv_rank, self.latent.rope_dim), dim=-1)
        flat, _ = self.linear_kv_up_proj(self.kv_layernorm(latent))
        plain, value = self._apart(flat, self.kind.head_dim - self.latent.rope_dim, self.kind.value_dim)
        if self.config.sequence_parallel:
            turned = gather_from_sequence_parallel_region(turned, group=self.tp_group)
        else:
            turned = copy_to_tensor_model_parallel_region(turned, group=self.tp_group)
        turned = self._turn(turned, pack)
        return torch.cat((plain, turned.expand(-1, plain.shape[1], -1)), dim=-1), value

    def _apart(self, flat: torch.Tensor, *widths: int) -> tuple[torch.Tensor, ...]:
        """[T, 1, H * sum(widths)] -> [T, H, width] of each."""
        return flat.view(flat.shape[0], -1, sum(widths)).split(widths, dim=-1)

    def _turn(self, x: torch.Tensor, pack: PackContext) -> torch.Tensor:
        assert self.kind.rotary is not None
        return pack.rotations[self.kind.rotary](x)
