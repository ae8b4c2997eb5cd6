"""Makes megatron-core's TransformerConfig from the run's config and the architecture."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.activations import quick_gelu
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn import functional as F

from megadpo.config.architecture import Architecture
from megadpo.config.known import Known
from megadpo.config.schema_megatron import MegatronConfig
from megadpo.config.schema_policy import PolicyConfig
from megadpo.model.layers import LayerImplementation, has_apex_kernel

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def transformer_config(
    arch: Architecture,
    policy: PolicyConfig,
    device: torch.device,
    *,
    known: Known,
    layers: LayerImplementation,
    recompute: bool = True,
) -> TransformerConfig:
    """The TransformerConfig of `arch` under `policy`. recompute: False for a model without backward passes."""
    megatron = policy.megatron_cfg
    dtype, attention = DTYPES[policy.precision], arch.attention
    config = TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=_dense_ffn_size(arch),
        num_attention_heads=attention.num_heads,
        num_query_groups=attention.num_kv_heads,
        kv_channels=attention.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norms.eps,
        layernorm_zero_centered_gamma=arch.norms.zero_centred,
        qk_layernorm=attention.qk_norm != "none",
        attention_output_gate=attention.output_gate,
        gated_linear_unit=True,
        **_activation(arch, fused=megatron.bias_activation_fusion, on_cuda=device.type == "cuda"),
        add_bias_linear=attention.output_bias,
        add_qkv_bias=attention.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        hetereogenous_dist_checkpoint=arch.layers_differ,  # megatron-core's spelling: layers have keys of their own
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=megatron.tensor_model_parallel_size,
        sequence_parallel=megatron.sequence_parallel,
        context_parallel_size=megatron.context_parallel_size,
        **_pipeline(megatron, dtype),
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths needs it, also for dense models
        **_experts(arch, policy, layers),
        perform_initialization=False,  # every weight comes from a file
        transformer_impl="transformer_engine" if layers.name == "transformer_engine" else "local",
        # For megatron-core's own linear layers. Transformer Engine's layers need no apex for it (model/layers/).
        gradient_accumulation_fusion=has_apex_kernel(known) and megatron.gradient_accumulation_fusion is not False,
        **_float8(policy),
        masked_softmax_fusion=False,  # not used: megadpo has its own attention
        # The loss is a sum over pairs already divided by the global batch: megatron-core must not divide again by
        # micro-batches or data-parallel ranks. See train/step.py.
        calculate_per_token_loss=True,
        **(_recompute(policy) if recompute else {}),
    )
    if arch.experts is not None:
        # Set after megatron-core's check, which refuses 'allgather' for packs of different lengths. model/moe.py pads them
        # to one length for the experts.
        config.moe_token_dispatcher_type = megatron.moe_token_dispatcher_type
    return config


def _activation(arch: Architecture, *, fused: bool, on_cuda: bool) -> dict[str, Any]:
    """Options for gated MLPs. On GPUs megatron-core's fused kernels are used; on CPUs the layer spec has its own
    (model/activation.py), and megatron-core only checks these options. It chooses its kernel by the gate's function:
    F.gelu means the tanh form there (fused_bias_geglu.py). Its kernel of clamped gates clamps before it adds the bias, so
    on GPUs they use the spec's too."""
    mlp = arch.mlp if arch.experts is None else arch.experts.mlp
    assert mlp is not None
    own = fused and (not on_cuda or mlp.activation == "clamped")
    options: dict[str, Any] = {
        "bias_activation_fusion": fused and not own,
        "use_te_activation_func": own,
        "activation_func": F.silu,
    }
    if mlp.activation == "gelu_tanh":
        options["activation_func"] = F.gelu if fused else functools.partial(F.gelu, approximate="tanh")
    if mlp.activation == "clamped" and not own:
        options |= {
            "activation_func": quick_gelu,
            "activation_func_clamp_value": mlp.limit,
            "glu_linear_offset": 1.0,
        }
    return options


def _dense_ffn_size(arch: Architecture) -> int:
    """MLP width of the dense layers. (megatron-core takes the second projection's size from the config. Experts have their
    own field; without dense layers this value is not used.)"""
    if arch.mlp is not None:
        return arch.mlp.ffn_size
    assert arch.experts is not None
    return arch.experts.mlp.ffn_size


def _pipeline(megatron: MegatronConfig, dtype: torch.dtype) -> dict[str, Any]:
    stages, chunks = megatron.pipeline_model_parallel_size, megatron.virtual_pipeline_model_parallel_size
    return {
        "pipeline_model_parallel_size": stages,
        "pipeline_dtype": dtype if stages > 1 else None,
        "virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
        # In the interleaved schedule, batched sends and receives between the same two ranks would be paired wrongly.
        "overlap_p2p_comm": chunks > 1,
        "batch_p2p_comm": chunks == 1,
        "batch_p2p_sync": False,  # it makes the host wait at every transfer, for a bug in older PyTorch
        "num_layers_in_first_pipeline_stage": megatron.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": megatron.num_layers_in_last_pipeline_stage,
        "variable_seq_lengths": stages > 1,  # packs differ in length
    }


def _float8(policy: PolicyConfig) -> dict[str, Any]:
    """float8 for all linear layers of the decoder; megatron-core enters the recipe around each layer."""
    fp8 = policy.megatron_cfg.fp8_cfg
    return {"fp8": fp8.fp8, "fp8_recipe": fp8.fp8_recipe} if fp8.enabled else {}


def _experts(arch: Architecture, policy: PolicyConfig, layers: LayerImplementation) -> dict[str, Any]:
    """Options for the experts. model/moe.py does load balancing and padding."""
    megatron, experts = policy.megatron_cfg, arch.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.number,
        **({"moe_layer_freq": [int(one.feed_forward == experts) for one in arch.layers]} if arch.mixed else {}),
        "moe_ffn_hidden_size": experts.mlp.ffn_size,
        "moe_router_topk": experts.per_token,
        "moe_router_dtype": megatron.moe_router_dtype,
        "moe_router_load_balancing_type": "none",
        "moe_shared_expert_intermediate_size": experts.shared_ffn_size,
        "moe_shared_expert_gate": experts.shared_ffn_size is not None and experts.shared_gate,
        "moe_grouped_gemm": layers.groups_experts(megatron),
        "expert_model_parallel_size": megatron.expert_model_parallel_size,
        "expert_tensor_parallel_size": megatron.expert_tensor_parallel_size,
    }


def _recompute(policy: PolicyConfig) -> dict[str, Any]:
    megatron = policy.megatron_cfg
    if not megatron.activation_checkpointing:
        return {}
    if megatron.recompute_granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(megatron.recompute_modules)}
    return {
        "recompute_granularity": "full",
        "recompute_method": megatron.recompute_method,
        "recompute_num_layers": megatron.recompute_num_layers,
    }
