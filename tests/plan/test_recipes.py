"""Every recipe in configs/ for a named world passes its plan there, from its model's config.json alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.plan import main

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
# recipe -> model, its parameters as published, ranks, GPU
RECIPES = {
    "dpo_megatron.yaml": (LLAMA_8B, 8_030_261_248, 8, "h100"),
    "dpo_llama-3.3-70b.yaml": (LLAMA_70B, 70_553_706_496, 32, "h100"),
    "dpo_qwen2.5-32b_32k.yaml": (QWEN_32B, 32_763_876_352, 16, "h100"),
}
WITHOUT_A_WORLD = {"demo.yaml", "demo_sft.yaml"}  # make demo runs them


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
    arguments = [str(CONFIGS / name), "--world-size", str(ranks), "--gpu", gpu, "--json"]
    assert main([*arguments, f"policy.model_name={folder}"]) == 0
    plan = json.loads(capsys.readouterr().out)
    tp, pp = plan["layout"]["tensor_parallel"], plan["layout"]["pipeline_parallel"]
    assert tp * pp * plan["layout"]["data_parallel"] == ranks
    assert max(stage["peak_bytes"] for stage in plan["stages"]) < 0.95 * plan["memory_limit_bytes"]
    # norms (2 a layer and one at the end) are on every tensor-parallel rank
    copies = (tp - 1) * (2 * model["num_hidden_layers"] + 1) * model["hidden_size"]
    assert sum(stage["parameters"] for stage in plan["stages"]) * tp - copies == parameters
    assert (CONFIGS / name).read_text().count(f"--world-size {ranks}") == 1


def test_70b_on_512_ranks_takes_seconds(tmp_path, capsys):
    """Processor time, which a busy machine does not stretch; imports come on top (some 5 s of torch and megatron-core)."""
    import time

    folder = write_model(tmp_path / "model", LLAMA_70B)
    started = time.process_time()
    arguments = [str(CONFIGS / "dpo_megatron.yaml"), "--world-size", "512", f"policy.model_name={folder}"]
    meg = "policy.megatron_cfg"
    layout = [f"{meg}.tensor_model_parallel_size=8", f"{meg}.pipeline_model_parallel_size=8"]
    assert main([*arguments, *layout, "--gpu", "h200"]) == 0
    assert time.process_time() - started < 10
    assert "stage 7  10 layers" in capsys.readouterr().out
