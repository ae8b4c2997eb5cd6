"""Granite 3, dense and with experts: Llama with four multipliers."""

from __future__ import annotations

import dataclasses

from megadpo.config.architecture import Architecture, Router
from megadpo.config.variants import FAMILIES
from megadpo.families.experts import read_experts
from megadpo.families.family import Family
from megadpo.families.layouts import Columns, GatedMLP, Replicated
from megadpo.families.reading import HfConfig
from megadpo.families.rows import ATTENTION, Row, Stack, norm_row

_LOCAL, _STACKED = "mlp.experts.local_experts.{e}.", "mlp.experts.experts."
_INPUT, _OUTPUT = "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"
EXPERTS = (
    norm_row("pre_mlp_layernorm", "post_attention_layernorm"),
    Row("mlp.router.weight", Replicated(), {"block_sparse_moe.router.layer.weight": "nh"}),
    Row(_LOCAL + "linear_fc1.weight", GatedMLP(), {f"{_INPUT}[{{e}}].gate": "xh", f"{_INPUT}[{{e}}].up": "xh"},
        grouped="mlp.experts.linear_fc1.weight{e}", stacked=_STACKED + "linear_fc1.weight", stack=Stack(_INPUT)),
    Row(_LOCAL + "linear_fc2.weight", Columns(), {f"{_OUTPUT}[{{e}}]": "hx"},
        grouped="mlp.experts.linear_fc2.weight{e}", stacked=_STACKED + "linear_fc2.weight", stack=Stack(_OUTPUT)),
)  # fmt: skip
SHARED_EXPERT = (
    Row("mlp.shared_experts.linear_fc1.weight", GatedMLP(), {"shared_mlp.input_linear.weight": ("sh", "sh")}),
    Row("mlp.shared_experts.linear_fc2.weight", Columns(), {"shared_mlp.output_linear.weight": "hs"}),
)


@FAMILIES.add("granite")
class Granite(Family):
    """Multipliers of embeddings, of attention scores and of what is added to the residual stream, and a divisor of logits."""

    classes = ("GraniteForCausalLM",)
    defaults = Family.defaults | {
        "max_position_embeddings": 2048,
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }

    def read(self, config: HfConfig) -> Architecture:
        arch = super().read(config).with_attention(scale=config.number("attention_multiplier"))
        return dataclasses.replace(
            arch,
            embedding_multiplier=config.number("embedding_multiplier"),
            residual_multiplier=config.number("residual_multiplier"),
            logit_divisor=config.number("logits_scaling"),
        )


@FAMILIES.add("granitemoe")
class GraniteMoe(Granite):
    """Experts in every layer; a folder has all experts of a layer in two tensors."""

    classes = ("GraniteMoeForCausalLM",)
    defaults = Granite.defaults | {"num_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001}

    def read(self, config: HfConfig) -> Architecture:
        experts = read_experts(
            config,
            ffn="intermediate_size",
            router=Router(scores="softmax_of_chosen"),
            shared_ffn_size=self.shared_ffn_size(config),
            shared_gate=False,
        )
        return super().read(config).with_feed_forward(experts)

    def shared_ffn_size(self, config: HfConfig) -> int | None:
        """Width of the shared expert; None: there is none."""
        return None

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        assert arch.experts is not None
        return ATTENTION + EXPERTS + (SHARED_EXPERT if arch.experts.shared_ffn_size else ())


@FAMILIES.add("granitemoeshared")
class GraniteMoeShared(GraniteMoe):
    """With a shared expert, if config.json has its size."""

    classes = ("GraniteMoeSharedForCausalLM",)
    defaults = GraniteMoe.defaults | {"shared_intermediate_size": 0}

    def shared_ffn_size(self, config: HfConfig) -> int | None:
        return config.size("shared_intermediate_size", least=0) or None
