"""Whose AdamW a run steps with. megadpo says so; megatron-core would take whatever can be imported."""

from __future__ import annotations

from typing import Literal

import torch
from megatron.core import optimizer as mcore_optimizer
from megatron.core.optimizer import distrib_optimizer

from megadpo.config.schema_megatron import OptimizerConfig
from megadpo.parallel.device import why_missing

AdamName = Literal["transformer_engine", "torch"]


def choose_adam(optimizer: OptimizerConfig, device: torch.device) -> tuple[AdamName, str]:
    """The choice for `optimizer.adam_impl` on this machine, and why. `machine_problems` has refused the impossible."""
    if optimizer.adam_impl != "auto":
        return optimizer.adam_impl, "asked for by policy.megatron_cfg.optimizer.adam_impl"
    if device.type != "cuda":
        return "torch", "no CUDA device"
    missing = why_missing("transformer_engine")
    return ("torch", missing) if missing else ("transformer_engine", "CUDA, Transformer Engine installed")


def use_adam(name: AdamName) -> None:
    """Make megatron-core build, save and load this AdamW, for the rest of the process.

    It decides at import by what is installed, in two modules: which class it builds (optimizer/__init__.py:12-34 and
    :359), and where the step count stands in the state: in each parameter's state (torch) or in each group (FusedAdam)
    (distrib_optimizer.py:24-40, :640-690 and :815-845).
    """
    if name == "torch":
        mcore_optimizer.Adam = torch.optim.AdamW
        distrib_optimizer.Adam = torch.optim.AdamW
    else:
        from transformer_engine.pytorch.optimizers import FusedAdam

        mcore_optimizer.Adam = FusedAdam
        distrib_optimizer.Adam = FusedAdam
    is_te = name == "transformer_engine"
    mcore_optimizer.USING_PYTORCH_OPTIMIZER = not is_te
    distrib_optimizer.HAVE_APEX_OR_TE = is_te
    distrib_optimizer.USING_TE_OPTIMIZER = is_te
    distrib_optimizer.USING_APEX_OPTIMIZER = False


def adam_name(inner: torch.optim.Optimizer) -> str:
    """In words for the banner."""
    module = type(inner).__module__
    owner = "Transformer Engine" if module.startswith("transformer_engine") else module.split(".")[0]
    return f"{type(inner).__name__} of {owner}"
