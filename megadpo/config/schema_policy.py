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
    """default: the tokenizer's own, if it has one. null: none, plain text. Else Jinja text or a .jinja file."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the template, such as {enable_thinking: false}."""


@dataclass(frozen=True, kw_only=True)
class SequencePackingConfig:
    """`policy.sequence_packing`: micro-batches are packs of pairs with a limited number of tokens."""

    enabled: bool = True
    """false: micro-batches of exactly train_micro_batch_size pairs of any length."""
    share_prompt: bool = True
    """Compute a pair's prompt once for both answers. false: two sequences of prompt and answer. The loss is the same."""
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
    """Pairs per micro-batch without sequence packing. (With it, train_mb_tokens limits a micro-batch.)"""
    max_total_sequence_length: PositiveInt = 1024
    """Most tokens in prompt + one answer. data.on_too_long says what happens to longer pairs."""
    precision: Precision = "bfloat16"
    """Dtype of weights and activations; main parameters and optimizer state are float32."""
    max_grad_norm: FloatOrZero = 1.0
    """Gradients are scaled down to this norm; 0 or null: no clipping."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda if the machine has a GPU."""
    attention_kernel: Annotated[str, OneOf(ATTENTION_KERNELS, ("auto",))] = "auto"
    """cpu: for CPUs. sdpa: for every device. varlen: torch's flash attention; flash3: its version 3, if flash_attn_3 is
    installed; transformer_engine: its fused attention (cuDNN's); these three on CUDA in bfloat16. auto: varlen where it can
    run, cpu on a CPU, else sdpa."""
    sequence_packing: SequencePackingConfig = field(default_factory=SequencePackingConfig)
    make_sequence_length_divisible_by: PositiveInt = 1
    """A pack is padded to a multiple of this. Left out, null or 1: context_parallel_size, with sequence_parallel times
    tensor_model_parallel_size."""
    logprob_chunk_size: PositiveInt = 1024
    """Answer tokens that are projected onto the vocabulary at a time. null: 1024. In NeMo RL's files
    policy.megatron_cfg.fused_linear_logprobs_chunk_size and linear_ce_fusion_chunk_size mean the same."""
    logprob_kernel: Annotated[str, OneOf(LOGPROB_KERNELS, ("auto",))] = "auto"
    """The head, which computes log-probabilities. torch: chunks of tokens. triton (CUDA): blocks of the vocabulary, with
    as many logits at a time. auto: triton where it can run, else torch."""
    freeze: tuple[Text, ...] = ()
    """Weights that are not trained: shell patterns of their Hugging Face names, with {a..b} for a range of numbers, such as
    [model.embed_tokens.weight, "model.layers.{0..3}.*"]. They get no gradients and no optimizer state."""
    megatron_cfg: MegatronConfig = field(default_factory=MegatronConfig)
