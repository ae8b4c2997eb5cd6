"""Which layers a machine gets, and why; and what it says where it lacks what was asked for."""

from __future__ import annotations

import pytest
import torch

from megadpo.config.problems import ConfigError
from megadpo.config.schema_megatron import Fp8Config, MegatronConfig
from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
from megadpo.model import implementation
from megadpo.model.implementation import choose_implementation, fuses_weight_gradient, implementation_problems
from megadpo.model.transformer_config import uses_grouped_gemm
from megadpo.optimizer.kinds.adam import Adam

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MISSING = "Transformer Engine is not installed (No module named 'transformer_engine')"


def policy_of(precision="bfloat16", **megatron):
    return PolicyConfig(
        model_name="m",
        tokenizer=TokenizerConfig(name="m"),
        precision=precision,
        megatron_cfg=MegatronConfig(**megatron),
    )


@pytest.fixture
def machine(monkeypatch):
    """machine(missing=None, capability=(9, 0), cuda="13.0"): what the machine with CUDA has."""

    def be(missing=None, capability=(9, 0), cuda="13.0"):
        monkeypatch.setattr(implementation, "transformer_engine_missing", lambda: missing)
        monkeypatch.setattr("megadpo.optimizer.adam.transformer_engine_missing", lambda: missing)
        monkeypatch.setattr(implementation, "has_apex_kernel", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
        monkeypatch.setattr(torch.version, "cuda", cuda)

    return be


@pytest.mark.parametrize(
    ("options", "device", "missing", "name", "reason"),
    [
        ({}, CPU, None, "local", "no CUDA device"),
        ({}, CUDA, None, "transformer_engine", "CUDA, bfloat16"),
        ({}, CUDA, MISSING, "local", "not installed"),
        ({"precision": "float32"}, CUDA, None, "local", "TF32"),
        ({"transformer_impl": "local"}, CUDA, None, "local", "asked for"),
        ({"transformer_impl": "transformer_engine"}, CUDA, None, "transformer_engine", "asked for"),
        (
            {
                "activation_checkpointing": True,
                "recompute_granularity": "selective",
                "recompute_modules": ("layernorm",),
            },
            CUDA,
            None,
            "local",
            "layernorm",
        ),
    ],
)
def test_the_choice_and_its_reason(options, device, missing, name, reason, machine):
    machine(missing)
    chosen = choose_implementation(policy_of(**options), device)
    assert chosen.name == name and reason in chosen.reason


@pytest.mark.parametrize(
    ("options", "device", "machine_has", "where", "why"),
    [
        ({"transformer_impl": "transformer_engine"}, CPU, {}, "transformer_impl", "no CUDA device"),
        ({"transformer_impl": "transformer_engine"}, CUDA, {"missing": MISSING}, "transformer_impl", "not installed"),
        ({"fp8_cfg": Fp8Config(enabled=True)}, CPU, {}, "fp8_cfg.enabled", "no CUDA device"),
        ({"fp8_cfg": Fp8Config(enabled=True)}, CUDA, {"missing": MISSING}, "fp8_cfg.enabled", "not installed"),
        ({"fp8_cfg": Fp8Config(enabled=True)}, CUDA, {"capability": (8, 0)}, "fp8_cfg.enabled", "Hopper"),
        ({"fp8_cfg": Fp8Config(enabled=True)}, CUDA, {"cuda": "12.8"}, "fp8_cfg.enabled", "CUDA 12.9"),
        ({"gradient_accumulation_fusion": True}, CPU, {}, "gradient_accumulation_fusion", "apex"),
    ],
)
def test_what_the_machine_lacks_is_refused(options, device, machine_has, where, why, machine):
    machine(**machine_has)
    [problem] = implementation_problems(policy_of(**options), device)
    assert problem.where.endswith(where) and why in problem.expected and problem.fix
    with pytest.raises(ConfigError, match=where):
        choose_implementation(policy_of(**options), device)


def test_tensorwise_float8_does_with_an_older_cuda(machine):
    machine(cuda="12.8")
    fp8 = Fp8Config(enabled=True, fp8_recipe="tensorwise")
    assert implementation_problems(policy_of(fp8_cfg=fp8), CUDA) == []


@pytest.mark.parametrize(("asked", "local", "te"), [(None, False, True), (False, False, False), (True, False, True)])
def test_weight_gradients_are_fused_where_they_can_be(asked, local, te, machine):
    machine()
    policy = policy_of(gradient_accumulation_fusion=asked)
    names = ("local", "transformer_engine")
    found = [fuses_weight_gradient(policy, implementation.Implementation(name, "")) for name in names]
    assert found == [local, te]


def test_experts_are_grouped_with_transformer_engines_layers():
    assert [uses_grouped_gemm(policy_of(), has_te) for has_te in (False, True)] == [False, True]
    assert uses_grouped_gemm(policy_of(moe_grouped_gemm=False), has_te=True) is False
    with pytest.raises(ConfigError, match="moe_grouped_gemm"):
        uses_grouped_gemm(policy_of(moe_grouped_gemm=True), has_te=False)


def test_whose_adam(machine):
    machine()
    assert Adam().choose("cpu")[0] == "torch"
    assert Adam().choose("cuda")[0] == "transformer_engine"
    assert Adam(adam_impl="torch").choose("cuda")[0] == "torch"
    machine(MISSING)
    assert Adam().choose("cuda") == ("torch", MISSING)


def test_without_transformer_engine_the_reason_is_the_import_error():
    try:
        import transformer_engine  # noqa: F401
    except ImportError:
        assert implementation.transformer_engine_missing() == MISSING
    else:
        pytest.skip("Transformer Engine is installed")


@pytest.mark.parametrize("name", ["NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"])
def test_switches_that_megatron_core_would_stop_at_are_refused(name, monkeypatch):
    """Its assertion, in every model it builds, speaks of an argument that megadpo hasn't."""
    monkeypatch.setenv(name, "0")
    [problem] = implementation_problems(policy_of(), CPU)
    assert problem.where == f"environment variable {name}" and problem.fix.startswith(f"unset {name}")
    monkeypatch.setenv(name, "1")  # as megatron-core leaves it
    assert implementation_problems(policy_of(), CPU) == []
