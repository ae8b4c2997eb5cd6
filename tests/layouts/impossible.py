"""Layouts that can't be: each must be refused by name, with its reason, before any process group is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tests.layouts.options import DDP, MEG

_TP, _PP = f"{MEG}.tensor_model_parallel_size", f"{MEG}.pipeline_model_parallel_size"
_VPP, _SP = f"{MEG}.virtual_pipeline_model_parallel_size", f"{MEG}.sequence_parallel"
_CP = f"{MEG}.context_parallel_size"
_PRODUCT = f"{_TP} x pipeline_model_parallel_size"
_EP, _ETP = f"{MEG}.expert_model_parallel_size", f"{MEG}.expert_tensor_parallel_size"
_FIRST, _LAST = f"{MEG}.num_layers_in_first_pipeline_stage", f"{MEG}.num_layers_in_last_pipeline_stage"
_BATCH, _UNPACKED = "policy.train_global_batch_size", {"policy.sequence_packing.enabled": False}
_PARTS = {f"{MEG}.activation_checkpointing": True, f"{MEG}.recompute_granularity": "selective"}
_MODULES = f"{MEG}.recompute_modules"


@dataclass(frozen=True)
class Impossible:
    """A model of tests/layouts/models.py, processes, overrides, and the field that the refusal names."""

    model: str
    world_size: int
    values: Mapping[str, object]
    field: str


IMPOSSIBLE: tuple[Impossible, ...] = (
    # An option without what it needs
    Impossible("dense", 1, {_SP: True}, _SP),
    Impossible("dense", 2, {_VPP: 2}, _VPP),
    Impossible("dense", 2, {_FIRST: 2}, _FIRST),
    Impossible("dense", 2, {_LAST: 2}, _LAST),
    Impossible("dense", 2, {f"{DDP}.overlap_param_gather": True, f"{DDP}.overlap_grad_reduce": True},
               f"{DDP}.overlap_param_gather"),
    Impossible("dense", 2, {f"{DDP}.overlap_param_gather": True, f"{MEG}.optimizer.use_distributed_optimizer": True},
               f"{DDP}.overlap_param_gather"),
    Impossible("MoE", 2, {_TP: 2}, _SP),
    Impossible("dense", 2, {_TP: 2, _SP: True, "policy.make_sequence_length_divisible_by": 3},
               "policy.make_sequence_length_divisible_by"),
    # More ranks than there are, or a number that doesn't divide them
    Impossible("dense", 1, {_TP: 2}, _PRODUCT),
    Impossible("dense", 3, {_PP: 2}, _PRODUCT),
    Impossible("tied", 2, {_TP: 2, _PP: 2}, _PRODUCT),
    Impossible("dense", 3, {_CP: 2}, f"{_PRODUCT} x context_parallel_size"),
    Impossible("dense", 2, {_CP: 2, "policy.make_sequence_length_divisible_by": 3},
               "policy.make_sequence_length_divisible_by"),
    Impossible("MoE", 1, {_EP: 2}, f"{_EP} x expert_tensor_parallel_size"),
    Impossible("MoE", 2, {_EP: 2, _ETP: 2}, f"{_EP} x expert_tensor_parallel_size"),
    Impossible("MoE", 4, {_EP: 4, _PP: 2}, f"{_EP} x expert_tensor_parallel_size"),
    # What the model's shape doesn't divide by
    Impossible("dense", 3, {_TP: 3}, _TP),
    Impossible("dense", 4, {_TP: 4}, _TP),  # 2 key-value heads
    Impossible("dense", 3, {_PP: 3}, _PP),
    Impossible("dense", 2, {_PP: 2, _FIRST: 8}, _PP),
    Impossible("dense", 2, {_PP: 2, _FIRST: 2, _LAST: 2}, _PP),
    Impossible("dense", 2, {_PP: 2, _VPP: 3}, _VPP),
    Impossible("tied", 2, {_PP: 2, _FIRST: 3, _VPP: 2}, _VPP),
    Impossible("MoE", 3, {_EP: 3}, _EP),
    Impossible("MoE", 3, {_ETP: 3}, _ETP),
    Impossible("dense", 2, {_EP: 2}, _EP),
    Impossible("tied", 2, {_ETP: 2}, _ETP),
    # Batches that can't be dealt out
    Impossible("dense", 4, {_BATCH: 2}, _BATCH),
    Impossible("dense", 3, _UNPACKED, _BATCH),
    Impossible("dense", 4, {_PP: 2, _VPP: 2, _BATCH: 4, **_UNPACKED}, _BATCH),
    # Recomputation of a kind that was not asked for
    Impossible("dense", 1, {**_PARTS, f"{MEG}.recompute_method": "block"}, f"{MEG}.recompute_method"),
    Impossible("dense", 1, {**_PARTS, f"{MEG}.recompute_num_layers": 2}, f"{MEG}.recompute_num_layers"),
    Impossible("dense", 1, {f"{MEG}.activation_checkpointing": True, _MODULES: ["mlp"]}, _MODULES),
    Impossible("dense", 1, {f"{MEG}.activation_checkpointing": True, f"{MEG}.recompute_num_layers": 3},
               f"{MEG}.recompute_num_layers"),
    Impossible("tied", 2, {f"{MEG}.activation_checkpointing": True, f"{MEG}.recompute_num_layers": 4, _PP: 2, _VPP: 2},
               f"{MEG}.recompute_num_layers"),
    # What megatron-core's distributed optimizer can't shard
    Impossible("dense", 2, {f"{MEG}.optimizer.optimizer": "sgd", f"{MEG}.optimizer.use_distributed_optimizer": True},
               f"{MEG}.optimizer.use_distributed_optimizer"),
    # What the layers don't have, and what leaves nothing to train
    Impossible("MoE", 1, {**_PARTS, _MODULES: ["mlp"]}, _MODULES),
    Impossible("MoE", 1, {**_PARTS, _MODULES: ["shared_experts"]}, _MODULES),
    Impossible("dense", 1, {"policy.freeze": ["*"]}, "policy.freeze"),
    Impossible("tied", 1, {"policy.freeze": ["lm_head.weight"]}, "policy.freeze"),
    Impossible("dense", 1, {"policy.freeze": ["*.q_proj.weight"]}, "policy.freeze"),
    Impossible("MoE", 1, {f"{MEG}.freeze_moe_router": True}, f"{MEG}.moe_router_load_balancing_type"),
)  # fmt: skip
