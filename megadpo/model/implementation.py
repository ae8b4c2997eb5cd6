"""Whose layers a run is built from: Transformer Engine's fused ones or megatron-core's own; and why."""

from __future__ import annotations

import functools
import os
import warnings
from dataclasses import dataclass
from typing import Literal

import torch

from megadpo.config.problems import ConfigError, Problem
from megadpo.config.rules_gpu import why_not_transformer_engine
from megadpo.config.schema_megatron import Fp8Config
from megadpo.config.schema_policy import PolicyConfig

_IMPL, _FP8 = "policy.megatron_cfg.transformer_impl", "policy.megatron_cfg.fp8_cfg.enabled"
INSTALL = "install the 'gpu' extra (pip install megadpo[gpu], see docs/gpu.md)"


@dataclass(frozen=True)
class Implementation:
    """The choice, and the reason for it in words for the banner."""

    name: Literal["transformer_engine", "local"]
    reason: str

    @property
    def is_transformer_engine(self) -> bool:
        return self.name == "transformer_engine"


def choose_implementation(policy: PolicyConfig, device: torch.device) -> Implementation:
    """The choice for `policy.megatron_cfg.transformer_impl` on this machine.

    Raises ConfigError where Transformer Engine is asked for, by name or by float8, and can't be had.
    """
    asked = policy.megatron_cfg.transformer_impl
    problems = implementation_problems(policy, device)
    if problems:
        raise ConfigError(problems)
    if asked == "local":
        return Implementation("local", f"asked for by {_IMPL}")
    reason = _why_local(policy, device)
    if reason is not None:
        return Implementation("local", reason)
    why = f"asked for by {_IMPL}" if asked == "transformer_engine" else "CUDA, bfloat16, Transformer Engine installed"
    return Implementation("transformer_engine", why)


def implementation_problems(policy: PolicyConfig, device: torch.device) -> list[Problem]:
    """What the config asks of Transformer Engine and this machine lacks; the config's own rules are checked before."""
    megatron = policy.megatron_cfg
    reason = _why_local(policy, device)
    problems = []
    if reason is not None and megatron.transformer_impl == "transformer_engine":
        fix = f"set it to auto or local, or {INSTALL} on a machine with CUDA"
        problems.append(
            Problem(
                _IMPL, "transformer_engine", f"local or auto, for Transformer Engine is not to be had: {reason}", fix
            )
        )
    if megatron.fp8_cfg.enabled:
        if reason is not None:
            fix = f"set it to false, or {INSTALL} on a machine with CUDA"
            problems.append(Problem(_FP8, True, f"false without Transformer Engine: {reason}", fix))
        elif (reason := fp8_unsupported(megatron.fp8_cfg, device)) is not None:
            problems.append(Problem(_FP8, True, f"false on this GPU: {reason}", "set it to false"))
    where = "policy.megatron_cfg.gradient_accumulation_fusion"
    if megatron.gradient_accumulation_fusion and _why_local(policy, device) is not None and not has_apex_kernel():
        expected = "false or null without Transformer Engine's layers or apex's fused_weight_gradient_mlp_cuda"
        problems.append(Problem(where, True, expected, f"set it to null, or {INSTALL} on a machine with CUDA"))
    # megatron-core asserts this of every model it builds (language_module.py `_set_attention_backend`), and sets them
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        if (value := os.environ.get(name, "1")) != "1":
            fix = f"unset {name}; policy.attention_kernel chooses the kernel"
            problems.append(Problem(f"environment variable {name}", value, "unset or 1", fix))
    return problems


def _why_local(policy: PolicyConfig, device: torch.device) -> str | None:
    """Why Transformer Engine's layers can't be used; None where they can."""
    if device.type != "cuda":
        return "no CUDA device"
    return why_not_transformer_engine(policy) or transformer_engine_missing()


@functools.cache
def transformer_engine_missing() -> str | None:
    """Why Transformer Engine can't be imported; None where it can.

    Importing is the only test: a build for another torch or without its CUDA libraries is found, and fails to load.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformer_engine.pytorch  # noqa: F401
            from megatron.core.extensions.transformer_engine import HAVE_TE
    except ModuleNotFoundError as error:
        return f"Transformer Engine is not installed ({error})"
    except Exception as error:  # the loader raises OSError, the build RuntimeError, its self-checks AssertionError
        return f"Transformer Engine is installed but can't be loaded ({str(error).splitlines()[0]})"
    return None if HAVE_TE else "megatron-core could not import Transformer Engine's parts that it uses"


def fp8_unsupported(fp8: Fp8Config, device: torch.device) -> str | None:
    """Why `device` has no float8 of this recipe; None where it has. Needs Transformer Engine and CUDA."""
    if torch.cuda.get_device_capability(device) < (9, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Hopper (compute capability 9.0)"
    if fp8.fp8_recipe == "blockwise" and tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2])) < (12, 9):
        return f"blockwise scaling needs CUDA 12.9, and torch was built for {torch.version.cuda}"
    return None


def has_apex_kernel() -> bool:
    """Whether apex's kernel is there, without which megatron-core's own linear layers refuse the fusion."""
    try:
        import fused_weight_gradient_mlp_cuda  # noqa: F401
    except ImportError:
        return False
    return torch.cuda.is_available()


def fuses_weight_gradient(policy: PolicyConfig, implementation: Implementation) -> bool:
    """`gradient_accumulation_fusion` of the layers: as asked, or wherever a kernel for it is there."""
    asked = policy.megatron_cfg.gradient_accumulation_fusion
    there = implementation.is_transformer_engine or has_apex_kernel()
    return there if asked is None else asked and there
