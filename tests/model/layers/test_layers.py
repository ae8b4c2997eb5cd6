"""Which layers a machine gets, and why; and what it says where it lacks what was asked for."""

from __future__ import annotations

import pytest

from megadpo.config.known import Known, Machine
from megadpo.config.problems import ConfigError
from megadpo.config.schema import Config
from megadpo.config.schema_megatron import Fp8Config, MegatronConfig
from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
from megadpo.config.variants import LAYER_IMPLEMENTATIONS
from megadpo.families import parse_architecture
from megadpo.model.layers import has_apex_kernel
from megadpo.model.layers.local import LocalLayers
from megadpo.model.layers.transformer_engine import TransformerEngineLayers
from tests.families.configs import QWEN3_MOE

APEX, MISSING = "fused_weight_gradient_mlp_cuda", "transformer_engine is not installed"
CPU = Machine(device="cpu")


def gpu(*missing, capability=(9, 0), cuda=(13, 0)):
    reasons = {name: f"{name} is not installed" for name in missing}
    return Machine(device="cuda", compute_capability=capability, cuda_version=cuda, why_missing=reasons.get)


CUDA, BARE = gpu(APEX), gpu(APEX, "transformer_engine")


def known_of(machine, arch=None, precision="bfloat16", **megatron):
    policy = PolicyConfig(
        model_name="m",
        tokenizer=TokenizerConfig(name="m"),
        precision=precision,
        make_sequence_length_divisible_by=128,
        megatron_cfg=MegatronConfig(**megatron),
    )
    return Known(cfg=Config(policy=policy), arch=arch, machine=machine)


@pytest.mark.parametrize(
    ("options", "machine", "name", "reason"),
    [
        ({}, CPU, "local", "no CUDA device"),
        ({}, CUDA, "transformer_engine", "CUDA, bfloat16"),
        ({}, BARE, "local", "not installed"),
        ({"precision": "float32"}, CUDA, "local", "TF32"),
        ({"transformer_impl": "local"}, CUDA, "local", "asked for"),
        ({"transformer_impl": "transformer_engine"}, CUDA, "transformer_engine", "asked for"),
        (
            {
                "activation_checkpointing": True,
                "recompute_granularity": "selective",
                "recompute_modules": ("layernorm",),
            },
            CUDA,
            "local",
            "layernorm",
        ),
    ],
)
def test_the_choice_and_its_reason(options, machine, name, reason):
    known = known_of(machine, **options)
    chosen = LAYER_IMPLEMENTATIONS.choose(known)
    assert chosen.name == name and reason in chosen.reason(known)


FP8 = {"fp8_cfg": Fp8Config(enabled=True)}


@pytest.mark.parametrize(
    ("options", "machine", "where", "why"),
    [
        ({"transformer_impl": "transformer_engine"}, CPU, "transformer_impl", "no CUDA device"),
        ({"transformer_impl": "transformer_engine"}, BARE, "transformer_impl", MISSING),
        (FP8, CPU, "fp8_cfg.enabled", "no CUDA device"),
        (FP8, BARE, "fp8_cfg.enabled", MISSING),
        (FP8 | {"transformer_impl": "local"}, CUDA, "fp8_cfg.enabled", "transformer_impl local"),
        (FP8, gpu(capability=(8, 0)), "fp8_cfg.enabled", "8.0 is older than Hopper's 9.0"),
        (FP8, gpu(cuda=(12, 8)), "fp8_cfg.enabled", "CUDA 12.9"),
        ({"gradient_accumulation_fusion": True}, CPU, "gradient_accumulation_fusion", "CUDA"),
        ({"gradient_accumulation_fusion": True}, BARE, "gradient_accumulation_fusion", "apex"),
        ({"moe_grouped_gemm": True}, BARE, "moe_grouped_gemm", "Transformer Engine's layers"),
    ],
)
def test_what_the_machine_lacks_is_refused(options, machine, where, why):
    known = known_of(machine, arch=parse_architecture(QWEN3_MOE) if "moe_grouped_gemm" in options else None, **options)
    [problem] = LAYER_IMPLEMENTATIONS.problems(known)
    assert problem.where.endswith(where) and why in problem.expected and problem.fix
    with pytest.raises(ConfigError, match=where):
        LAYER_IMPLEMENTATIONS.choose(known)


def test_by_name_everything_that_it_cannot_do_is_said_at_once():
    known = known_of(BARE, transformer_impl="transformer_engine", **FP8)
    assert [problem.where.rpartition(".")[2] for problem in LAYER_IMPLEMENTATIONS.problems(known)] == [
        "transformer_impl",
        "enabled",
    ]


def test_tensorwise_float8_does_with_an_older_cuda():
    fp8 = Fp8Config(enabled=True, fp8_recipe="tensorwise")
    assert list(LAYER_IMPLEMENTATIONS.problems(known_of(gpu(cuda=(12, 8)), fp8_cfg=fp8))) == []


@pytest.mark.parametrize(("asked", "fused"), [(None, True), (False, False), (True, True)])
def test_transformer_engine_fuses_and_groups_unless_told_not_to(asked, fused):
    megatron = MegatronConfig(gradient_accumulation_fusion=asked, moe_grouped_gemm=asked)
    te, local = TransformerEngineLayers(), LocalLayers()
    assert te.fuses_weight_gradient(megatron) is te.groups_experts(megatron) is fused
    assert local.fuses_weight_gradient(megatron) is local.groups_experts(megatron) is False


def test_apexs_kernel():
    assert [has_apex_kernel(known_of(machine)) for machine in (CPU, CUDA, gpu())] == [False, False, True]
