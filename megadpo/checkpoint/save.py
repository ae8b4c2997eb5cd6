"""Writing a checkpoint: aside, then renamed, so that a folder called step_<N> is whole or absent."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule

from megadpo.checkpoint.folder import FORMAT, TrainingPosition, delete, partial_folder
from megadpo.checkpoint.writer import SaveStrategy
from megadpo.config.grid import Grid
from megadpo.config.load import save_resolved
from megadpo.config.schema import Config
from megadpo.files.atomic import sync, write_then_rename
from megadpo.model.manifest import FileProof, prove, write_manifest
from megadpo.model.weights.convert import keep_hf_files
from megadpo.optimizer.state import METADATA, sharded_state
from megadpo.parallel import ParallelContext

EXTRA_STATE = "._extra_state"
"""In the names of what modules keep beside their parameters; grouped experts add a number to it."""


def save_checkpoint(
    folder: Path,
    position: TrainingPosition,
    parallel: ParallelContext,
    *,
    model: Sequence[MegatronModule],
    optimizer: MegatronOptimizer | None,
    scheduler: OptimizerParamScheduler,
    hf_files: Path,
    own_files: Mapping[str, bytes],
    cfg: Config,
) -> Path:
    """Write <folder>/step_<N> and return it. All ranks call it together.

    model: the unwrapped chunks of this rank (the DDP wrapper would prefix every key). optimizer None: weights only.
    hf_files, own_files: as `keep_hf_files` takes them, for hf/; own_files counts on rank 0. Collectives: those of
    dist_checkpointing.save and has_frozen_weights, an all-gather of pickled objects and barriers over the world. Raises what
    the file system raises (a full disk, a folder that can't be written); the partial folder then stays behind, complete
    checkpoints are untouched, and the next save starts it anew.
    """
    final = folder / f"step_{position.step}"
    partial = partial_folder(final)
    if parallel.rank == 0:
        for left in folder.glob(partial_folder(folder / "step_*").name):  # what a killed run began, whatever its step
            shutil.rmtree(left, ignore_errors=True)
        (partial / "model").mkdir(parents=True)
        (partial / "rng").mkdir()
    dist.barrier()

    weights = sharded_weights(model)
    state: dict[str, Any] = {"weights": weights, "scheduler": scheduler.state_dict()}
    if optimizer is not None:
        whose = sharded_weights(model, per_layer=True) if has_frozen_weights(model, parallel) else weights
        state["optimizer"] = sharded_state(optimizer, whose, is_loading=False)
    dist_checkpointing.save(state, str(partial / "model"), SaveStrategy())
    torch.save(_rng_state(parallel.device.type), partial / "rng" / f"rank_{parallel.rank}.pt")
    proofs = _proofs_of_writers(partial, parallel)

    if parallel.rank == 0:
        keep_hf_files(hf_files, partial / "hf", own_files)
        save_resolved(cfg, partial / "config.yaml")
        record = {
            "format": FORMAT,
            "dtype": str(model[0].config.params_dtype).removeprefix("torch."),
            "world_size": parallel.world_size,
            "layout": layout_name(parallel.grid, model[0].config.sequence_parallel),
            "has_optimizer": optimizer is not None,
            "optimizer_format": optimizer_format(optimizer),
            "position": asdict(position),
            "manifest": True,
        }
        with write_then_rename(partial / "megadpo.json") as file:
            file.write_text(json.dumps(record, indent=1))
        write_manifest(partial, proofs)
        if final.exists():  # the same step again, after a resume from an older checkpoint
            delete(final)
        os.replace(partial, final)
        sync(folder)
    dist.barrier()
    return final


def _proofs_of_writers(folder: Path, parallel: ParallelContext) -> dict[str, FileProof]:
    """Every rank reads what it wrote itself, which its node still has in memory. Collectives: an all-gather of pickled
    objects, after which all files are there."""
    mine = [*(folder / "model").glob(f"__{parallel.rank}_*.distcp"), folder / "rng" / f"rank_{parallel.rank}.pt"]
    found: list[dict[str, FileProof]] = [{} for _ in range(parallel.world_size)]
    dist.all_gather_object(found, prove(folder, mine))
    return {name: proof for proofs in found for name, proof in proofs.items()}


def sharded_weights(model: Sequence[MegatronModule], *, per_layer: bool = False) -> dict[str, Any]:
    """The weights of this rank's chunks. Tensors go by names and layer numbers of the whole model, so that any layout
    reads them; the names of the chunks stay in this process.

    per_layer: a key for each layer, not one for all: for optimizer state where frozen layers have none, since
    megatron-core refuses a stacked tensor with layers missing.
    """
    metadata = {**METADATA, "non_homogeneous_layers": per_layer}
    return {
        f"model{number}": _same_in_every_implementation(chunk.sharded_state_dict(metadata=metadata))
        for number, chunk in enumerate(model)
    }


def has_frozen_weights(model: Sequence[torch.nn.Module], parallel: ParallelContext) -> bool:
    """Whether training leaves out a weight of any rank: one pipeline stage may be frozen and another not, and all have to
    write the same keys. Collectives: an all-reduce of one number over the world."""
    frozen = any(not parameter.requires_grad for chunk in model for parameter in chunk.parameters())
    shared = torch.tensor([frozen], dtype=torch.int32, device=parallel.device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared.item())


def _same_in_every_implementation(state: dict[str, Any]) -> dict[str, Any]:
    """Linear layers keep an empty `_extra_state` beside their weight in every checkpoint. Transformer Engine's norms do
    so too, which other implementations' checkpoints lack; and in float8 its linear layers keep their recipe there, which
    the config says: the recipes that megadpo offers carry nothing from one batch to the next."""
    kept = {}
    for name, value in state.items():
        if EXTRA_STATE in name:
            if "norm." in name:
                continue
            value.data = None
        kept[name] = value
    return kept


def layout_name(grid: Grid, sequence_parallel: bool) -> str:
    """What must be equal for a resume to be the same bits."""
    sequence = " sp" if sequence_parallel else ""
    virtual = f" vpp{grid.virtual_pipeline}" if grid.virtual_pipeline > 1 else ""
    experts = f" ep{grid.expert} etp{grid.expert_tensor}" if (grid.expert, grid.expert_tensor) != (1, 1) else ""
    context = f" cp{grid.context}" if grid.context > 1 else ""
    return f"tp{grid.tensor} pp{grid.pipeline}{virtual}{context} dp{grid.data}{sequence}{experts}"


def optimizer_format(optimizer: MegatronOptimizer | None) -> str:
    """Class names of what keeps the state: they write tensors under different names."""
    if optimizer is None:
        return ""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return "+".join(f"{type(p).__name__}({type(p.optimizer).__name__})" for p in parts)


def _rng_state(device_type: str) -> dict[str, Any]:
    return {
        "device": device_type,  # generators of GPUs and CPUs don't take each other's states
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
