"""ERNIE 4.5 with experts: a softmax router with a correction bias, and a shared expert."""

from __future__ import annotations

from megadpo.config.architecture import Architecture, Mlp, Router
from megadpo.config.variants import FAMILIES
from megadpo.families.ernie4_5 import Ernie45
from megadpo.families.experts import correction_bias_row, expert_rows, read_experts, shared_expert_rows
from megadpo.families.layouts import OneRow
from megadpo.families.reading import HfConfig
from megadpo.families.rows import ATTENTION, Row

BIAS = "moe_statics.e_score_correction_bias"
EXPERTS = (*expert_rows(), correction_bias_row(f"mlp.{BIAS}", OneRow(), also=f"mlp.gate.{BIAS}"))


@FAMILIES.add("ernie4_5_moe")
class Ernie45Moe(Ernie45):
    """Multi-token-prediction layers (mtp) are kept but not trained."""

    classes = ("Ernie4_5_MoeForCausalLM",)
    defaults = Ernie45.defaults | {
        "num_key_value_heads": 4,
        "head_dim": None,
        "moe_num_experts": 64,
        "moe_k": 6,
        "moe_intermediate_size": 1536,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
        "router_aux_loss_coef": 0.001,
    }

    def read(self, config: HfConfig) -> Architecture:
        least = config.number("moe_norm_min", zero_too=True)
        shared = config.size("moe_num_shared_experts", least=0) * config.size("moe_intermediate_size")
        experts = read_experts(
            config,
            count="moe_num_experts",
            chosen="moe_k",
            router=Router(scores="softmax", correction_bias=True, normalized=True, least_sum=least),
            shared_ffn_size=shared or None,
            shared_gate=False,
        )
        arch = super().read(config)
        first, last = (config.size(f"moe_layer_{end}_index", least=-1) for end in ("start", "end"))
        every = config.size("moe_layer_interval")
        last = arch.num_layers - 1 if last == -1 else last
        having = [number for number in range(arch.num_layers) if first <= number <= last and (number + 1) % every == 0]
        if not having:
            config.report("moe_layer_start_index", first, "experts in one layer at least", "use the dense class")
        return arch.with_feed_forward(experts, only=having)

    def carried(self, arch: Architecture) -> tuple[str, ...]:
        return ("*mtp*",)

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        experts = arch.layers[number].feed_forward
        if isinstance(experts, Mlp):
            return super().layer(arch, number)
        return ATTENTION + EXPERTS + (shared_expert_rows("mlp.shared_experts") if experts.shared_ffn_size else ())
