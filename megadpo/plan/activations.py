"""Activations of a model chunk by arithmetic, for the search over layouts; the plan itself counts them (trace.py)."""

from __future__ import annotations

from dataclasses import dataclass

from megadpo.config.architecture import Architecture
from megadpo.config.schema import Config
from megadpo.plan.packs import Pack


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one rank, as in trace.ChunkTrace."""

    buffers: int
    saved: int
    backward_peak: int

    @property
    def forward_peak(self) -> int:
        return self.saved


class Estimate:
    """Of chunks of one layout, as torch keeps them on a GPU with varlen attention: saved bytes within some per cent, the
    peak more roughly."""

    def __init__(self, cfg: Config, arch: Architecture, pack: Pack, expert_load: float = 1.0) -> None:
        self.cfg, self.arch, self.pack = cfg, arch, pack
        self.megatron = cfg.policy.megatron_cfg
        self.width = 2 if cfg.policy.precision == "bfloat16" else 4
        self.tp = self.megatron.tensor_model_parallel_size
        self.tokens = pack.tokens // self.megatron.context_parallel_size
        """Of this rank, before sequence parallelism cuts them."""
        self.stream = self.tokens * arch.hidden_size * self.width // (self.tp if self.megatron.sequence_parallel else 1)
        self.load = min(expert_load, self.megatron.expert_model_parallel_size)

    def chunk(self, layers: int, *, last: bool) -> Activations:
        """`layers` layers; `last`: with the head."""
        megatron, arch, pack, width = self.megatron, self.arch, self.pack, self.width
        layer = self._attention() + self._mlp()
        kept, repeated = layer, 0
        full = megatron.activation_checkpointing and megatron.recompute_granularity == "full"
        if full:
            kept, repeated = self.stream, layer
        elif megatron.activation_checkpointing:
            repeated = min(self._recomputed(), layer)
            kept = layer - repeated
        saved = layers * kept + self.stream + self.tokens * arch.head_dim * width
        if full and megatron.recompute_method == "block":
            saved += max(0, layers - megatron.recompute_num_layers) * (layer - self.stream)
        if full and megatron.recompute_method == "uniform":
            saved -= (layers - -(-layers // megatron.recompute_num_layers)) * self.stream
            repeated *= megatron.recompute_num_layers
        transient = repeated + self._gradients() + self.stream
        if last:
            answers = pack.answer_tokens // megatron.context_parallel_size * arch.hidden_size * width
            saved += answers
            transient = max(transient, answers + self._head())
        gathered = self.tokens * arch.hidden_size * width if megatron.sequence_parallel else 0
        return Activations(gathered, saved, saved + transient)

    def _head(self) -> int:
        """Logits and their gradients, and the gradient of the weight, in float32 first without the fused head."""
        rows, width, vocabulary = self.cfg.policy.logprob_chunk_size, self.width, self.arch.vocab_size // self.tp
        answers = self.pack.answer_tokens // self.megatron.context_parallel_size
        if self.cfg.policy.logprob_kernel == "torch":
            return vocabulary * self.arch.hidden_size * (4 + width) + min(rows, answers) * vocabulary * (4 + width)
        logits = min(1 << 27, min(rows, answers) * vocabulary)  # MOST_LOGITS of model/heads/triton
        return answers * self.arch.hidden_size * 4 + vocabulary * self.arch.hidden_size * width + logits * (4 + width)

    def _attention(self) -> int:
        """Two norms' inputs and outputs; rotated queries; keys and values, of the whole pack where ranks share it out."""
        arch, width, tokens = self.arch, self.width, self.tokens
        heads = arch.num_heads * arch.head_dim
        attention = (2 * tokens + 2 * self.pack.key_tokens) * heads * width + 4 * tokens * arch.num_heads
        norms = 4 * self.stream + 8 * self.stream // (arch.hidden_size * width)
        if arch.qk_norm:
            norms += tokens * (arch.num_heads + arch.num_kv_heads) * (arch.head_dim * width + 4) // self.tp
        return norms + attention // self.tp

    def _mlp(self) -> int:
        """Both sides of SwiGLU; with experts, also the tokens in their order and the router's weights."""
        if self.arch.moe is None:
            return 3 * self.tokens * self.arch.ffn_hidden_size * self.width // self.tp
        return self._experts() + self._shared()

    def _shared(self) -> int:
        assert self.arch.moe is not None
        return 3 * self.tokens * (self.arch.moe.shared_ffn_hidden_size or 0) * self.width // self.tp

    def _experts(self) -> int:
        moe = self.arch.moe
        assert moe is not None
        local, etp = self.tokens // self.tp, self.megatron.expert_tensor_parallel_size
        router = local * (moe.num_experts * 18 + moe.experts_per_token * 56)
        row = (self.arch.hidden_size + 3 * moe.ffn_hidden_size // etp) * self.width + 8
        return router + int(self._dispatched() * row)

    def _dispatched(self) -> float:
        """Rows at this rank's experts."""
        moe = self.arch.moe
        assert moe is not None
        local = self.tokens // self.tp * moe.experts_per_token
        return local * self.load * self.megatron.expert_tensor_parallel_size

    def _gradients(self) -> int:
        """Of a layer's widest place."""
        if self.arch.moe is None:
            return 2 * self.tokens * self.arch.ffn_hidden_size * self.width // self.tp
        return int(3 * self._dispatched() * self.arch.hidden_size * self.width)

    def _recomputed(self) -> int:
        """What of a layer selective recomputation does not keep; its modules' inputs are kept in its place."""
        modules, arch = self.megatron.recompute_modules, self.arch
        freed = 0
        if "core_attn" in modules:
            keys = self.pack.key_tokens * arch.num_heads - self.tokens * arch.num_kv_heads
            freed += (2 * keys * arch.head_dim * self.width + 4 * self.tokens * arch.num_heads) // self.tp
        if "layernorm" in modules:
            freed += 2 * self.stream
        if {"mlp", "moe"} & set(modules):
            freed += self._mlp()
        elif "shared_experts" in modules:
            freed += self._shared()
        return freed
