"""The model: megatron-core's GPTModel, from a pack of pairs to log-probabilities of answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megadpo.config.architecture import Architecture, DeltaNet, Rotary
from megadpo.data.batches.pack import PackedBatch
from megadpo.model.attention import PackContext, once
from megadpo.model.context import sum_over_context
from megadpo.model.decoder import LayerModules, block_spec
from megadpo.model.delta_rule import DeltaPlan, plan_delta
from megadpo.model.heads import LogpsHead, log_sum_squares, sum_per_answer
from megadpo.model.kernels import AttentionKernel
from megadpo.model.moe import plan_routing
from megadpo.model.moe_balance import LoadBalance
from megadpo.model.rope import RotaryTable, Rotation
from megadpo.parallel import ParallelContext


@dataclass(frozen=True, kw_only=True)
class ModelParts:
    """What all chunks of a model share."""

    layers: LayerModules
    joined_qkv: bool
    """Attention takes its whole projection, where it can."""
    kernel: AttentionKernel
    rotaries: Mapping[Rotary, RotaryTable]
    """For each kind of RoPE in the model."""
    head: LogpsHead
    logprob_chunk_tokens: int
    balance: LoadBalance | None
    """For layers with experts; None for a dense model. One for all chunks: it knows layers by their number in the model."""
    frozen: bool
    """True for the reference: no gradients. It runs before the policy."""


class PairModel(GPTModel):
    """One pipeline stage, or one chunk of it. The last one's output is log-probabilities, not logits."""

    def __init__(
        self,
        arch: Architecture,
        config: TransformerConfig,
        parallel: ParallelContext,
        parts: ModelParts,
        chunk: int = 0,
    ) -> None:
        vp_stage = chunk if parallel.grid.virtual_pipeline > 1 else None
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(
                arch,
                config,
                parts.layers,
                parts.balance,
                joined_qkv=parts.joined_qkv,
                pp_rank=parallel.grid.pp_rank,
                vp_stage=vp_stage,
            ),
            vocab_size=arch.vocab_size,
            max_sequence_length=arch.max_position_embeddings,
            pre_process=parallel.grid.is_first_chunk(chunk),
            post_process=parallel.grid.is_last_chunk(chunk),
            share_embeddings_and_output_weights=arch.tie_word_embeddings,
            position_embedding_type="none",  # PackedAttention applies RoPE
            vp_stage=vp_stage,
        )
        self.rotaries, self.kernel, self.head, self.balance = parts.rotaries, parts.kernel, parts.head, parts.balance
        self.arch, self.joined_qkv = arch, parts.joined_qkv
        self.windows = dict.fromkeys(attention.window for attention in arch.attentions)
        self.logprob_chunk_tokens = parts.logprob_chunk_tokens
        self.comes_last = not parts.frozen and chunk == parallel.grid.virtual_pipeline - 1
        """No other chunk of this rank runs on a micro-batch after this one."""
        self.gives_likeness = False
        """Whether the output also has, for dpo.use_weighting, how likely each answer is compared with the model's own
        samples."""

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """T tokens -> hidden states [T, 1, h] for the next stage ([T/tp, 1, h] with sequence parallelism); on the last
        stage: logps [K] float32 of the batch's answers.

        With the batch's `token_weights` or `gives_likeness` logps are [K, 2] or [K, 3]: first the weighted sum (with
        token_weights), then the sum over all tokens, then (with gives_likeness, without gradient) the sum of
        log p(token) - log sum_v p(v)^2.

        With context parallelism `batch` is this rank's part, T counts its tokens, and logps are of the whole answers.
        Collectives: megatron-core's over the tensor-parallel group and those of experts; with context parallelism those
        of model/context.py; one all-gather of [2, A] on the last stage.
        """
        context = self._context(batch)
        hidden = None
        if self.pre_process:
            hidden = self.embedding(batch.tokens[None], None)
            if self.arch.embedding_multiplier != 1.0:
                multiplier = self.arch.embedding_multiplier
                if self.arch.embedding_multiplier_rounded:
                    multiplier = torch.tensor(multiplier, dtype=hidden.dtype).item()
                hidden = hidden * multiplier
        if hidden is not None and self.training and self.config.recompute_granularity is not None:
            # Recomputation runs backward only if its input needs a gradient. With frozen embeddings it would not.
            hidden.requires_grad_()
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=context)
        return self._answer_logps(hidden, batch) if self.post_process else hidden

    def _context(self, batch: PackedBatch) -> PackContext:
        """What all layers need of `batch`."""
        dtype, kernel = self.config.params_dtype, self.kernel

        def plan(window: int | None) -> Any:
            device = batch.tokens.device
            return once(batch, (kernel.name, dtype, window), lambda: kernel.plan(batch.segments, device, dtype, window))

        def rotation(table: RotaryTable) -> Rotation:
            return once(batch, (table.key, dtype), lambda: table(batch.positions, dtype))

        def plan_of(delta_net: DeltaNet) -> DeltaPlan:
            back, device = delta_net.conv_width - 1, batch.tokens.device
            return once(batch, ("delta", back), lambda: plan_delta(batch.segments, device, back))

        def cos_sin(table: RotaryTable) -> tuple[torch.Tensor, torch.Tensor]:
            return once(batch, (table.key, "cos and sin"), lambda: table.cos_sin(batch.positions))

        joined = self.rotaries if self.joined_qkv else {}
        context = PackContext(
            qkv_format="thd",
            rotations={rotary: rotation(table) for rotary, table in self.rotaries.items()},
            cos_sin={rotary: cos_sin(table) for rotary, table in joined.items()},
            kernel=kernel,
            plans={window: plan(window) for window in self.windows},
            delta_plan=None if self.arch.delta_net is None else plan_of(self.arch.delta_net),
        )
        if self.comes_last:
            batch.made.clear()  # not needed any more; backward passes keep what they need
        if batch.part is not None:
            context.context_group = self.pg_collection.cp
            context.keep_gathered = _recomputes_all_attention(self.config)
        if self.balance is not None:
            context.routing = plan_routing(batch, self.config, self.balance if self.training else None)
        return context

    def _answer_logps(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Selects the predicting positions first, then projects them: no tensor has the size tokens x vocabulary."""
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            whole = gather_from_sequence_parallel_region(hidden, group=group)
        else:
            whole = copy_to_tensor_model_parallel_region(hidden, group=group)
        for hook in self.output_layer._forward_pre_hooks.values():
            # The weight is used without calling its layer. DDP waits for the weight's all-gather in a hook of that call.
            hook(self.output_layer, ())
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        weight = self.output_layer.weight if weight is None else weight
        predicting = whole[:, 0].index_select(0, batch.predict_index)
        if self.arch.logit_divisor != 1.0:
            predicting = predicting / self.arch.logit_divisor
        token_logps = self.head(
            predicting,
            weight,
            batch.targets,
            vocab_start=group.rank() * weight.shape[0],
            group=group,
            chunk_tokens=self.logprob_chunk_tokens,
            softcap=self.arch.logit_softcap,
        )
        summed = [token_logps]
        if batch.token_weights is not None:
            summed.insert(0, token_logps * batch.token_weights)
        if self.gives_likeness:
            spread = log_sum_squares(predicting, weight, group=group, chunk_tokens=self.logprob_chunk_tokens)
            summed.append(token_logps.detach() - spread)
        sums = [sum_per_answer(one, batch.segment_targets, batch.paths, batch.path_segments) for one in summed]
        logps = sums[0] if len(sums) == 1 else torch.stack(sums, dim=1)
        return logps if batch.part is None else sum_over_context(logps, self.pg_collection.cp)


def _recomputes_all_attention(config: TransformerConfig) -> bool:
    """Whether every layer's attention runs again just before its backward."""
    if config.recompute_granularity == "full":
        return bool(config.recompute_method == "uniform")
    return config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
