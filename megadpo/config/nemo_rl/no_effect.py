"""NeMo RL's keys that are accepted at any value because nothing they say can change a run here, and why.

A path ending in `.*` covers all that lies below a section; its `enabled` key, where it has one, is in
foreign_refused.py.
"""

from __future__ import annotations

MEG = "policy.megatron_cfg"
NO_EFFECT: dict[str, str] = {
    "policy.dtensor_cfg.*": "it configures the DTensor back end, which is off",
    "policy.automodel_cfg.*": "it configures the Automodel back end, which is off",
    "policy.scheduler": f"it schedules policy.optimizer; {MEG}.scheduler is used",
    "policy.reward_model_cfg.*": "no reward model is trained",
    "policy.generation": "DPO generates nothing",
    "policy.generation_batch_size": "DPO generates nothing",
    "policy.refit_buffer_size_gb": "DPO generates nothing",
    "policy.logprob_batch_size": "the reference runs on the training micro-batches; logps don't depend on their size",
    "policy.dynamic_batching.*": "dynamic batching is off",
    "policy.shared_prefix_training.*": "it is off; policy.sequence_packing.share_prompt decides",
    "policy.sequence_packing.algorithm": "packs are balanced over the ranks; the loss doesn't depend on them",
    "policy.sequence_packing.microbatch_order": "the loss doesn't depend on the order of packs",
    "policy.sequence_packing.logprob_mb_tokens": "the reference runs on the training packs",
    "policy.sequence_packing.sequence_length_round": "packs are padded to policy.make_sequence_length_divisible_by",
    f"{MEG}.empty_unused_memory_level": "no memory is handed back between phases: nothing else runs between them",
    f"{MEG}.converter_type": "the architecture is read from config.json",
    f"{MEG}.force_overwrite_initial_ckpt": "Hugging Face files are read directly, no converted copy is kept",
    f"{MEG}.force_reconvert_from_hf": "Hugging Face files are read directly, no converted copy is kept",
    f"{MEG}.defer_fp32_logits": "logits exist only in chunks, never as one float32 tensor",
    f"{MEG}.use_fused_linear_logprobs": "logps are always computed in chunks from the hidden states",
    f"{MEG}.use_linear_ce_fusion_loss": "logps are always computed in chunks from the hidden states",
    f"{MEG}.use_gloo_process_groups": "the process groups follow from the device",
    f"{MEG}.use_fused_weighted_squared_relu": "the supported models use SwiGLU",
    f"{MEG}.clear_memory_caches_before_refit": "DPO generates nothing",
    f"{MEG}.cuda_graph_modules": "CUDA graphs are off",
    f"{MEG}.cuda_graph_warmup_steps": "CUDA graphs are off",
    f"{MEG}.mtp_loss_scaling_factor": "multi-token prediction is off",
    f"{MEG}.mtp_use_repeated_layer": "multi-token prediction is off",
    f"{MEG}.mtp_detach_heads": "multi-token prediction is off",
    f"{MEG}.fp4_cfg.*": "float4 is off",
    f"{MEG}.peft.*": "LoRA is off",
    f"{MEG}.moe_router_bias_update_rate": "no supported model has a bias on its router",
    f"{MEG}.moe_flex_dispatcher_backend": "the flex dispatcher is refused",
    f"{MEG}.moe_hybridep_num_sms": "the flex dispatcher is refused",
    f"{MEG}.distributed_data_parallel_config.data_parallel_sharding_strategy": "it configures FSDP, which is off",
    f"{MEG}.distributed_data_parallel_config.average_in_collective": (
        "gradients are those of the mean over the global batch's pairs either way"
    ),
    f"{MEG}.checkpoint.ckpt_fully_parallel_save_process_group": "it changes who writes, not what is written",
    f"{MEG}.checkpoint.ckpt_fully_parallel_load_process_group": "it changes who reads, not what is read",
    f"{MEG}.checkpoint.ckpt_fully_parallel_load_exchange_algo": "it changes who reads, not what is read",
    "checkpointing.model_save_format": "weights are saved in megatron-core's format; tools/megatron_to_hf.py exports",
    "checkpointing.load_replay_buffer": "DPO has no replay buffer",
    "logger.gpu_monitoring.*": "GPU monitoring is off",
    "logger.swanlab.*": "SwanLab is off",
    "logger.mlflow.*": "MLflow is off",
}
