"""gpt-oss: attention with sinks and biases, a window in every second layer, clamped experts, which the hub has in MXFP4."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megadpo.config.architecture import Architecture, Mlp, Rotary, Router
from megadpo.config.variants import FAMILIES
from megadpo.families.experts import read_experts
from megadpo.families.family import AS_FLOATS, Family
from megadpo.families.layouts import Columns, GatedMLP, Replicated, Rows
from megadpo.families.reading import HfConfig
from megadpo.families.rope import given_rope, read_rope
from megadpo.families.rows import ATTENTION, QKV_BIAS, Row, Stack, norm_row
from megadpo.families.windows import with_windows

_LOCAL, _STACKED, _EXPERTS = "mlp.experts.local_experts.{e}.", "mlp.experts.experts.", "mlp.experts."
_GATE_UP, _DOWN = f"{_EXPERTS}gate_up_proj", f"{_EXPERTS}down_proj"
_ROWS = (
    *ATTENTION,
    *QKV_BIAS,
    Row("self_attention.linear_proj.bias", Replicated(), {"self_attn.o_proj.bias": "h"}),
    Row("self_attention.core_attention.softmax_offset", Rows(), {"self_attn.sinks": "a"}),
    norm_row("pre_mlp_layernorm", "post_attention_layernorm"),
    Row("mlp.router.weight", Replicated(), {"mlp.router.weight": "nh"}),
    Row("mlp.router.bias", Replicated(), {"mlp.router.bias": "n"}),
    Row(_LOCAL + "linear_fc1.weight", GatedMLP(), {f"{_GATE_UP}[{{e}}].gate": "xh", f"{_GATE_UP}[{{e}}].up": "xh"},
        grouped="mlp.experts.linear_fc1.weight{e}", stacked=_STACKED + "linear_fc1.weight",
        stack=Stack(_GATE_UP, interleaved=True, transposed=True)),
    Row(_LOCAL + "linear_fc1.bias", GatedMLP(),
        {f"{_GATE_UP}_bias[{{e}}].gate": "x", f"{_GATE_UP}_bias[{{e}}].up": "x"},
        grouped="mlp.experts.linear_fc1.bias{e}", stacked=_STACKED + "linear_fc1.bias",
        stack=Stack(f"{_GATE_UP}_bias", interleaved=True)),
    Row(_LOCAL + "linear_fc2.weight", Columns(), {f"{_DOWN}[{{e}}]": "hx"},
        grouped="mlp.experts.linear_fc2.weight{e}", stacked=_STACKED + "linear_fc2.weight",
        stack=Stack(_DOWN, transposed=True)),
    Row(_LOCAL + "linear_fc2.bias", Replicated(), {f"{_DOWN}_bias[{{e}}]": "h"},
        grouped="mlp.experts.linear_fc2.bias{e}", stacked=_STACKED + "linear_fc2.bias", stack=Stack(f"{_DOWN}_bias")),
)  # fmt: skip
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@FAMILIES.add("gpt_oss")
class GptOss(Family):
    """Experts in MXFP4 are read as bfloat16, which is exact, and written as bfloat16."""

    classes = ("GptOssForCausalLM",)
    biases = ("mlp_bias",)
    defaults = Family.defaults | {
        "num_hidden_layers": 36,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "head_dim": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "sliding_window": 128,
        "num_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_limit": 7.0,
        "router_aux_loss_coef": 0.001,
    }

    def read(self, config: HfConfig) -> Architecture:
        config.refuse("attention_bias", "true", "models without are not supported", unless=(True,))
        config.refuse("swiglu_alpha", "1.702", "models with another are not supported", unless=(None, 1.702))
        experts = read_experts(config, ffn="intermediate_size", router=Router(scores="softmax_of_chosen", bias=True))
        mlp = Mlp(ffn_size=experts.mlp.ffn_size, activation="clamped", limit=config.number("swiglu_limit"), bias=True)
        arch = super().read(config).with_feed_forward(dataclasses.replace(experts, mlp=mlp))
        arch = arch.with_attention(qkv_bias=True, output_bias=True, sinks=True)
        if config.get("sliding_window") is None:
            config.report("sliding_window", None, "a whole number")
        return with_windows(config, arch, usual=lambda number: number % 2 == 0)

    def rotary(self, config: HfConfig, head_dim: int, length: int) -> Rotary:
        spelling, given = given_rope(config)
        return read_rope(config, head_dim, length, rope=(spelling, given or _YARN))

    def refuse_quantised(self, config: HfConfig) -> None:
        given = config.raw.get("quantization_config")
        if given and not (isinstance(given, Mapping) and given.get("quant_method") == "mxfp4"):
            config.report("quantization_config", given, "quant_method mxfp4, or none", AS_FLOATS)

    def layer(self, arch: Architecture, number: int) -> tuple[Row, ...]:
        return _ROWS
