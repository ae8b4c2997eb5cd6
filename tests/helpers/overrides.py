"""Overrides that tests of layouts share, as they are written on the command line."""

MEG = "policy.megatron_cfg"
TP2, PP2 = f"{MEG}.tensor_model_parallel_size=2", f"{MEG}.pipeline_model_parallel_size=2"
CP2, CP4 = (f"{MEG}.context_parallel_size={ranks}" for ranks in (2, 4))
VPP2, VPP3 = (f"{MEG}.virtual_pipeline_model_parallel_size={chunks}" for chunks in (2, 3))
SP, DIST = f"{MEG}.sequence_parallel=true", f"{MEG}.optimizer.use_distributed_optimizer=true"
EP2, ETP2 = f"{MEG}.expert_model_parallel_size=2", f"{MEG}.expert_tensor_parallel_size=2"
OVERLAP = f"{MEG}.distributed_data_parallel_config.overlap_grad_reduce=true"
GATHER = f"{MEG}.distributed_data_parallel_config.overlap_param_gather=true"
UNSHARED, UNPACKED = "policy.sequence_packing.share_prompt=false", "policy.sequence_packing.enabled=false"
RECOMPUTE, SELECTIVE = f"{MEG}.activation_checkpointing=true", f"{MEG}.recompute_granularity=selective"
BALANCE = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.05}
"""Sections of policy.megatron_cfg: the load-balancing loss that is the same in every layout."""
