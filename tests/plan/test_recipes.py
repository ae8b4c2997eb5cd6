"""Every recipe in configs/ for a named world passes its plan there, from its model's config.json alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megadpo.commands import main
from megadpo.config.load import load_config
from megadpo.families import parse_architecture
from megadpo.lora.targets import find_targets
from megadpo.train.check import checked_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# The published sizes of the models, as their config.json names them.
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
LLAMA_70B = {
    **LLAMA_8B,
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "intermediate_size": 28672,
}
LLAMA_405B = {
    **LLAMA_8B,
    "hidden_size": 16384,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "intermediate_size": 53248,
}
QWEN_32B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 27648,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
MIXTRAL_8X22B = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 6144,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "intermediate_size": 16384,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32768,
    "max_position_embeddings": 65536,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "sliding_window": None,
}
# recipe -> model, its parameters as published, ranks, GPU
RECIPES = {
    "dpo_megatron.yaml": (LLAMA_8B, 8_030_261_248, 8, "h100"),
    "dpo_llama-3.3-70b.yaml": (LLAMA_70B, 70_553_706_496, 32, "h100"),
    "dpo_llama-3.1-405b.yaml": (LLAMA_405B, 405_853_388_800, 512, "h100"),
    "dpo_qwen3-30b-a3b.yaml": (QWEN3_30B_A3B, 30_532_122_624, 16, "h100"),
    "dpo_mixtral-8x22b.yaml": (MIXTRAL_8X22B, 140_630_071_296, 64, "h100"),
    "dpo_qwen2.5-32b_32k.yaml": (QWEN_32B, 32_763_876_352, 16, "h100"),
    "dpo_lora_llama-3.1-8b.yaml": (LLAMA_8B, 8_030_261_248, 1, "a10"),
    "dpo_lora_llama-3.3-70b.yaml": (LLAMA_70B, 70_553_706_496, 8, "h100"),
}
WITHOUT_A_WORLD = {"demo.yaml", "demo_sft.yaml", "first_run.yaml"}  # make demo runs two of them


def write_model(folder: Path, model: dict[str, object]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model))
    return folder


def test_every_recipe_is_here():
    assert {path.name for path in CONFIGS.glob("*.yaml")} == {*RECIPES, *WITHOUT_A_WORLD}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_passes_its_plan(name, tmp_path, capsys):
    model, parameters, ranks, gpu = RECIPES[name]
    folder = write_model(tmp_path / "model", model)
    checked_config(
        str(CONFIGS / name), [f"policy.model_name={folder}"], ranks
    )  # as at every start, and by megadpo check
    arguments = [str(CONFIGS / name), "--world-size", str(ranks), "--gpu", gpu, "--json"]
    assert main(["plan", *arguments, f"policy.model_name={folder}"]) == 0
    plan = json.loads(capsys.readouterr().out)
    grid = plan["layout"]
    shares = math.prod(grid[f"{name}_parallel"] for name in ("tensor", "context", "pipeline"))
    assert shares * grid["data_parallel"] == ranks
    assert max(stage["peak_bytes"] for stage in plan["stages"]) < 0.95 * plan["memory_limit_bytes"]
    assert on_all_ranks(plan, model, adapters_on_a_rank(name, model)) == parameters
    assert (CONFIGS / name).read_text().count(f"--world-size {ranks}") == 1


def adapters_on_a_rank(name: str, model: dict[str, Any]) -> int:
    """Of a recipe with LoRA, on each rank of its one stage."""
    megatron = load_config(str(CONFIGS / name)).policy.megatron_cfg
    targets = find_targets(megatron.peft, parse_architecture(model)) if megatron.peft.enabled else []
    return sum(one.elements(megatron.peft.dim, megatron.tensor_model_parallel_size) for one in targets)


def on_all_ranks(plan: dict[str, Any], model: dict[str, Any], adapters: int) -> int:
    """Parameters of one copy of the model, from those of each stage's first rank less its adapters. Experts are shared
    out over expert ranks; norms (2 a layer and one at the end, and those of queries and keys) and routers are on every
    tensor rank."""
    grid, hidden, layers = plan["layout"], model["hidden_size"], model["num_hidden_layers"]
    held = sum(stage["parameters"] - adapters for stage in plan["stages"])
    experts = model.get("num_experts", model.get("num_local_experts", 0))
    channels = model.get("moe_intermediate_size", model["intermediate_size"])
    of_experts = 3 * hidden * channels * layers * experts
    mine = of_experts // (grid["expert_parallel"] * grid["expert_tensor_parallel"])
    qk_norms = 2 * model["head_dim"] if "head_dim" in model else 0
    everywhere = (2 * layers + 1) * hidden + layers * (qk_norms + experts * hidden)
    return (held - mine) * grid["tensor_parallel"] - (grid["tensor_parallel"] - 1) * everywhere + of_experts


def test_70b_on_512_ranks_takes_seconds(tmp_path, capsys):
    """Processor time, which a busy machine does not stretch; imports come on top (some 5 s of torch and megatron-core)."""
    import time

    folder = write_model(tmp_path / "model", LLAMA_70B)
    started = time.process_time()
    arguments = [str(CONFIGS / "dpo_megatron.yaml"), "--world-size", "512", f"policy.model_name={folder}"]
    meg = "policy.megatron_cfg"
    layout = [f"{meg}.tensor_model_parallel_size=8", f"{meg}.pipeline_model_parallel_size=8"]
    assert main(["plan", *arguments, *layout, "--gpu", "h200"]) == 0
    assert time.process_time() - started < 10
    assert "stage 7  10 layers" in capsys.readouterr().out
