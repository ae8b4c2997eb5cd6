"""The optimizer's state as megatron-core's checkpoints want it, with its two traps for torch's AdamW closed.

Format: `fully_reshardable` for the distributed optimizer (state shaped as the parameters, so any layout can load it).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def sharded_state(optimizer: MegatronOptimizer, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """The sharded state dict, for saving, or (`is_loading`) to be filled by loading.

    model_state: the model's own sharded state dict. Collectives: for the distributed optimizer, gathers over dp.
    """
    if is_loading:
        _make_state(optimizer)
    return optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=METADATA)


def load_sharded_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Put a loaded state into the optimizer. No collectives."""
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            _let_step_pass(part)
    optimizer.load_state_dict(state)
    for part in _parts(optimizer):
        _own_step_per_parameter(part.optimizer)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _make_state(optimizer: MegatronOptimizer) -> None:
    """torch's AdamW makes its state at the first step; a load needs it before, `step` included."""
    for part in _parts(optimizer):
        inner = part.optimizer
        if not isinstance(inner, (torch.optim.AdamW, torch.optim.Adam)):
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                if len(inner.state[parameter]) == 0:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def _let_step_pass(part: DistributedOptimizer) -> None:
    """distrib_optimizer.py `_set_main_param_and_optimizer_states` copies every entry of a parameter's state from the
    checkpoint, and raises KeyError for torch's `step`, which is kept once for all parameters."""
    copy_states = type(part)._set_main_param_and_optimizer_states

    def with_step(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        copy_states(part, model_param, {**{k: state[k] for k in ("step",) if k in state}, **tensors})

    part._set_main_param_and_optimizer_states = with_step


def _own_step_per_parameter(inner: torch.optim.Optimizer) -> None:
    """distrib_optimizer.py `load_state_dict` hands every parameter the SAME step tensor: one step of training would
    then count once per parameter, and Adam's bias correction drift from the first update on."""
    for state in inner.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
