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
    """adam: AdamW, weight decay apart from the gradient, as in megatron-core."""
    lr: PositiveFloat = 5e-6
    """Highest learning rate."""
    min_lr: FloatOrZero = 0.0
    """Where a linear or cosine decay ends."""
    weight_decay: FloatOrZero = 0.1
    """With scheduler.weight_decay_incr_style linear or cosine, its start and end decide instead."""
    bf16: bool = True
    """Must say what policy.precision says. Left out or null: taken from there."""
    use_distributed_optimizer: bool = True
    """Shard main parameters and moments over the data-parallel ranks."""
    clip_grad: FloatOrZero = 1.0
    """Must say what policy.max_grad_norm says. Left out or null: taken from there."""
    options: Annotated[Mapping[str, Any], OptionsOf(OPTIMIZERS)] = field(default_factory=OPTIMIZERS.defaults)
    """What only some optimizers read, by name; in a file they are keys of this section."""

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
    """How weight decay goes from start to end; constant needs them equal."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate goes from lr down to min_lr after the warm-up; constant: it stays."""
    lr_decay_iters: PositiveInt | None = None
    """Step at which the rate has come down to min_lr, warm-up included. null: the run's last step."""
    lr_warmup_iters: CountOrZero = 0
    """Steps in which the rate rises linearly to lr."""
    lr_warmup_init: FloatOrZero = 0.0
    """Rate at which the warm-up starts."""


@dataclass(frozen=True, kw_only=True)
class DistributedDataParallelConfig:
    """`policy.megatron_cfg.distributed_data_parallel_config`."""

    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in float32. NeMo RL's file says false for bfloat16 runs."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs; needs the distributed optimizer."""


FP8_TOKENS = {"blockwise": 128, "tensorwise": 16}
"""What the tokens of a rank, and the channels of a layer, are a multiple of under each recipe: a block; or 16 bytes, by
which cuBLAS wants float8 matrices aligned."""


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """`policy.megatron_cfg.fp8_cfg`: the linear layers' matrix products in float8, by Transformer Engine. The policy and
    the reference alike; embeddings, norms, attention, routers and the head stay in bfloat16. See docs/gpu.md."""

    enabled: bool = False
    """Needs Transformer Engine and a Hopper GPU or newer."""
    fp8: Literal["e4m3", "hybrid"] = "e4m3"
    """e4m3: everywhere. hybrid: e4m3 forward, e5m2 for gradients."""
    fp8_recipe: Literal["blockwise", "tensorwise"] = "blockwise"
    """blockwise: a scale for each 1 x 128 of the activations and 128 x 128 of the weights. tensorwise: a scale a tensor,
    from its present values."""


@dataclass(frozen=True, kw_only=True)
class MegatronConfig:
    """`policy.megatron_cfg`."""

    tensor_model_parallel_size: PositiveInt = 1
    """Ranks that share out every matrix of a layer, and the vocabulary."""
    pipeline_model_parallel_size: PositiveInt = 1
    """Stages that share out the layers."""

    context_parallel_size: PositiveInt = 1
    """Ranks that share out the tokens of each micro-batch, cut for equal attention work. See docs/context_parallel.md."""
    expert_model_parallel_size: PositiveInt = 1
    """Ranks that share out the experts of a layer, taken from the tensor-, context- and data-parallel ranks of a stage."""
    expert_tensor_parallel_size: PositiveInt = 1
    """Ranks that cut each expert; need not be tensor_model_parallel_size."""
    sequence_parallel: bool = False
    """Shard the tokens over the tensor-parallel ranks outside attention and MLP."""
    num_layers_in_first_pipeline_stage: PositiveInt | None = None
    """null: an even split."""
    num_layers_in_last_pipeline_stage: PositiveInt | None = None
    """null: an even split."""
    virtual_pipeline_model_parallel_size: PositiveInt = 1
    """Model chunks on each pipeline stage, which take turns (megatron-core's interleaved schedule): a smaller bubble for
    more sends. null: 1."""
    pipeline_dtype: Precision = "bfloat16"
    """Must say what policy.precision says. Left out or null: taken from there."""

    activation_checkpointing: bool = False
    """The switch of recomputation; the four recompute_ fields say how."""
    recompute_granularity: Literal["full", "selective"] = "full"
    """full: whole layers. selective: recompute_modules only."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """With full. uniform: keep the input of every group of layers. block: recompute the first layers of a stage only."""
    recompute_num_layers: PositiveInt = 1
    """With full: layers of a group (uniform), or how many of a stage are recomputed (block)."""
    recompute_modules: tuple[Literal["core_attn", "layernorm", "mlp", "moe", "shared_experts"], ...] = ("core_attn",)
    """With selective: megatron-core's names. mlp: of dense layers; moe: a whole layer of experts."""

    freeze_moe_router: bool = False
    """Leave the routers as they are."""
    moe_router_dtype: Literal["fp32", "fp64"] | None = "fp64"
    """Dtype of the routers' logits and weights of experts; null: policy.precision."""
    moe_router_load_balancing_type: Literal["none", "aux_loss", "seq_aux_loss"] = "none"
    """aux_loss: over the tokens of each micro-batch. seq_aux_loss: over each answer with its prompt. See docs/moe.md."""
    moe_aux_loss_coeff: FloatOrZero | None = None
    """Weight of the load-balancing loss of each layer beside the DPO loss; null: config.json's router_aux_loss_coef."""
    moe_per_layer_logging: bool = False
    """Log the load-balancing loss of every layer too, as train/moe_aux_loss_layer_<n>."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = "alltoall"
    """How tokens reach their experts' ranks."""
    moe_grouped_gemm: bool | None = None
    """true: all experts of a rank in one kernel, needs Transformer Engine. false: one by one. null: true with Transformer
    Engine's layers."""

    transformer_impl: Annotated[str, OneOf(LAYER_IMPLEMENTATIONS, ("auto",))] = "auto"
    """Whose layers: Transformer Engine's fused ones, or megatron-core's own. auto: Transformer Engine's on CUDA in
    bfloat16 where it can be imported, else local; the run says which and why. See docs/gpu.md."""
    fp8_cfg: Fp8Config = field(default_factory=Fp8Config)
    gradient_accumulation_fusion: bool | None = None
    """true: a weight's gradient is added to the gradient buffer by the kernel that computes it. null: true with
    transformer_impl transformer_engine (the local layers need apex's kernel for it)."""
    apply_rope_fusion: bool = True
    """true: rotate in Transformer Engine's kernel, with transformer_impl transformer_engine. false: torch's operations."""
    bias_activation_fusion: bool = True
    """true: a SwiGLU that keeps its input only, megatron-core's compiled one on GPUs. false: operation by operation."""

    peft: PeftConfig = field(default_factory=PeftConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    distributed_data_parallel_config: DistributedDataParallelConfig = field(
        default_factory=DistributedDataParallelConfig
    )
