"""LoRA beside other fields of a config."""

from __future__ import annotations

import pytest

from megadpo.config import load_config

PEFT = "policy.megatron_cfg.peft"
ON = {"policy__megatron_cfg__peft__enabled": True}


def test_a_run_with_lora_switches_its_adapters_off_for_the_reference(config):
    assert config(**ON).dpo.reference.mode == "adapter_off"
    assert config(**ON, dpo__reference__mode=None).dpo.reference.mode == "adapter_off"
    assert config(**ON, dpo__reference__mode="cached").dpo.reference.mode == "cached"
    assert config(**ON, dpo__reference__model_name="other/model").dpo.reference.mode == "resident"
    assert config().dpo.reference.mode == "resident"
    lora = [f"policy.megatron_cfg.peft.{one}" for one in ("enabled=true", "dim=32")]  # as docs/lora.md has it
    assert load_config("dpo_megatron", lora).dpo.reference.mode == "adapter_off"
    assert load_config("dpo_megatron").dpo.reference.mode == "resident"


def test_the_scale(config):
    peft = config(**ON, policy__megatron_cfg__peft__dim=16).policy.megatron_cfg.peft
    assert peft.scale == 2.0
    assert (
        config(
            **ON, policy__megatron_cfg__peft__dim=16, policy__megatron_cfg__peft__use_rslora=True
        ).policy.megatron_cfg.peft.scale
        == 8.0
    )


@pytest.mark.parametrize(
    ("values", "where", "words"),
    [
        ({"dpo__reference__mode": "adapter_off"}, "dpo.reference.mode", "there is no adapter to switch off"),
        (
            {**ON, "dpo__reference__mode": "adapter_off", "dpo__reference__model_name": "some/other"},
            "dpo.reference.model_name",
            "null with dpo.reference.mode adapter_off",
        ),
        ({**ON, "policy__freeze": ["model.embed_tokens.weight"]}, "policy.freeze", "freezes every weight"),
        ({**ON, "policy__megatron_cfg__peft__lora_A_init_method": "zero"}, f"{PEFT}.lora_A_init_method", "neither"),
        ({**ON, "policy__megatron_cfg__peft__dropout": 1.0}, f"{PEFT}.dropout", "< 1"),
        ({**ON, "policy__megatron_cfg__peft__a2a_experimental": True}, f"{PEFT}.a2a_experimental", "false or null"),
        ({**ON, "policy__megatron_cfg__peft__use_dora": True}, f"{PEFT}.use_dora", "DoRA"),
        (
            {"policy__dtensor_cfg": {"enabled": False, "lora_cfg": {"enabled": True, "dim": 8}}},
            "policy.dtensor_cfg.lora_cfg.enabled",
            "policy.megatron_cfg.peft.enabled: true",
        ),
    ],
)  # fmt: skip
def test_refused(refusals, values, where, words):
    found = refusals(**values)
    assert [*found] == [where]
    assert words in str(found[where])


def test_an_adapter_for_no_reference(refusals):
    values = {"dpo__reference__mode": "none", "dpo__preference_loss_weight": 0.0, "dpo__sft_loss_weight": 1.0}
    assert [*refusals(**values, dpo__reference__adapter="some/folder")] == ["dpo.reference.adapter"]
