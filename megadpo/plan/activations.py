"""Estimates the activations of a model chunk by arithmetic, for the layout search. A plan counts them (trace.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megadpo.config.architecture import Architecture, Attention, DeltaNet, Experts, Layer, Mlp
from megadpo.config.schema import Config
from megadpo.plan.packs import Pack

_CHUNK = 64  # CHUNK of model/delta_rule.py


@dataclass(frozen=True)
class Activations:
    """Bytes for one micro-batch on one rank, as in trace.ChunkTrace."""

    buffers: int
    saved: int
    backward_peak: int

    @property
    def forward_peak(self) -> int:
        return self.saved


class Estimate:
    """Estimates the chunks of one layout, on a GPU with varlen attention. Saved bytes are correct within a few per cent; the
    peak is less exact."""

    def __init__(self, cfg: Config, arch: Architecture, pack: Pack, expert_load: float = 1.0) -> None:
        self.cfg, self.arch, self.pack = cfg, arch, pack
        self.megatron = cfg.policy.megatron_cfg
        self.width = 2 if cfg.policy.precision == "bfloat16" else 4
        self.tp = self.megatron.tensor_model_parallel_size
        self.tokens = pack.tokens // self.megatron.context_parallel_size
        """This rank's tokens, without sequence parallelism."""
        self.stream = self.tokens * arch.hidden_size * self.width // (self.tp if self.megatron.sequence_parallel else 1)
        self.load = min(expert_load, self.megatron.expert_model_parallel_size)

    def chunk(self, layers: Sequence[Layer], *, last: bool) -> Activations:
        """A chunk of these layers. last: it has the head."""
        megatron, arch, pack, width = self.megatron, self.arch, self.pack, self.width
        full = megatron.activation_checkpointing and megatron.recompute_granularity == "full"
        selective = megatron.activation_checkpointing and not full
        whole = [self._mixer(one.attention) + self._feed_forward(one.feed_forward) for one in layers]
        again = whole if full else [0] * len(layers)
        if selective:
            again = [min(self._recomputed(one), size) for one, size in zip(layers, whole, strict=True)]
        repeated = max(again)
        saved = len(layers) * self.stream if full else sum(whole) - sum(again)
        saved += self.stream + self.tokens * arch.attention.head_dim * width
        if full and megatron.recompute_method == "block":
            saved += sum(one - self.stream for one in whole[megatron.recompute_num_layers :])
        if full and megatron.recompute_method == "uniform":
            saved -= (len(layers) - -(-len(layers) // megatron.recompute_num_layers)) * self.stream
            repeated *= megatron.recompute_num_layers
        transient = repeated + max(self._gradients(one) for one in layers) + self.stream
        if last:
            answers = pack.answer_tokens // megatron.context_parallel_size * arch.hidden_size * width
            saved += answers
            transient = max(transient, answers + self._head())
        gathered = self.tokens * arch.hidden_size * width if megatron.sequence_parallel else 0
        return Activations(gathered, saved, saved + transient)

    def _head(self) -> int:
        """Logits and their gradients, and the weight's gradient, which the head of torch adds to DDP's buffer."""
        rows, width, vocabulary = self.cfg.policy.logprob_chunk_size, self.width, self.arch.vocab_size // self.tp
        answers = self.pack.answer_tokens // self.megatron.context_parallel_size
        if self.cfg.policy.logprob_kernel == "torch":
            tied_here = self.arch.tie_word_embeddings and self.megatron.pipeline_model_parallel_size == 1
            unread = 0 if tied_here else vocabulary * self.arch.hidden_size * width
            return unread + min(rows, answers) * vocabulary * (4 + width)
        logits = min(1 << 27, min(rows, answers) * vocabulary)  # MOST_LOGITS of model/heads/triton
        return answers * self.arch.hidden_size * 4 + vocabulary * self.arch.hidden_size * width + logits * (4 + width)

    def _key_tokens(self, window: int | None) -> int:
        """Tokens whose keys are saved. With context parallelism a rank saves its own keys and gathers the others again."""
        return self.tokens if self.tokens < self.pack.tokens else self.pack.key_tokens(window)

    def _mixer(self, one: Attention | DeltaNet) -> int:
        return self._delta_net(one) if isinstance(one, DeltaNet) else self._attention(one)

    def _delta_net(self, one: DeltaNet) -> int:
        """Inputs of norms and linear layers, and of the convolution, its activation and the recurrence; gates in float32."""
        values = one.value_heads * one.value_dim
        # in float32 the gates are not copied, so that all that was projected with them stays
        gates = one.in_channels if self.width == 4 else values
        numbers = self.width * 3 * (one.conv_channels + values) + 4 * (gates + values + 4 * one.value_heads)
        return 4 * self.stream + self.tokens * numbers // self.tp

    def _chunks(self, one: DeltaNet) -> int:
        """What a delta net makes anew for its backward pass (model/delta_rule.py), in float32."""
        head = 5 * (_CHUNK + one.key_dim + one.value_dim) + 4 * one.key_dim * one.value_dim // _CHUNK
        return 4 * self.tokens * one.value_heads * head // self.tp

    def _attention(self, one: Attention) -> int:
        """Inputs of norms and linear layers, rotated queries, keys and values, and the output."""
        width, tokens = self.width, self.tokens
        widths = one.head_dim + one.value_dim
        numbers = (tokens * one.num_heads + self._key_tokens(one.window) * one.num_kv_heads) * widths
        attention = numbers * width + 4 * tokens * one.num_heads
        norms = (6 if self.arch.norms.placement == "sandwich" else 4) * self.stream
        norms += 8 * self.stream // (self.arch.hidden_size * width)
        if (
            one.latent is not None
        ):  # latents before and after their norms; keys' own channels, made together with values
            latents = 2 * ((one.latent.q_rank or 0) + one.latent.kv_rank) + one.latent.rope_dim
            norms += latents * self.stream // self.arch.hidden_size
            attention += tokens * one.num_heads * (one.head_dim - one.latent.rope_dim) * width
        if one.output_gate:  # the gate, its sigmoid, and the product
            attention += 3 * tokens * one.num_heads * one.head_dim * width
        if one.qk_norm != "none":
            norms += tokens * (one.num_heads + one.num_kv_heads) * (one.head_dim * width + 4) // self.tp
        return norms + attention // self.tp

    def _feed_forward(self, one: Mlp | Experts) -> int:
        """Inputs and output of SwiGLU; with experts, also the permuted tokens and the router's weights."""
        if isinstance(one, Mlp):
            return 3 * self.tokens * one.ffn_size * self.width // self.tp
        return self._experts(one) + self._shared(one)

    def _shared(self, one: Experts) -> int:
        return 3 * self.tokens * (one.shared_ffn_size or 0) * self.width // self.tp

    def _experts(self, one: Experts) -> int:
        local, etp = self.tokens // self.tp, self.megatron.expert_tensor_parallel_size
        router = local * (one.number * 18 + one.per_token * 56)
        row = (self.arch.hidden_size + 3 * one.mlp.ffn_size // etp) * self.width + 8
        return router + int(self._dispatched(one) * row)

    def _dispatched(self, one: Experts) -> float:
        """Tokens that this rank's experts get."""
        local = self.tokens // self.tp * one.per_token
        return local * self.load * self.megatron.expert_tensor_parallel_size

    def _gradients(self, layer: Layer) -> int:
        """Gradients at the widest place of a layer."""
        one, chunks = layer.feed_forward, self._chunks(layer.attention) if isinstance(layer.attention, DeltaNet) else 0
        if isinstance(one, Mlp):
            return max(chunks, 2 * self.tokens * one.ffn_size * self.width // self.tp)
        return max(chunks, int(3 * self._dispatched(one) * self.arch.hidden_size * self.width))

    def _recomputed(self, layer: Layer) -> int:
        """Bytes of a layer that selective recomputation does not save. It saves the inputs of its modules instead."""
        modules, one = self.megatron.recompute_modules, layer.attention
        freed = 0
        if "core_attn" in modules and isinstance(one, Attention):
            # saved instead: queries, and the tensor of which queries, keys and values are views
            keys = (self._key_tokens(one.window) - self.tokens) * one.num_kv_heads * (one.head_dim + one.value_dim)
            numbers = keys - self.tokens * one.num_heads * one.head_dim
            freed += (numbers * self.width + 4 * self.tokens * one.num_heads) // self.tp
        if "layernorm" in modules:
            freed += 2 * self.stream
        if {"mlp", "moe"} & set(modules):
            freed += self._feed_forward(layer.feed_forward)
        elif "shared_experts" in modules and isinstance(layer.feed_forward, Experts):
            freed += self._shared(layer.feed_forward)
        return freed
