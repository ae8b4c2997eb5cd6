"""The `policy.megatron_cfg:` section: layout, recomputation, optimizer, schedule, gradient reduction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megadpo.config.schema_peft import PeftConfig
from megadpo.config.types import CountOrZero, FloatOrZero, PositiveFloat, PositiveInt, Precision
from megadpo.config.variants import LAYER_IMPLEMENTATIONS, OPTIMIZERS, OneOf, OptionsOf


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """`policy.megatron_cfg.optimizer`. Main parameters and moments are float32, whatever the precision."""

    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = "adam"
    """adam: AdamW (decoupled weight decay), as in megatron-core."""
    lr: PositiveFloat = 5e-6
    """Highest learning rate."""
    min_lr: FloatOrZero = 0.0
    """Where a linear or cosine decay ends."""
    weight_decay: FloatOrZero = 0.1
    """Not used with scheduler.weight_decay_incr_style linear or cosine: then start_weight_decay and end_weight_decay are."""
    bf16: bool = True
    """Must agree with policy.precision. Left out or null: taken from there."""
    use_distributed_optimizer: bool = True
    """Shard main parameters and moments over the data-parallel ranks."""
    clip_grad: FloatOrZero = 1.0
    """Must agree with policy.max_grad_norm. Left out or null: taken from there."""
    options: Annotated[Mapping[str, Any], OptionsOf(OPTIMIZERS)] = field(default_factory=OPTIMIZERS.defaults)
    """Options of single optimizers, by name; in a file they are keys of this section."""

    @property
    def kind(self) -> Any:
        """The optimizer (megadpo/optimizer/kinds) with its options."""
        return OPTIMIZERS.configured(self.optimizer, self.options)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """`policy.megatron_cfg.scheduler`. Iterations are optimizer steps."""

    start_weight_decay: FloatOrZero = 0.1
    """Left out or null: optimizer.weight_decay."""
    end_weight_decay: FloatOrZero = 0.1
    """Left out or null: optimizer.weight_decay."""
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = "constant"
    """How weight decay changes from start to end. constant: they must be equal."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls from lr to min_lr after the warm-up. constant: it stays at lr."""
    lr_decay_iters: PositiveInt | None = None
    """Step at which the learning rate reaches min_lr, counted with the warm-up. null: the run's last step."""
    lr_warmup_iters: CountOrZero = 0
    """Steps in which the learning rate rises linearly to lr."""
    lr_warmup_init: FloatOrZero = 0.0
    """Learning rate at the start of the warm-up."""


@dataclass(frozen=True, kw_only=True)
class DistributedDataParallelConfig:
    """`policy.megatron_cfg.distributed_data_parallel_config`."""

    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in float32. NeMo RL's file says false for bfloat16 runs."""
    overlap_grad_reduce: bool = False
    """Reduce gradients during the backward pass."""
    overlap_param_gather: bool = False
    """Gather updated parameters during the next forward pass; needs the distributed optimizer."""


FP8_TOKENS = {"blockwise": 128, "tensorwise": 16}
"""Recipe -> the tokens of a rank and the channels of a layer must be a multiple of this: the block's size, or the 16 bytes to
which cuBLAS needs float8 matrices aligned."""


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """`policy.megatron_cfg.fp8_cfg`: matrix products of the linear layers in float8, with Transformer Engine, in the policy
    and the reference. Embeddings, norms, attention, routers and the head stay in bfloat16. See docs/gpu.md."""

    enabled: bool = False
    """Needs Transformer Engine and a Hopper GPU or newer."""
    fp8: Literal["e4m3", "hybrid"] = "e4m3"
    """e4m3: for all tensors. hybrid: e4m3 forward, e5m2 for gradients."""
    fp8_recipe: Literal["blockwise", "tensorwise"] = "blockwise"
    """blockwise: a scale for each 1 x 128 block of activations and 128 x 128 block of weights. tensorwise: a scale for each
    tensor, from its present values."""


