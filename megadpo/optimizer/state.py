"""The optimizer's state for megatron-core's checkpoints, with workarounds for two bugs with torch's AdamW.

Format: `fully_reshardable` for the distributed optimizer (state has the shape of the parameters, so any layout can load
it). A save collects the state of a group of replicas on its first rank, over gloo, on the host. By default all ranks would
get it through the GPUs, 12 bytes per parameter on each rank's host, although only the first rank writes it.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_NO_WEIGHTS = "a rank whose weights are all frozen"
"""Key of the step count on a rank without trainable weights. (Checkpoints have the count of rank 0.)"""
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}


def sharded_state(optimizer: MegatronOptimizer, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """The sharded state dict to save, or (`is_loading`) to load into.

    model_state: the model's own sharded state dict. Collectives: one all-reduce of a number over the world; for the
    distributed optimizer, three gathers over dp on the host for each bucket.
    """
    if is_loading:
        _make_state(optimizer)
    step = _steps_done(optimizer)
    parts = _parts(optimizer)
    for part in parts:
        if isinstance(part, DistributedOptimizer) and part.data_parallel_group_gloo is None:
            part.data_parallel_group_gloo = part.data_parallel_group  # on a CPU this group is gloo
        if isinstance(part, DistributedOptimizer) and _is_adam(part.optimizer) and not part.get_parameters():
            part.optimizer.state[_NO_WEIGHTS] = {
                "step": step.clone()
            }  # distrib_optimizer.py `state_dict` looks for one
        _same_step_in_every_group(part.optimizer, int(step))
    state = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=METADATA)
    for number, part in enumerate(parts):
        if not isinstance(part, DistributedOptimizer) and _is_adam(part.optimizer) and step > 0:
            own = state if len(parts) == 1 else state[number]
            own.get("optimizer", own)["state"].setdefault("common_step", step.clone())
    return state


def load_sharded_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Loads a state dict into the optimizer. No collectives."""
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            _allow_step(part)
    optimizer.load_state_dict(state)
    for part in _parts(optimizer):
        _own_step_per_parameter(part.optimizer)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _is_adam(inner: torch.optim.Optimizer) -> bool:
    return isinstance(inner, (torch.optim.AdamW, torch.optim.Adam))


def _steps_done(optimizer: MegatronOptimizer) -> torch.Tensor:
    """AdamW's step count, also on a rank without trainable weights. float32 scalar on the CPU."""
    inner = [part.optimizer for part in _parts(optimizer) if part.optimizer]
    states = [state for one in inner for state in one.state.values()]
    states += [group for one in inner for group in one.param_groups]  # FusedAdam counts in its groups
    device = "cuda" if torch.cuda.is_available() else "cpu"
    most = torch.tensor(max((float(s.get("step", 0)) for s in states), default=0.0), device=device)
    torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
    return most.cpu()


def _make_state(optimizer: MegatronOptimizer) -> None:
    """Creates the state of torch's AdamW, which itself does so only at the first step. Loading needs it before."""
    for part in _parts(optimizer):
        inner = part.optimizer
        if not _is_adam(inner):
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                if len(inner.state[parameter]) == 0:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


def _allow_step(part: DistributedOptimizer) -> None:
    """Workaround: distrib_optimizer.py `_set_main_param_and_optimizer_states` copies every entry of a parameter's state
    from the checkpoint. It raises KeyError for torch's `step`, which is saved once for all parameters."""
    copy_states = type(part)._set_main_param_and_optimizer_states

    def with_step(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        copy_states(part, model_param, {**{k: state[k] for k in ("step",) if k in state}, **tensors})

    part._set_main_param_and_optimizer_states = with_step


def _same_step_in_every_group(inner: torch.optim.Optimizer | None, step: int) -> None:
    """Workaround: FusedAdam counts steps in its groups, but not in a group without parameters (on a rank whose weights are
    all frozen). Checkpoints have rank 0's count; without it a resumed run would count from 1 again."""
    if inner is not None and hasattr(inner, "adam_w_mode") and step > 0:
        for group in inner.param_groups:
            if not group["params"]:
                group["step"] = step


def _own_step_per_parameter(inner: torch.optim.Optimizer) -> None:
    """Workaround: distrib_optimizer.py `load_state_dict` gives every parameter the SAME step tensor. Each step would then
    add 1 for every parameter, and Adam's bias correction would be wrong from the first update on."""
    for state in inner.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
