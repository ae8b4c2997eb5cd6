"""Who takes part in benchmarks/gpu.py, and who can't on this machine."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
from collections.abc import Mapping
from typing import Any

FLOAT8 = {"ours-fp8": "blockwise", "ours-fp8-tensorwise": "tensorwise"}
"""Contenders whose linear layers multiply in float8, and their recipe: held against `ours`."""
HOPPER = (9, 0)
BLOCKWISE_CUDA = (12, 9)
_FP8 = "policy.megatron_cfg.fp8_cfg"
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours-unshared": {"share_prompt": False},
    "ours-lean": {"lean": True},
    "ours-one-pass": {"lean": True, "overrides": ("policy.megatron_cfg.optimizer.adam_impl=triton",)},
    "ours-cached-8192": {"pack_tokens": 8192, "overrides": ("dpo.reference.mode=cached",)},
    "ours-recompute": {"overrides": ("policy.megatron_cfg.activation_checkpointing=true",)},
    "ours-torch-head": {"overrides": ("policy.logprob_kernel=torch",)},
    "ours-varlen": {"overrides": ("policy.attention_kernel=varlen",)},
    "ours-sdpa": {"overrides": ("policy.attention_kernel=sdpa",)},
    "ours-joined-qkv": {"overrides": ("policy.megatron_cfg.fused_single_qkv_rope=true",)},
    "ours-flash3": {"overrides": ("policy.attention_kernel=flash3",)},
    "ours-te-attention": {"overrides": ("policy.attention_kernel=transformer_engine",)},
    "ours-te-layers": {"overrides": ("policy.megatron_cfg.transformer_impl=transformer_engine",)},
    "ours-local-layers": {"overrides": ("policy.megatron_cfg.transformer_impl=local",)},
    **{name: {"overrides": (f"{_FP8}.enabled=true", f"{_FP8}.fp8_recipe={recipe}")} for name, recipe in FLOAT8.items()},
}

NEEDS = {
    "ours-one-pass": "transformer_engine",
    "ours-flash3": "flash_attn_interface",
    "ours-te-attention": "transformer_engine",
    "ours-te-layers": "transformer_engine",
}
"""Contenders that can't run without this module."""


def absent(options: argparse.Namespace, machine: Mapping[str, Any]) -> dict[str, str]:
    """Contenders that can't take part here, and why. machine: as gpu_machine.machine() has it."""
    reasons = {}
    if options.trl:
        command = [options.trl_python, "-c", "import trl"]
        found = subprocess.run(command, capture_output=True, check=False, cwd="/", env=os.environ)
        if found.returncode != 0:
            reasons |= dict.fromkeys(options.trl, f"TRL is not importable in {options.trl_python}")
    for name in options.ours:
        reason = why_no_float8(FLOAT8[name], machine) if name in FLOAT8 else None
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            reason = f"{NEEDS[name]} is not installed"
        if reason is not None:
            reasons[name] = reason
    return reasons


def why_no_float8(recipe: str, machine: Mapping[str, Any]) -> str | None:
    """What this machine lacks for float8; None where it has all."""
    capability = tuple(machine.get("gpu_compute_capability", (0, 0)))
    if "gpu" not in machine:
        return "float8 needs a GPU"
    if capability < HOPPER:
        return f"float8 needs Hopper (compute capability 9.0); {machine['gpu']} has {capability[0]}.{capability[1]}"
    if machine["versions"]["transformer-engine"] is None:
        return "float8 needs Transformer Engine, which is not installed"
    cuda = tuple(int(part) for part in (machine.get("cuda") or "0.0").split(".")[:2])
    if recipe == "blockwise" and cuda < BLOCKWISE_CUDA:
        return f"blockwise float8 needs CUDA 12.9; torch was built for {machine.get('cuda')}"
    return None


def nothing_to_compare(options: argparse.Namespace, missing: Mapping[str, str]) -> bool:
    """Whether all that was asked for beside `ours` is float8, and none of that can run: `ours` alone says nothing."""
    beside = [name for name in (*options.ours, *options.trl) if name != "ours"]
    return bool(beside) and all(name in FLOAT8 and name in missing for name in beside)