@dataclass(frozen=True, kw_only=True)
class MegatronConfig:
    """`policy.megatron_cfg`."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that divide the matrices of each layer, and the vocabulary."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Stages that divide the layers."""

    context_parallel_size: PositiveInt = 1
    """Ranks that divide the tokens of each micro-batch, with equal attention work. See docs/context_parallel.md."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks that divide the experts of a layer, out of the tensor-, context- and data-parallel ranks of a stage."""
    expert_tensor_parallel_size: PositiveInt = 1
    """Ranks that divide the matrices of each expert; may differ from tensor_model_parallel_size."""
    sequence_parallel: bool = False
    """Shard the tokens over the tensor-parallel ranks outside attention and MLP."""
    num_layers_in_first_pipeline_stage: PositiveInt | None = None
    """null: an even split."""
    num_layers_in_last_pipeline_stage: PositiveInt | None = None
    """null: an even split."""
    virtual_pipeline_model_parallel_size: PositiveInt = 1
    """Model chunks of each pipeline stage (megatron-core's interleaved schedule). More chunks: a smaller bubble, and more
    sends. null: 1."""
    pipeline_dtype: Precision = "bfloat16"
    """Must agree with policy.precision. Left out or null: taken from there."""

    activation_checkpointing: bool = False
    """Recompute activations, as the four recompute_ keys say."""
    recompute_granularity: Literal["full", "selective"] = "full"
    """full: whole layers. selective: recompute_modules only."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """With full. uniform: save only the input of each group of layers. block: recompute only the first layers of a stage."""
    recompute_num_layers: PositiveInt = 1
    """With full: layers of a group (uniform), or layers of a stage that are recomputed (block)."""
    recompute_modules: tuple[Literal["core_attn", "layernorm", "mlp", "moe", "shared_experts"], ...] = ("core_attn",)
    """With selective: megatron-core's names. mlp: of dense layers; moe: a whole layer of experts."""

    freeze_moe_router: bool = False
    """Don't train the routers."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = "fp64"
    """Dtype of the routers' logits and weights of experts; null: policy.precision."""
    moe_router_load_balancing_type: Literal["none", "aux_loss", "seq_aux_loss"] = "none"
    """aux_loss: over the tokens of each micro-batch. seq_aux_loss: over each answer with its prompt. See docs/moe.md."""
    moe_aux_loss_coeff: FloatOrZero | None = None
    """Weight of each layer's load-balancing loss, which is added to the DPO loss. null: config.json's
    router_aux_loss_coef. NeMo RL's policy.hf_config_overrides.router_aux_loss_coef means the same."""
    moe_per_layer_logging: bool = False
    """Log the load-balancing loss of every layer too, as train/moe_aux_loss_layer_<n>."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """The collective that sends tokens to their experts' ranks. NeMo RL's flex is read as alltoall."""
    moe_grouped_gemm: bool | None = None
    """true: one kernel for all experts of a rank; needs Transformer Engine. false: one after the other. null: true with
    Transformer Engine's layers."""

    transformer_impl: Annotated[str, OneOf(LAYER_IMPLEMENTATIONS, ("auto",))] = "auto"
    """Implementation of the layers: Transformer Engine's fused ones, or megatron-core's (local). auto: Transformer Engine's
    on CUDA in bfloat16 where it can be imported, else local; the run says which and why. See docs/gpu.md."""
    fp8_cfg: Fp8Config = field(default_factory=Fp8Config)
    gradient_accumulation_fusion: bool | None = None
    """true: the kernel that computes a weight's gradient adds it to the gradient buffer. null: true with transformer_impl
    transformer_engine (the local layers need apex's kernel for it)."""
    apply_rope_fusion: bool = True
    """true: with transformer_impl transformer_engine, RoPE by Transformer Engine's kernel. false: by torch's operations."""
    fused_single_qkv_rope: bool = False
    """true: one Triton kernel takes queries, keys and values out of their projection, rotates them and gathers keys, on CUDA,
    in layers with RoPE and without norms of queries and keys. Not timed on a GPU yet."""
    bias_activation_fusion: bool = True
    """true: a SwiGLU that saves only its input; on GPUs megatron-core's compiled one. false: separate operations."""

    peft: PeftConfig = field(default_factory=PeftConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    distributed_data_parallel_config: DistributedDataParallelConfig = field(
        default_factory=DistributedDataParallelConfig
    )
