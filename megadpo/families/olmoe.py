"""OLMoE: experts in every layer, and norms over all heads of queries and of keys."""

from __future__ import annotations

from megadpo.config.architecture import Architecture
from megadpo.config.variants import FAMILIES
from megadpo.families.experts import expert_rows, read_experts
from megadpo.families.family import Family
from megadpo.families.reading import HfConfig
from megadpo.families.rows import ATTENTION, QK_NORM_OF_ALL_HEADS, Row


@FAMILIES.add("olmoe")
class Olmoe(Family):
    """Norms before attention and experts, unlike OLMo 2 and 3."""

    classes = ("OlmoeForCausalLM",)
    defaults = Family.defaults | {
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.01,
    }

    def read(self, config: HfConfig) -> Architecture:
        config.refuse("clip_qkv", "null", "models with clip_qkv are not supported", unless=(None,))
        fix = "models of this class with a window are not supported: only one of transformers' kernels computes it"
        config.refuse("sliding_window", "null", fix, unless=(None,))
        arch = super().read(config).with_feed_forward(read_experts(config, ffn="intermediate_size"))
        return arch.with_attention(qk_norm="width")

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        return ATTENTION + QK_NORM_OF_ALL_HEADS + expert_rows()
