"""Small folders that hold nothing but a config.json, and configs that name them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megadpo.config.architecture import Architecture, Layer
from megadpo.config.grid import Grid
from megadpo.plan.parameters import Parameter, layer_parameters

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 72,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 200,
    "vocab_size": 1010,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
# 31.6M parameters, as benchmarks/make_llama.py's 30m
LLAMA_30M = {
    **SMALL,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1376,
    "vocab_size": 8192,
}
QWEN2 = {**SMALL, "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {**SMALL, "architectures": ["Qwen3ForCausalLM"], "head_dim": 24}
# 4M parameters: steps in a second, with activations several times the weights
LLAMA_4M = {**LLAMA_30M, "hidden_size": 192, "num_hidden_layers": 4, "intermediate_size": 512, "head_dim": 24}

_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 104}
QWEN3_MOE = {**QWEN3, "architectures": ["Qwen3MoeForCausalLM"], **_EXPERTS, "norm_topk_prob": True}
QWEN2_MOE = {
    **SMALL,
    **_EXPERTS,
    "architectures": ["Qwen2MoeForCausalLM"],
    "shared_expert_intermediate_size": 56,
}
MIXTRAL = {**SMALL, "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
_GEMMA = {"head_dim": 24, "sliding_window": 64, "tie_word_embeddings": True}
GEMMA2 = {**SMALL, **_GEMMA, "architectures": ["Gemma2ForCausalLM"], "query_pre_attn_scalar": 24}
GEMMA3 = {**GEMMA2, "architectures": ["Gemma3ForCausalLM"], "sliding_window_pattern": 3}
GPT_OSS = {**SMALL, "architectures": ["GptOssForCausalLM"], "head_dim": 24, "num_local_experts": 4,
           "num_experts_per_tok": 2, "sliding_window": 64}  # fmt: skip
GLM4_MOE = {**SMALL, "architectures": ["Glm4MoeForCausalLM"], "head_dim": 24, "n_routed_experts": 4,
            "num_experts_per_tok": 2, "moe_intermediate_size": 104}  # fmt: skip
# 8M parameters, most of them experts'
GEMMA2_4M, GEMMA3_4M = ({**one, **LLAMA_4M, "architectures": one["architectures"]} for one in (GEMMA2, GEMMA3))
MIXTRAL_8M = {**LLAMA_4M, **MIXTRAL, "hidden_size": 192, "intermediate_size": 256, "vocab_size": 8192}


def write_case(folder: Path, model: dict[str, Any], **policy: Any) -> str:
    """Path of a config whose model_name is a folder with only config.json."""
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text(json.dumps(model))
    tree = {
        "policy": {
            "model_name": str(folder / "model"),
            "device": "cpu",
            "train_global_batch_size": 8,
            "max_total_sequence_length": 1024,
            **policy,
        },
        "data": {"train_data_path": str(folder / "absent.jsonl")},
        "checkpointing": {"enabled": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def stage_parameters(
    arch: Architecture, grid: Grid, *, stage: int, chunks: Sequence[Sequence[Layer]]
) -> list[list[Parameter]]:
    """Of the chunks of a stage, which have these layers; all of them trainable."""
    return [_chunk(arch, grid.stage(stage), number, layers) for number, layers in enumerate(chunks)]


def _chunk(arch: Architecture, grid: Grid, chunk: int, layers: Sequence[Layer]) -> list[Parameter]:
    first, last = grid.is_first_chunk(chunk), grid.is_last_chunk(chunk)
    tied = arch.tie_word_embeddings and first != last
    table = Parameter(arch.vocab_size // grid.tensor * arch.hidden_size, shared_embedding=tied)
    found = [table] if first else []
    found += [one for layer in layers for one in layer_parameters(arch, layer, grid)]
    if last:
        found.append(Parameter(arch.hidden_size))
        if not (arch.tie_word_embeddings and first):
            found.append(table)
    return found
