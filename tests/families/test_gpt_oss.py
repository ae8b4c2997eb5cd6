"""gpt-oss' config.json, what is refused of it, and its folders: experts in stacks, in bfloat16 or in MXFP4.
tests/families/test_equal.py holds the model."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from megadpo.config.known import Known, find_problems
from megadpo.config.load import load_config
from megadpo.config.problems import ConfigError
from megadpo.families import parse_architecture, read_architecture, weight_table
from megadpo.model.weights import export_hf, import_hf
from megadpo.model.weights.hf_folder import HfWeights
from tests.families.cases import make_case
from tests.families.configs import LLAMA
from tests.model.weights.hf_models import read_tensors
from tests.plan.cases import write_case

SAID = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
SMALL = {**LLAMA, **SAID, "num_local_experts": 4, "num_experts_per_tok": 2}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


def test_the_defaults_of_its_class():
    arch = parse_architecture({**SAID, "quantization_config": MXFP4})
    assert (arch.num_layers, arch.hidden_size, arch.vocab_size, arch.tie_word_embeddings) == (36, 2880, 201088, False)
    assert [one.attention.window for one in arch.layers] == [128, None] * 18
    attention, experts = arch.attention, arch.experts
    assert attention.sinks and attention.qkv_bias and attention.output_bias and attention.scale == 0.125
    scaling = attention.rotary.scaling
    assert (attention.rotary.theta, scaling.factor, scaling.truncate) == (150000.0, 32.0, False)
    assert scaling.attention_factor == pytest.approx(1.3466, abs=1e-4)
    assert (experts.number, experts.per_token, experts.router.scores) == (128, 4, "softmax_of_chosen")
    assert experts.router.bias and experts.mlp.bias and (experts.mlp.activation, experts.mlp.limit) == ("clamped", 7.0)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"attention_bias": False}, "attention_bias"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha"),
        ({"swiglu_limit": None}, "swiglu_limit"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(said, named):
    with pytest.raises(ConfigError, match=named):
        parse_architecture({**SMALL, **said})


def test_experts_with_biases_are_not_cut(tmp_path):
    path = write_case(tmp_path / "case", {**SMALL, "hidden_size": 64, "max_position_embeddings": 4096})
    megatron = "policy.megatron_cfg"
    sizes = [f"{megatron}.tensor_model_parallel_size=2", f"{megatron}.sequence_parallel=true"]
    cfg = load_config(path, [*sizes, f"{megatron}.expert_tensor_parallel_size=2"])
    arch = read_architecture(cfg.policy.model_name)
    [problem] = find_problems(Known(cfg=cfg, arch=arch, world_size=2))
    assert problem.where.endswith("expert_tensor_parallel_size") and "biases" in problem.expected


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """In bfloat16, with experts that MXFP4 holds, and the same folder in MXFP4."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    root = tmp_path_factory.mktemp("oss")
    plain = root / "plain"
    make_case(plain, "gpt_oss")
    tensors, generator = (
        {name: t.bfloat16() for name, t in read_tensors(plain).items()},
        torch.Generator().manual_seed(1),
    )
    packed = {}
    for name, tensor in list(tensors.items()):
        if not name.endswith("_proj") or ".experts." not in name:
            packed[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(110, 130, (experts, rows, columns // 32), dtype=torch.uint8, generator=generator)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        tensors[name] = convert_moe_packed_tensors(blocks, scales)
    config = json.loads((plain / "config.json").read_text()) | {"dtype": "bfloat16"}
    (root / "mxfp4").mkdir()
    for folder, held, more in ((plain, tensors, {}), (root / "mxfp4", packed, {"quantization_config": MXFP4})):
        save_file({name: t.contiguous() for name, t in held.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**config, **more}))
    return plain, root / "mxfp4"


def test_mxfp4_is_read_as_transformers_reads_it_and_written_in_bfloat16(plain, tmp_path, caplog):
    plain, packed = plain
    import_hf(packed, tmp_path / "megatron")
    with caplog.at_level(logging.WARNING):
        export_hf(tmp_path / "megatron", tmp_path / "hf")
    got, want = read_tensors(tmp_path / "hf"), read_tensors(plain)
    assert got.keys() == want.keys()
    assert all(got[name].dtype == t.dtype and torch.equal(got[name], t) for name, t in want.items())
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "bfloat16, not as mxfp4" in caplog.text


def test_parts_of_a_stack_are_read_alone(plain):
    """Any rows and columns of one expert's tensor, as tensor-parallel ranks ask for them."""
    arch = read_architecture(plain[0])
    table = weight_table(arch)
    for folder in plain:
        weights = HfWeights.open(folder, table)
        names = [f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj[2].up", "down_proj[3]")]
        tensors = read_tensors(plain[0])
        want = [
            tensors["model.layers.1.mlp.experts.gate_up_proj"][2].T[1::2],
            tensors["model.layers.1.mlp.experts.down_proj"][3].T,
        ]
        with weights.slices(names) as sources:
            for source, whole in zip(sources, want, strict=True):
                assert torch.equal(source[(slice(None),)], whole)
                assert torch.equal(source[slice(3, 9), slice(2, 20)], whole[3:9, 2:20])


def test_a_stack_that_is_missing_or_of_another_shape_is_named_once(plain, tmp_path):
    tensors = read_tensors(plain[1])
    stack = "model.layers.0.mlp.experts.gate_up_proj"
    (tmp_path / "config.json").write_text((plain[1] / "config.json").read_text())
    for broken in (f"{stack}_scales", f"{stack}_blocks"):
        save_file({name: t for name, t in tensors.items() if name != broken}, tmp_path / "model.safetensors")
        table = weight_table(read_architecture(tmp_path))
        problems = HfWeights.open(tmp_path, table).problems(table)
        assert [problem.expected for problem in problems if problem.value == "no such tensor"] == [stack]
    tensors[f"{stack}_blocks"] = tensors[f"{stack}_blocks"][:, :-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    table = weight_table(read_architecture(tmp_path))
    named = [problem.where for problem in HfWeights.open(tmp_path, table).problems(table)]
    assert any(stack in where for where in named)
