"""Every recipe in configs/ for a named world passes its plan there, from its model's config.json alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from megadpo.commands import main
from megadpo.config.architecture import Architecture
from megadpo.config.load import load_config
from megadpo.config.problems import ConfigError
from megadpo.families import WeightEntry, parse_architecture, weight_table
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
GEMMA3_27B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "image_token_index": 262144,
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 5376,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "intermediate_size": 21504,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}
GLM_4_5_AIR = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "hidden_size": 4096,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": True,
    "use_qk_norm": False,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1000000,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "first_k_dense_replace": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 1,
    "vocab_size": 151552,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
GPT_OSS_120B = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "attention_bias": True,
    "intermediate_size": 2880,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_limit": 7.0,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 18,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4"},
}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "tie_word_embeddings": False,
}
# recipe -> model, its parameters, ranks, GPU
RECIPES = {
    "dpo_megatron.yaml": (LLAMA_8B, 8_030_261_248, 8, "h100"),
    "dpo_llama-3.3-70b.yaml": (LLAMA_70B, 70_553_706_496, 32, "h100"),
    "dpo_llama-3.1-405b.yaml": (LLAMA_405B, 405_853_388_800, 512, "h100"),
    "dpo_qwen3-30b-a3b.yaml": (QWEN3_30B_A3B, 30_532_122_624, 16, "h100"),
    "dpo_mixtral-8x22b.yaml": (MIXTRAL_8X22B, 140_630_071_296, 64, "h100"),
    "dpo_qwen2.5-32b_32k.yaml": (QWEN_32B, 32_763_876_352, 16, "h100"),
    "dpo_gemma-3-27b.yaml": (GEMMA3_27B, 27_009_346_304, 16, "h100"),  # without the vision tower
    "dpo_glm-4.5-air.yaml": (GLM_4_5_AIR, 106_852_251_264, 64, "h100"),  # without the MTP layer
    "dpo_gpt-oss-120b.yaml": (GPT_OSS_120B, 116_829_156_672, 64, "h100"),
    "dpo_deepseek-v3.yaml": (DEEPSEEK_V3, 671_026_419_200, 256, "h200"),  # without the MTP layer
    "dpo_lora_llama-3.1-8b.yaml": (LLAMA_8B, 8_030_261_248, 1, "a10"),
    "dpo_lora_llama-3.3-70b.yaml": (LLAMA_70B, 70_553_706_496, 8, "h100"),
}
# what docs/planning.md says of other GPUs
ELSEWHERE = [
    ("dpo_gemma-3-27b.yaml", 8, "h200", []),
    ("dpo_glm-4.5-air.yaml", 32, "h200", []),
    (
        "dpo_deepseek-v3.yaml",
        256,
        "h100",
        [
            "pipeline_model_parallel_size=8",
            "num_layers_in_first_pipeline_stage=6",
            "num_layers_in_last_pipeline_stage=7",
            "expert_model_parallel_size=32",
            "recompute_granularity=full",
            "optimizer.adam_impl=transformer_engine",
        ],
    ),
]
WITHOUT_A_WORLD = {"demo.yaml", "demo_sft.yaml", "first_run.yaml"}  # make demo runs two of them


def in_bytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"GiB": 2**30, "TiB": 2**40}[unit]


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
    arch = parse_architecture(model)
    entries = weight_table(arch).entries
    assert sum(math.prod(shape) for one in entries for shape in one.shapes) == parameters
    assert sum(stage["parameters"] for stage in plan["stages"]) == of_first_ranks(entries, grid) + adapters(name, arch)
    text = (CONFIGS / name).read_text()
    assert text.count(f"--world-size {ranks}") == 1
    bytes_each = plan["checkpoint_bytes"]["with_optimizer"]
    assert ("A checkpoint takes" in text) == (bytes_each > 200e9)
    for one, several in re.findall(r"# A checkpoint takes ([\d.]+ .iB)\b.* take ([\d.]+ .iB)", text):
        checkpointing = load_config(str(CONFIGS / name)).checkpointing
        most = checkpointing.keep_top_k + (checkpointing.metric_name is not None) + 1  # the one being written
        assert in_bytes(one) == pytest.approx(bytes_each, rel=0.03)
        assert in_bytes(several) == pytest.approx(most * bytes_each, rel=0.03)


@pytest.mark.parametrize(("name", "ranks", "gpu", "overrides"), ELSEWHERE)
def test_it_fits_elsewhere_too(name, ranks, gpu, overrides, tmp_path, capsys):
    folder = write_model(tmp_path / "model", RECIPES[name][0])
    arguments = [str(CONFIGS / name), "--world-size", str(ranks), "--gpu", gpu, "--json"]
    changed = [f"policy.megatron_cfg.{one}" for one in overrides]
    assert main(["plan", *arguments, f"policy.model_name={folder}", *changed]) == 0
    text = (CONFIGS / name).read_text()
    assert all(" ".join(one.split("=")) in text for one in overrides)  # as its comment has them


def of_first_ranks(entries: Sequence[WeightEntry], grid: dict[str, int]) -> int:
    """Parameters of the first rank of every stage together: of experts its share, of what tensor parallelism cuts its part."""
    dense = experts = 0
    for one in entries:
        cut = 1 if one.row.layout.sharded_dim is None else grid["tensor_parallel"]
        if one.expert is None:
            dense += math.prod(one.full_shape) // cut
        else:
            assert grid["expert_tensor_parallel"] == 1
            experts += math.prod(one.full_shape)
    return dense + experts // grid["expert_parallel"]


def adapters(name: str, arch: Architecture) -> int:
    """Of a recipe with LoRA, on each rank of its one stage."""
    megatron = load_config(str(CONFIGS / name)).policy.megatron_cfg
    targets = find_targets(megatron.peft, arch) if megatron.peft.enabled else []
    return sum(one.elements(megatron.peft.dim, megatron.tensor_model_parallel_size) for one in targets)


def test_deepseek_v3_in_float8_is_refused_by_name(tmp_path):
    folder = write_model(tmp_path / "model", {**DEEPSEEK_V3, "quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(ConfigError, match="quantization_config.*bfloat16"):
        checked_config(str(CONFIGS / "dpo_deepseek-v3.yaml"), [f"policy.model_name={folder}"], 256)


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
