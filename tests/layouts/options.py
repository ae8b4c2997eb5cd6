"""What the matrix is made of: one entry an option that changes how a run is laid out, and must not change what it computes.

A new option needs an entry here and nothing else: while the config check refuses it, the table says so with the check's
reason; once it doesn't, every pair with it must equal one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MEG = "policy.megatron_cfg"
DDP = f"{MEG}.distributed_data_parallel_config"
Values = Mapping[str, object]


@dataclass(frozen=True)
class Option:
    """One row and column of docs/layouts.md."""

    name: str
    about: str
    """Said under the table: which keys, at which values."""
    overrides: Values
    moe_overrides: Values = field(default_factory=dict)
    """In place of some of `overrides`, for a model with experts."""
    data_parallel: int = 1
    """Copies of the model that it takes to mean anything."""
    alters_the_run: bool = False
    """It changes what is trained, by design: the run of one process that it is compared with has it too."""
    moe_only: bool = False
    """Its keys do nothing for a dense model, which the config check notes and lets pass."""
    also_names: tuple[str, ...] = ()
    """Keys beside its own that a refusal of it may name."""


_TP2 = {f"{MEG}.tensor_model_parallel_size": 2}
_PP2 = {f"{MEG}.pipeline_model_parallel_size": 2}
_RECOMPUTE = {f"{MEG}.activation_checkpointing": True}
_FULL = {**_RECOMPUTE, f"{MEG}.recompute_granularity": "full"}
_SELECTIVE = {**_RECOMPUTE, f"{MEG}.recompute_granularity": "selective"}
_MODULES = f"{MEG}.recompute_modules"
_DIST = {f"{MEG}.optimizer.use_distributed_optimizer": True}
_REDUCE = {f"{DDP}.overlap_grad_reduce": True}

OPTIONS: tuple[Option, ...] = (
    Option("TP", "tensor_model_parallel_size 2", _TP2, also_names=(f"{MEG}.sequence_parallel",)),
    Option("SP", "the same with sequence_parallel", {**_TP2, f"{MEG}.sequence_parallel": True}),
    Option("PP", "pipeline_model_parallel_size 2: 4 + 4 layers", _PP2),
    Option("uneven", "the same, 2 + 6 layers", {**_PP2, f"{MEG}.num_layers_in_first_pipeline_stage": 2}),
    Option("VPP", "PP with virtual_pipeline_model_parallel_size 2",
           {**_PP2, f"{MEG}.virtual_pipeline_model_parallel_size": 2}),
    Option("CP", "context_parallel_size 2", {f"{MEG}.context_parallel_size": 2}),
    Option("EP", "expert_model_parallel_size 2", {f"{MEG}.expert_model_parallel_size": 2}),
    Option("ETP", "expert_tensor_parallel_size 2", {f"{MEG}.expert_tensor_parallel_size": 2}),
    Option("DP", "two copies of the model", {}, data_parallel=2),
    Option("dist. optimizer", "DP with use_distributed_optimizer", _DIST, data_parallel=2),
    Option("overlap reduce", "DP with overlap_grad_reduce, several buckets", _REDUCE, data_parallel=2),
    Option("overlap gather", "dist. optimizer with overlap_grad_reduce and overlap_param_gather",
           {**_DIST, **_REDUCE, f"{DDP}.overlap_param_gather": True}, data_parallel=2),
    Option("recompute full", "activation_checkpointing, full, uniform", {**_FULL, f"{MEG}.recompute_method": "uniform"}),
    Option("recompute block", "activation_checkpointing, full, block: the first layer of each stage",
           {**_FULL, f"{MEG}.recompute_method": "block"}),
    Option("recompute parts", "activation_checkpointing, selective: core_attn, layernorm and mlp (with experts: moe)",
           {**_SELECTIVE, _MODULES: ["core_attn", "layernorm", "mlp"]},
           moe_overrides={_MODULES: ["core_attn", "layernorm", "moe"]}),
    Option("unpacked", "sequence_packing.enabled false: two pairs a micro-batch",
           {"policy.sequence_packing.enabled": False}),
    Option("unshared", "sequence_packing.share_prompt false", {"policy.sequence_packing.share_prompt": False}),
    Option("freeze", "policy.freeze: the embedding, layers 0 to 3 and a later one's attention",
           {"policy.freeze": ["model.embed_tokens.weight", "model.layers.{0..3}.*", "model.layers.6.self_attn.*"]},
           alters_the_run=True),
    Option("frozen router", "freeze_moe_router, without load balancing",
           {f"{MEG}.freeze_moe_router": True, f"{MEG}.moe_router_load_balancing_type": "none",
            f"{MEG}.moe_aux_loss_coeff": None}, alters_the_run=True, moe_only=True),
    Option("allgather", "moe_token_dispatcher_type allgather", {f"{MEG}.moe_token_dispatcher_type": "allgather"},
           moe_only=True),
    Option("LoRA", "peft.enabled, on all linear layers; B doesn't start at 0, so A has a gradient from the first step on",
           {f"{MEG}.peft": {"enabled": True, "dim": 4, "alpha": 8, "lora_B_init_method": "xavier"}},
           alters_the_run=True),
)  # fmt: skip
BY_NAME = {option.name: option for option in OPTIONS}
