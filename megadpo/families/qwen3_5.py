"""Qwen3.5: gated delta nets and, in every fourth layer, attention with an output gate; alone, or beside a vision tower and
trained on texts."""

from __future__ import annotations

from megadpo.config.architecture import Architecture
from megadpo.config.variants import FAMILIES
from megadpo.families.delta_net import DeltaNetFamily
from megadpo.families.experts import expert_rows, read_experts
from megadpo.families.qwen_moe import SHARED_EXPERT
from megadpo.families.reading import RESTORE, HfConfig, with_media_tokens

_MEDIA = {"image_token_id": 248056, "video_token_id": 248057}


class _BesideTower(DeltaNetFamily):
    """Comes before the text model in the list of base classes. The tower's tensors are kept unchanged."""

    def read(self, config: HfConfig) -> Architecture:
        return with_media_tokens(super().read(config.of_text()), config)

    def on_disk(self, name: str) -> str:
        return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name

    def carried(self, arch: Architecture) -> tuple[str, ...]:
        return (*super().carried(arch), "model.visual.*")


@FAMILIES.add("qwen3_5_text")
class Qwen35(DeltaNetFamily):
    """Layers that predict several tokens (mtp) are carried along untrained."""

    classes = ("Qwen3_5ForCausalLM",)
    defaults = DeltaNetFamily.defaults | {
        "vocab_size": 248320,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    }


@FAMILIES.add("qwen3_5")
class Qwen35Vision(_BesideTower, Qwen35):
    """Qwen3.5 and a vision tower."""

    classes = ("Qwen3_5ForConditionalGeneration",)
    defaults = Qwen35.defaults | _MEDIA


@FAMILIES.add("qwen3_5_moe_text")
class Qwen35Moe(DeltaNetFamily):
    """Experts in every layer, with weights that are always divided by their sum."""

    classes = ("Qwen3_5MoeForCausalLM",)
    defaults = DeltaNetFamily.defaults | {
        "vocab_size": 248320,
        "hidden_size": 2048,
        "intermediate_size": 512,  # of no layer: config.json has no such key
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001,
    }
    feed_forward = (*expert_rows(), *SHARED_EXPERT)

    def read(self, config: HfConfig) -> Architecture:
        config.refuse("norm_topk_prob", "true: transformers always divides", RESTORE, unless=(True,))
        experts = read_experts(config, shared_ffn_size=config.size("shared_expert_intermediate_size"))
        return super().read(config).with_feed_forward(experts)


@FAMILIES.add("qwen3_5_moe")
class Qwen35MoeVision(_BesideTower, Qwen35Moe):
    """Qwen3.5 with experts, and a vision tower."""

    classes = ("Qwen3_5MoeForConditionalGeneration",)
    defaults = Qwen35Moe.defaults | _MEDIA
