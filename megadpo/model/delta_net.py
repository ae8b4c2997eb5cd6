"""A gated delta net in the place of attention (Qwen3-Next, Qwen3.5), on packs: each answer goes on from its prompt's states
and from the prompt's last inputs of the convolution, as it would behind the prompt itself.

megatron-core's own GatedDeltaNet needs flash-linear-attention to be built at all, and takes no pack with shared prompts.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn import functional as F

from megadpo.config.architecture import DeltaNet
from megadpo.model.attention import PackContext
from megadpo.model.delta_rule import causal_convolution, gated_delta_rule
from megadpo.model.norm import rms_norm


class GatedDeltaNet(MegatronModule):
    """In the place of megatron-core's SelfAttention. K key heads, each with R value heads; D and E channels of a key and of
    a value. Everything is cut by key heads over tensor-parallel ranks: rows of `linear_in_proj` and channels of the convolution
    stand key head by key head, [query D, key D, values R x E, gates R x E, strengths R, decays R]."""

    SHARDS = ("conv_weight", "A_log", "dt_bias")
    """Parameters of its own that are cut, in their first dimension."""

    def __init__(
        self, config: TransformerConfig, *, kind: DeltaNet, column: Any, row: Any, pg_collection: Any, **_: Any
    ) -> None:
        """column, row: classes of the layer implementation (model/decoder.py)."""
        super().__init__(config)
        self.kind, self.tp_group = kind, pg_collection.tp
        ranks, device = self.tp_group.size(), torch.cuda.current_device()

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.zeros(shape, dtype=config.params_dtype, device=device))

        self.conv_weight = parameter(kind.conv_channels // ranks, 1, kind.conv_width)
        self.A_log = parameter(kind.value_heads // ranks)
        self.dt_bias = parameter(kind.value_heads // ranks)
        self.norm_weight = parameter(kind.value_dim)
        usual = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.linear_in_proj = column(
            config.hidden_size,
            kind.in_channels,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            **usual,
        )
        self.linear_proj = row(
            kind.value_heads * kind.value_dim,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            **usual,
        )

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """As megatron-core asks its modules: which part of which tensors this rank has."""
        sharded: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        own, axes = {name: getattr(self, name) for name in self.SHARDS}, dict.fromkeys(self.SHARDS, 0)
        return sharded | make_sharded_tensors_for_checkpoint(own, prefix, axes, sharded_offsets)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: None, *, packed_seq_params: PackContext, **_: Any
    ) -> tuple[torch.Tensor, None]:
        """hidden_states [t, 1, h] -> the same shape, and no bias. t: this rank's tokens under sequence parallelism.

        Collectives over the tensor-parallel group: those of the linear layers, and in backward an all-reduce of the norm's
        gradient [E]."""
        plan, kind = packed_seq_params.delta_plan, self.kind
        assert plan is not None and packed_seq_params.context_group is None, "the states need the whole pack"
        projected, _bias = self.linear_in_proj(hidden_states)
        each = kind.value_heads // kind.key_heads
        of_values, of_keys = each * kind.value_dim, 2 * kind.key_dim
        by_head = projected.view(projected.shape[0], -1, kind.in_channels // kind.key_heads)
        mixed, gate, strength, step = by_head.split((of_keys + of_values, of_values, each, each), dim=-1)
        mixed = F.silu(causal_convolution(mixed.flatten(1), self.conv_weight[:, 0], plan)).view(mixed.shape)
        query, key, value = mixed.split((kind.key_dim, kind.key_dim, of_values), dim=-1)
        # transformers has these in float32 whatever the dtype of the weights
        decay = -self.A_log.float().exp() * F.softplus(step.flatten(1).float() + self.dt_bias)
        out = gated_delta_rule(
            query, key, value.unflatten(-1, (each, -1)), decay.view(step.shape), strength.sigmoid(), plan
        )
        out = self._gated_norm(out, gate.view(out.shape))
        out, _bias = self.linear_proj(out.reshape(out.shape[0], 1, -1))
        return out, None

    def _gated_norm(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """RMSNorm of each head's values, times silu of its gate, in float32; x and gate [T, K, R, E]."""
        # each rank has its own heads' part of the gradient
        weight = copy_to_tensor_model_parallel_region(self.norm_weight, group=self.tp_group)
        normed = rms_norm(x, weight, self.config.layernorm_epsilon, centre=0.0)
        return (normed * F.silu(gate.float())).to(x.dtype)
