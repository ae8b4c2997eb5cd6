"""What config.json says of models with gated delta nets, what is refused of it and with it, and one at real widths.
test_equal.py holds the models."""

from __future__ import annotations

import math

import pytest
import torch

from megadpo.config.architecture import DeltaNet
from megadpo.config.known import Known, find_problems
from megadpo.config.load import load_config
from megadpo.config.problems import ConfigError
from megadpo.families import parse_architecture, read_architecture, weight_table
from megadpo.lora.targets import lora_problems
from megadpo.model.weights.hf_folder import HfWeights
from tests.families.cases import SIZES, make_case
from tests.families.test_equal import TOLERANCE, by_transformers, gradient_errors, measured
from tests.helpers.distributed import run_distributed
from tests.model.kernels.test_kernels import random_pairs
from tests.model.weights.hf_models import read_tensors
from tests.plan.cases import write_case

NEXT = {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}
DENSE = {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text"}
MOE = {"architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text"}
SMALL = {**DENSE, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
         "intermediate_size": 128, "vocab_size": 256, "linear_num_key_heads": 2, "linear_num_value_heads": 4}  # fmt: skip
MEG = "policy.megatron_cfg"


def elements(raw):
    return sum(math.prod(shape) for shape in weight_table(parse_architecture(raw)).hf_shapes.values())


def test_the_defaults_of_its_classes():
    arch = parse_architecture(NEXT)
    one, delta_net = arch.attention, arch.delta_net
    assert [isinstance(layer.attention, DeltaNet) for layer in arch.layers] == [True, True, True, False] * 12
    assert (one.head_dim, one.rotary.dims, one.output_gate, one.qk_norm) == (256, 64, True, "head")
    assert (delta_net.key_heads, delta_net.value_heads, delta_net.conv_width) == (16, 32, 4)
    assert (arch.experts.number, arch.experts.per_token, arch.experts.shared_ffn_size) == (512, 10, 512)
    assert arch.norms.zero_centred and arch.layers_differ and not arch.mixed
    assert elements(NEXT) == 79_674_391_296  # 80B, without the layer that predicts several tokens
    assert parse_architecture(MOE).experts.router.scores == "softmax_of_chosen"
    assert parse_architecture(DENSE).mlp.ffn_size == 12288
    vision = parse_architecture({"architectures": ["Qwen3_5ForConditionalGeneration"], "text_config": {}})
    assert vision.layers == parse_architecture(DENSE).layers and vision.media_tokens == (248056, 248057)
    assert "model.language_model.layers.0.linear_attn.A_log" in weight_table(vision).hf_shapes


def test_layers_are_said_by_name_or_by_interval():
    said = parse_architecture({**SMALL, "layer_types": ["full_attention", *["linear_attention"] * 3]})
    assert [isinstance(layer.attention, DeltaNet) for layer in said.layers] == [False, True, True, True]
    every = parse_architecture({**SMALL, "full_attention_interval": 2})
    assert [isinstance(layer.attention, DeltaNet) for layer in every.layers] == [True, False, True, False]


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"layer_types": ["linear_attention"] * 4}, "layer_types"),
        ({"layer_types": ["linear_attention", "sliding_attention"] * 2}, "layer_types"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "layer_types"),
        ({"linear_num_value_heads": 3}, "linear_num_value_heads"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({**NEXT, "mlp_only_layers": [1]}, "mlp_only_layers"),
        ({**NEXT, "decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({**MOE, "norm_topk_prob": False}, "norm_topk_prob"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(said, named):
    with pytest.raises(ConfigError, match=named):
        parse_architecture({**SMALL, **said})


def test_layouts_that_its_states_have_not(tmp_path):
    path = write_case(tmp_path / "case", {**SMALL, "max_position_embeddings": 4096})
    cfg = load_config(path, [f"{MEG}.context_parallel_size=2", "policy.make_sequence_length_divisible_by=2"])
    arch = read_architecture(cfg.policy.model_name)
    [problem] = find_problems(Known(cfg=cfg, arch=arch, world_size=2))
    assert problem.where.endswith("context_parallel_size") and "linear attention" in problem.expected
    cfg = load_config(path, [f"{MEG}.tensor_model_parallel_size=4"])
    [problem] = find_problems(Known(cfg=cfg, arch=arch, world_size=4))
    assert "2 key heads of linear attention" in problem.expected


def test_adapters_go_on_its_projections_and_not_on_its_convolution(tmp_path):
    path = write_case(tmp_path / "case", {**SMALL, "max_position_embeddings": 4096})
    peft = f"{MEG}.peft"
    arch = parse_architecture(SMALL)

    def problems(*names):
        said = [f"{peft}.enabled=true", f"{peft}.dim=4", f"{peft}.target_modules=[{','.join(names)}]"]
        return lora_problems(load_config(path, said), arch)

    assert problems("in_proj_qkv", "in_proj_z", "in_proj_a", "out_proj", "q_proj") == []
    assert problems("linear_in_proj", "linear_proj") == []  # megatron-core's name: one A for all in a layer
    [problem] = problems("conv1d")
    assert "a linear layer of the decoder" in problem.expected


def test_layers_that_predict_several_tokens_are_carried(tmp_path):
    from safetensors.torch import save_file

    folder = make_case(tmp_path / "hf", "qwen3_next")
    tensors = read_tensors(folder) | {"mtp.fc.weight": torch.ones(2, 2)}
    save_file(tensors, folder / "model.safetensors")
    table = weight_table(read_architecture(folder))
    assert list(HfWeights.open(folder, table).problems(table)) == []


@pytest.mark.distributed
def test_real_widths_are_transformers(tmp_path):
    """Heads and widths of heads as in Qwen3.5 with 9 billion parameters; texts of several chunks."""
    heads = {"head_dim": 256, "num_attention_heads": 16, "num_key_value_heads": 4, "linear_num_key_heads": 16,
             "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128}  # fmt: skip
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2, "max_position_embeddings": 512}
    config = {**SIZES, **sizes, **heads, "layer_types": ["linear_attention", "full_attention"]}
    folder = str(save_usual(tmp_path / "wide", config))
    pairs = random_pairs([(150, 70, 40), (30, 9, 66)], vocab=SIZES["vocab_size"])
    want_logps, want = by_transformers(folder, pairs)
    ranks = run_distributed(measured, 1, {"wide": folder}, {}, pairs, init_process_group=False)
    for share in ("True", "False"):
        [logps] = ranks[0]["cases"]["wide"][share][0]
        assert float((logps - want_logps).norm() / want_logps.norm()) < TOLERANCE
        errors = gradient_errors(weight_table(read_architecture(folder)), ranks, "wide", share, want)
        assert {name: error for name, error in errors.items() if not error < TOLERANCE} == {}


def save_usual(folder, config):
    """A model with transformers' own first weights, and 1-dimensional ones moved from theirs, which are all alike; decays
    lower, so that states last for some tokens."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) / 4)
            if name.endswith("A_log"):
                parameter.sub_(3.0)
    model.save_pretrained(folder)
    return folder
