"""Small Hugging Face models with random weights, one for each case of the weight tables."""

from __future__ import annotations

import json
from pathlib import Path

import torch

CASES = ("llama", "llama_tied", "mistral", "qwen2", "qwen3")
MOE_CASES = ("mixtral", "qwen2_moe", "qwen3_moe")
EXPERTS = 4
LAYERS, HEADS, GROUPS, HEAD_DIM = 4, 4, 2, 8
# Files beside the weights, with bytes that no JSON writer would reproduce.
SIDE_FILES = {
    "tokenizer.json": b'{"made":  "by hand"}\r\n',
    "tokenizer_config.json": b'{"chat_template": "{{ x }}"}',
    "special_tokens_map.json": b"{}",
    "chat_template.jinja": b"{{ messages }}\n\n",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
}
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_MOE_SIZES: dict[str, dict[str, object]] = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen2_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32,
                  "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
                  "norm_topk_prob": True},
}  # fmt: skip
_NORMS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}


def make_hf_folder(
    folder: Path, case: str, *, max_shard_size: str = "5GB", stacked_experts: bool = False, **changes: object
) -> Path:
    """Save a random model of `case`; mistral in bfloat16, the others in float32. stacked_experts: as transformers 5
    keeps them in memory, not as the hub has them."""
    import transformers

    sizes = {**_SIZES, "tie_word_embeddings": case.endswith("_tied"), **changes}
    sizes = {**_MOE_SIZES.get(case, {}), **sizes}
    if case in ("qwen2", "qwen2_moe"):
        del sizes["head_dim"]  # transformers derives it: hidden / heads
        sizes["hidden_size"] = HEADS * HEAD_DIM
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
        "qwen2_moe": (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    }[case.removesuffix("_tied")]
    if case == "mistral":
        sizes["sliding_window"] = None
    model = model_class(config_class(**sizes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: their first values are all alike
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    if case == "mistral":
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=not stacked_experts)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=3) + "\n\n")  # as no writer of ours would lay it out
    for name, content in SIDE_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files, by safetensors' own reader."""
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def whole_in_hf_names(stages: list[list[dict[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """[pp rank][tp rank] -> parameters; written apart from the tables: the ranks' shards put together,
    and taken apart again in Hugging Face's names."""
    hf: dict[str, torch.Tensor] = {}
    for ranks in stages:
        for name in ranks[0]:
            shards = [rank[name] for rank in ranks]
            prefix = "model.layers." + name.split(".")[2] + "." if name.startswith("decoder.layers.") else ""
            if "linear_qkv" in name:
                kind = name.rsplit(".", 1)[1]
                heads = torch.cat(shards).unflatten(0, (GROUPS, HEADS // GROUPS + 2, HEAD_DIM))
                for part, letter in zip(heads.split([HEADS // GROUPS, 1, 1], dim=1), "qkv", strict=True):
                    hf[f"{prefix}self_attn.{letter}_proj.{kind}"] = part.flatten(0, 2)
            elif "linear_fc1" in name:
                gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
                hf[prefix + "mlp.gate_proj.weight"] = torch.cat(gates)
                hf[prefix + "mlp.up_proj.weight"] = torch.cat(ups)
            elif "linear_fc2" in name:
                hf[prefix + "mlp.down_proj.weight"] = torch.cat(shards, dim=1)
            elif "linear_proj" in name:
                hf[prefix + "self_attn.o_proj.weight"] = torch.cat(shards, dim=1)
            elif name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                hf["lm_head.weight" if name.startswith("out") else "model.embed_tokens.weight"] = torch.cat(shards)
            else:  # norms: the same on every rank
                assert all(torch.equal(shard, shards[0]) for shard in shards)
                hf[prefix + _NORMS[name.split(".", 3)[3] if prefix else name]] = shards[0]
    return hf
