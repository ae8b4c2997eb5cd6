"""What must hold between the fields that choose whose optimizer a GPU runs."""

from __future__ import annotations

from collections.abc import Iterator

from megadpo.config.problems import Problem
from megadpo.config.rules import rule
from megadpo.config.schema import Config

_MEG = "policy.megatron_cfg"
_OPT = f"{_MEG}.optimizer"


@rule
def _adam(cfg: Config) -> Iterator[Problem]:
    optimizer, where = cfg.policy.megatron_cfg.optimizer, f"{_OPT}.adam_impl"
    if optimizer.adam_impl == "auto":
        return
    if optimizer.optimizer != "adam":
        yield Problem(where, optimizer.adam_impl, f"auto with {_OPT}.optimizer {optimizer.optimizer}", "set it to auto")
    if optimizer.adam_impl == "transformer_engine" and cfg.policy.device == "cpu":
        yield Problem(where, optimizer.adam_impl, "torch or auto on policy.device cpu", "set it to auto")
    precision_aware = optimizer.use_precision_aware_optimizer and not optimizer.optimizer_cpu_offload
    if optimizer.adam_impl == "torch" and precision_aware:
        fix = f"set it to auto, or {_OPT}.use_precision_aware_optimizer: false"
        expected = "transformer_engine or auto with use_precision_aware_optimizer, which is its FusedAdam"
        yield Problem(where, "torch", expected, fix)
