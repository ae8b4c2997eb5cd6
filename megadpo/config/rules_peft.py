"""Rules of LoRA. lora/targets.py checks the names of layers against the model."""

from __future__ import annotations

from collections.abc import Iterator

from megadpo.config.known import Known, rule
from megadpo.config.problems import Problem

PEFT = "policy.megatron_cfg.peft"


@rule
def _frozen_twice(known: Known) -> Iterator[Problem]:
    if known.cfg.policy.megatron_cfg.peft.enabled and known.cfg.policy.freeze:
        expected = f"nothing with {PEFT}.enabled, which freezes every weight of the model"
        fix = f"remove it; {PEFT}.exclude_modules leaves layers without an adapter"
        yield Problem("policy.freeze", list(known.cfg.policy.freeze), expected, fix)


@rule
def _start(known: Known) -> Iterator[Problem]:
    peft = known.cfg.policy.megatron_cfg.peft
    if peft.enabled and peft.lora_A_init_method == peft.lora_B_init_method == "zero":
        expected = "another start than zero for A or B: with both 0 neither gets a gradient"
        yield Problem(f"{PEFT}.lora_A_init_method", "zero", expected, "set it to xavier")


@rule
def _reference(known: Known) -> Iterator[Problem]:
    reference, lora = known.cfg.dpo.reference, known.cfg.policy.megatron_cfg.peft.enabled
    if reference.mode == "adapter_off" and not lora:
        expected = f"resident, cached or none without {PEFT}.enabled: there is no adapter to switch off"
        yield Problem("dpo.reference.mode", "adapter_off", expected, f"remove it, or set {PEFT}.enabled: true")
    if reference.mode == "adapter_off" and reference.model_name is not None:
        expected = "null with dpo.reference.mode adapter_off: the reference is policy.model_name without its adapters"
        fix = "remove it, or set dpo.reference.mode: resident"
        yield Problem("dpo.reference.model_name", reference.model_name, expected, fix)
    if reference.adapter is not None and reference.mode == "none":
        fix = "remove it, or set another mode"
        yield Problem("dpo.reference.adapter", reference.adapter, "null with dpo.reference.mode none", fix)
