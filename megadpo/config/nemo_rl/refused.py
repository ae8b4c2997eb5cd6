"""NeMo RL's keys that are accepted only at the values that mean what megadpo does anyway, and why.

Names: NVIDIA-NeMo/RL, examples/configs/*.yaml and the typed dicts of nemo_rl/models/policy, nemo_rl/data and
nemo_rl/utils/{checkpoint,logger}.py.
"""

from __future__ import annotations

from dataclasses import dataclass

MEG = "policy.megatron_cfg"
_OFF: tuple[object, ...] = (None, False)
_EMPTY: tuple[object, ...] = (None, {}, [])


@dataclass(frozen=True)
class Refused:
    """A key whose other values would change the run."""

    path: str
    accepted: tuple[object, ...]
    reason: str
    fix: str


REFUSED: tuple[Refused, ...] = (
    # Back ends
    Refused(f"{MEG}.enabled", (True,), "Megatron is the only back end", f"set {MEG}.enabled: true"),
    Refused(
        "policy.dtensor_cfg.enabled",
        _OFF,
        "there is no DTensor back end",
        "set it to false; the layout is policy.megatron_cfg",
    ),
    Refused(
        "policy.automodel_cfg.enabled",
        _OFF,
        "there is no Automodel back end",
        "set it to false; the layout is policy.megatron_cfg",
    ),
    Refused(
        "policy.optimizer",
        _EMPTY,
        "it belongs to the DTensor back end",
        f"set policy.optimizer: null and use {MEG}.optimizer",
    ),
    Refused("policy.reward_model_cfg.enabled", _OFF, "DPO trains no reward model", "set it to false"),
    Refused(
        "policy.hf_config_overrides",
        _EMPTY,
        "the model is what its config.json says",
        "edit the model folder's config.json",
    ),
    Refused(
        "policy.env_vars", _EMPTY, "a process cannot set its own launch environment", "export them before torchrun"
    ),
    Refused(
        f"{MEG}.env_vars", _EMPTY, "a process cannot set its own launch environment", "export them before torchrun"
    ),
    Refused(
        f"{MEG}.model_overrides",
        _EMPTY,
        "the model is what its config.json says",
        "edit the model folder's config.json",
    ),
    # Layout
    Refused(
        f"{MEG}.attention_backend",
        (None, "auto"),
        "the kernel is chosen elsewhere",
        "remove it and use policy.attention_kernel",
    ),
    Refused(
        f"{MEG}.cuda_graph_impl",
        (None, "none"),
        "a CUDA graph repeats one shape, and no two packs have the same segments",
        "set it to none",
    ),
    Refused(
        f"{MEG}.fine_grained_activation_offloading",
        _OFF,
        "activations are not offloaded",
        f"set it to false; {MEG}.activation_checkpointing saves memory",
    ),
    Refused(f"{MEG}.offload_modules", _EMPTY, "activations are not offloaded", "set it to null"),
    Refused(f"{MEG}.mtp_num_layers", (None, 0), "multi-token prediction is not implemented", "set it to 0"),
    Refused(
        f"{MEG}.train_iters", (None,), "the length of a run is set elsewhere", "remove it and use dpo.max_num_steps"
    ),
    # Experts
    Refused(
        f"{MEG}.moe_token_dispatcher_type",
        (None, "alltoall", "allgather"),
        "flex needs DeepEP or HybridEP, which are not among the dependencies",
        "set it to alltoall",
    ),
    Refused(f"{MEG}.moe_enable_deepep", _OFF, "DeepEP is not among the dependencies", "set it to false"),
    Refused(
        f"{MEG}.moe_router_load_balancing_type",
        (None, "none", "aux_loss", "seq_aux_loss"),
        "sinkhorn routes otherwise in training than in the exported model; a running global_aux_loss depends on the "
        "order of micro-batches",
        "set it to none, aux_loss or seq_aux_loss",
    ),
    Refused(
        f"{MEG}.moe_permute_fusion",
        _OFF,
        "the fused kernel takes every token for routed; here padding is not",
        "set it to false",
    ),
    Refused(
        f"{MEG}.moe_shared_expert_overlap", _OFF, "shared experts run before the others, not beside", "set it to false"
    ),
    Refused(
        f"{MEG}.moe_router_num_groups",
        (None,),
        "the supported models choose among all experts",
        "set it to null",
    ),
    Refused(f"{MEG}.moe_router_group_topk", (None,), "the supported models choose among all experts", "set it to null"),
    # Precision and adapters
    Refused(
        f"{MEG}.fp8_cfg.fp8_recipe",
        (None, "blockwise", "tensorwise"),
        "mxfp8 needs a Blackwell GPU, and delayed scaling carries state from batch to batch that a resume would lose",
        "set it to blockwise or tensorwise",
    ),
    Refused(
        f"{MEG}.fp8_cfg.fp8_param",
        _OFF,
        "Hugging Face weights are read into bfloat16 parameters; NeMo RL itself warns of NaN with it",
        "set it to false",
    ),
    Refused(f"{MEG}.fp4_cfg.enabled", _OFF, "float4 training is not implemented", "set it to false"),
    Refused(f"{MEG}.peft.enabled", _OFF, "LoRA is not implemented", "set it to false"),
    # Optimizer
    Refused(
        f"{MEG}.optimizer.fp16",
        _OFF,
        "float16 training is not offered",
        "set it to false and policy.precision: bfloat16",
    ),
    Refused(
        f"{MEG}.distributed_data_parallel_config.use_custom_fsdp", _OFF, "FSDP is not implemented", "set it to false"
    ),
    Refused(
        f"{MEG}.distributed_data_parallel_config.use_megatron_fsdp", _OFF, "FSDP is not implemented", "set it to false"
    ),
    # Batches
    Refused(
        "policy.dynamic_batching.enabled",
        _OFF,
        "packing does the same without padding",
        "set it to false and policy.sequence_packing.enabled: true",
    ),
    Refused(
        "policy.shared_prefix_training.mode",
        (None, "disabled"),
        "prompts are shared elsewhere",
        "remove it and use policy.sequence_packing.share_prompt",
    ),
    Refused("policy.offload_optimizer_for_logprob", _OFF, "optimizer state is not offloaded", "set it to false"),
    Refused("policy.tokenizer.use_processor", _OFF, "text only", "set it to false"),
    Refused("policy.tokenizer.audio", _EMPTY, "text only", "remove it"),
    Refused("policy.tokenizer.video", _EMPTY, "text only", "remove it"),
    Refused("dpo.preference_loss", (None, "dpo"), "the loss is chosen elsewhere", "remove it and use dpo.loss_type"),
    # Data
    Refused("data.add_bos", (None, True), "the tokenizer or its chat template decides", "remove it"),
    Refused("data.add_eos", (None, True), "every answer ends in EOS", "remove it"),
    Refused("data.add_generation_prompt", _OFF, "the answer follows the prompt", "set it to false"),
    Refused("data.add_system_prompt", _OFF, "prompts are taken as they are", "write the system message into the data"),
    Refused("data.use_multiple_dataloader", _OFF, "there is one training file", "set it to false"),
    Refused("data.custom_dataloader", (None,), "there is one loader", "remove it"),
    # Checkpoints
    Refused(
        "checkpointing.save_consolidated",
        _OFF,
        "checkpoints are sharded",
        "set it to false; tools/megatron_to_hf.py exports one",
    ),
    Refused(
        "checkpointing.ft_keep_latest_k",
        (None,),
        "there is one kind of checkpoint",
        "set it to null and use checkpointing.keep_top_k",
    ),
    Refused(
        "checkpointing.ft_save_period",
        (None,),
        "there is one kind of checkpoint",
        "set it to null and use checkpointing.save_period",
    ),
    Refused(
        "checkpointing.pretrained_checkpoint",
        _EMPTY,
        "the start is named elsewhere",
        "remove it and give policy.model_name the checkpoint folder",
    ),
    Refused("checkpointing.save_data_plane", _OFF, "there is no data plane", "set it to false"),
    Refused(f"{MEG}.checkpoint.async_save", _OFF, "a save ends before the next step", "set it to false"),
    Refused(
        f"{MEG}.checkpoint.ckpt_assume_constant_structure",
        _OFF,
        "every save writes its own metadata",
        "set it to false",
    ),
    # Logging
    Refused(
        "logger.mlflow_enabled",
        _OFF,
        "there is no MLflow logger",
        "set it to false; metrics.jsonl, TensorBoard and wandb are there",
    ),
    Refused(
        "logger.swanlab_enabled",
        _OFF,
        "there is no SwanLab logger",
        "set it to false; metrics.jsonl, TensorBoard and wandb are there",
    ),
    Refused(
        "logger.monitor_gpus",
        _OFF,
        "GPU counters are not sampled",
        "set it to false; timing/ metrics are always logged",
    ),
    Refused("logger.num_val_samples_to_print", (None, 0), "DPO generates no samples to print", "set it to 0"),
    Refused(
        "logger.wandb.log_nemo_gym_full_result_tables",
        _OFF,
        "no rollouts are collected while training",
        "set it to false",
    ),
)
