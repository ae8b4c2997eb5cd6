"""The `policy:` section: model, tokenizer, batch sizes, packing. Sizes count PAIRS."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megadpo.config.schema_megatron import MegatronConfig
from megadpo.config.types import FloatOrZero, PathText, PositiveInt, Precision, Text
from megadpo.config.variants import ATTENTION_KERNELS, LOGPROB_KERNELS, OneOf


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """`policy.tokenizer`."""

    name: PathText
    """Hugging Face folder or hub name. Left out or null: policy.model_name."""
    chat_template: str | None = "default"
    """default: the tokenizer's own, where it has one. null: none, plain text. Else Jinja text or a .jinja file."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Given to the template, e.g. {enable_thinking: false}."""


@dataclass(frozen=True, kw_only=True)
class SequencePackingConfig:
    """`policy.sequence_packing`: micro-batches are packs of pairs under a token budget."""

    enabled: bool = True
    """false: micro-batches of exactly train_micro_batch_size pairs, however long."""
    share_prompt: bool = True
    """Compute a pair's prompt once for both answers. false: prompt and answer as two sequences. Same loss."""
    train_mb_tokens: PositiveInt = 2048
    """Most tokens in a pack. Left out or null: 2 x max_total_sequence_length, the longest pair there can be."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """`policy`."""

    model_name: PathText
    """Hugging Face folder or hub name, or Megatron checkpoint folder."""
    tokenizer: TokenizerConfig
    train_global_batch_size: PositiveInt = 128
    """Pairs per optimizer step, over all data-parallel ranks; with dpo.loss_type plackett_luce rankings."""
    train_micro_batch_size: PositiveInt = 2
    """Pairs per micro-batch when sequence packing is off; with packing train_mb_tokens decides."""
    max_total_sequence_length: PositiveInt = 1024
    """Most tokens in prompt + one answer; what happens to longer pairs: data.on_too_long."""
    precision: Precision = "bfloat16"
    """Dtype of weights and activations; main parameters and optimizer state are float32."""
    max_grad_norm: FloatOrZero = 1.0
    """Gradients are scaled down to this norm; 0 or null: no clipping."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    attention_kernel: Annotated[str, OneOf(ATTENTION_KERNELS, ("auto",))] = "auto"
    """cpu: CPUs. sdpa: everywhere. varlen: torch's flash attention; flash3: its version 3, where flash_attn_3 is
    installed; transformer_engine: its fused one (cuDNN's); all three on CUDA in bfloat16. auto: varlen where it can run,
    cpu on a CPU, else sdpa."""
    sequence_packing: SequencePackingConfig = field(default_factory=SequencePackingConfig)
    make_sequence_length_divisible_by: PositiveInt = 1
    """A pack is padded to a multiple of this. Left out, null or 1: context_parallel_size, with sequence_parallel times
    tensor_model_parallel_size."""
    logprob_chunk_size: PositiveInt = 1024
    """Answer tokens projected onto the vocabulary at a time. null: 1024."""
    logprob_kernel: Annotated[str, OneOf(LOGPROB_KERNELS, ("auto",))] = "auto"
    """The head. auto: triton where it can run (CUDA), which takes blocks of the vocabulary with as many logits, else
    torch."""
    freeze: tuple[Text, ...] = ()
    """Weights to leave as they are: shell patterns on their Hugging Face names, {a..b} for a range of numbers, e.g.
    [model.embed_tokens.weight, "model.layers.{0..3}.*"]. They get no gradients and no optimizer state."""
    megatron_cfg: MegatronConfig = field(default_factory=MegatronConfig)
