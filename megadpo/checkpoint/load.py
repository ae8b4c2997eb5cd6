"""Reading checkpoints: weights to start from, or a whole run to go on with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule

from megadpo.checkpoint.folder import CheckpointInfo
from megadpo.checkpoint.save import EXTRA_STATE, layout_name, optimizer_format, sharded_weights
from megadpo.config.architecture import Architecture
from megadpo.config.problems import ConfigError, Problem
from megadpo.model.source import ModelSource
from megadpo.model.weights.load import load_hf_weights, place_of
from megadpo.optimizer.state import load_sharded_state, sharded_state
from megadpo.parallel import ParallelContext


def load_weights(
    model: Sequence[MegatronModule], source: ModelSource, arch: Architecture, parallel: ParallelContext
) -> None:
    """Load this rank's chunks (unwrapped) from the folder that `source` names: a Hugging Face folder of shape `arch`, or a
    Megatron checkpoint that any layout wrote, without its optimizer.

    Collectives: those of dist_checkpointing.load for a checkpoint. Raises ConfigError where the folder's tensors are not
    this model's.
    """
    if source.megatron is None:
        load_hf_weights(model, arch, source.hf_files, place_of(parallel))
    else:
        _load_chunks(model, _load({"weights": _wanted_weights(model)}, source.megatron)["weights"])


def load_training_state(
    info: CheckpointInfo,
    parallel: ParallelContext,
    *,
    model: Sequence[MegatronModule],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    some_frozen: bool,
) -> None:
    """Restore weights, optimizer, schedule and random-number states of the run that wrote `info`.

    some_frozen: whether the run freezes weights, on any rank. In the same layout the following losses are the same bits;
    in another, or from a GPU to a CPU, random-number states start from the seed anew. Collectives: those of
    dist_checkpointing.load. Raises ConfigError where the optimizer state is of another kind or absent.
    """
    _check_optimizer(info, optimizer)
    weights = _wanted_weights(model)
    whose = _wanted_weights(model, per_layer=True) if some_frozen else weights
    wanted = {
        "weights": weights,
        "optimizer": sharded_state(optimizer, whose, is_loading=True),
        "scheduler": scheduler.state_dict(),
    }
    state = _load(wanted, info.path)
    _load_chunks(model, state["weights"])
    load_sharded_state(optimizer, state["optimizer"])
    scheduler.num_steps = 0
    scheduler.step(increment=info.position.step)
    if info.layout == layout_name(parallel):
        state = torch.load(info.path / "rng" / f"rank_{parallel.rank}.pt", weights_only=False)
        if state.get("device", parallel.device.type) == parallel.device.type:
            _restore_rng(state)


def _wanted_weights(model: Sequence[MegatronModule], *, per_layer: bool = False) -> dict[str, Any]:
    """`sharded_weights` without the empty `_extra_state`, of which each implementation keeps others."""
    whole = sharded_weights(model, per_layer=per_layer)
    return {
        chunk: {name: value for name, value in state.items() if EXTRA_STATE not in name}
        for chunk, state in whole.items()
    }


def _load_chunks(model: Sequence[MegatronModule], weights: dict[str, Any]) -> None:
    for number, chunk in enumerate(model):
        left = chunk.load_state_dict(weights[f"model{number}"], strict=False)
        missing = [name for name in left.missing_keys if EXTRA_STATE not in name]
        assert not missing and not left.unexpected_keys, (missing, left.unexpected_keys)


def _load(wanted: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(wanted, str(checkpoint / "model"), strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    except (dist_checkpointing.core.CheckpointingException, KeyError, ValueError, RuntimeError) as error:
        expected = "a Megatron checkpoint of this architecture and dtype"
        raise ConfigError(
            [Problem("policy.model_name", str(checkpoint), f"{expected} ({error})", "name the folder it was made from")]
        ) from error


def _check_optimizer(info: CheckpointInfo, optimizer: MegatronOptimizer) -> None:
    where, here = "checkpointing.checkpoint_dir", optimizer_format(optimizer)
    if not info.has_optimizer:
        fix = "start in another checkpoint_dir with policy.model_name set to this folder"
        raise ConfigError([Problem(where, str(info.path), "a checkpoint with optimizer state to resume from", fix)])
    if info.optimizer_format != here:
        fix = (
            "resume with the same optimizer, optimizer.adam_impl (AdamW: torch, FusedAdam: transformer_engine) and "
            "use_distributed_optimizer, or start anew in another checkpoint_dir"
        )
        raise ConfigError([Problem(where, f"{info.path} of {info.optimizer_format}", f"state of {here}", fix)])


def _restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
