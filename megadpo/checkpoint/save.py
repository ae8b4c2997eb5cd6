"""Writes a checkpoint to a partial folder and then renames it, so that a folder called step_<N> is complete or absent."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
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
from torch.distributed.checkpoint.storage import WriteResult

from megadpo.checkpoint.folder import FORMAT, TrainingPosition, delete, delete_unfinished, partial_folder
from megadpo.checkpoint.writer import HostCopies, RankFiles, SaveStrategy
from megadpo.config.grid import Grid
from megadpo.config.load import save_resolved
from megadpo.config.problems import SaveError, first_line
from megadpo.config.schema import Config
from megadpo.files.atomic import sync, sync_below, write_then_rename
from megadpo.lora.state import sharded_adapters
from megadpo.model.manifest import AS_TRAINED, HF_TOKENIZER, INFO_FILE, FileProof, prove, write_manifest
from megadpo.model.weights.convert import copy_hf_files, keep_hf_files
from megadpo.model.weights.dist_folder import COMMON_FILE
from megadpo.optimizer.state import METADATA, sharded_state
from megadpo.parallel import ParallelContext

EXTRA_STATE = "._extra_state"
"""Part of the names of a module's state besides parameters; grouped experts append a number."""


def begin_save(
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
    copies: HostCopies | None = None,
) -> Save:
    """Begin the checkpoint <folder>/step_<N> of the present state; with LoRA its weights are the adapters. All ranks call
    it together.

    model: the unwrapped chunks of this rank (the DDP wrapper would prefix every key). optimizer None: weights only.
    hf_files, own_files: as `keep_hf_files` takes them, for hf/; only rank 0's own_files are used. copies: memory that the
    state is copied to, so that training can continue before `Save.write` has ended. Collectives: those of megatron-core's
    planning and has_frozen_weights, a broadcast of a pickled object. Raises SaveError on every rank if the folder can't be
    made.
    """
    final = folder / f"step_{position.step}"
    partial = partial_folder(final)
    lora = cfg.policy.megatron_cfg.peft.enabled
    state = {**_trained_state(model, optimizer, parallel, lora=lora), "scheduler": scheduler.state_dict()}
    record = {
        "format": FORMAT,
        "dtype": str(model[0].config.params_dtype).removeprefix("torch."),
        "world_size": parallel.world_size,
        "layout": layout_name(parallel.grid, model[0].config.sequence_parallel),
        "has_optimizer": optimizer is not None,
        "optimizer_format": optimizer_format(optimizer),
        "position": asdict(position),
        "lora": lora,
        "manifest": True,
        HF_TOKENIZER: AS_TRAINED,
    }
    _begin_folder(partial, parallel)
    strategy = SaveStrategy(copies)
    dist_checkpointing.save(state, str(partial / "model"), strategy, async_sharded_save=True)

    def small_files() -> None:
        (partial / "model" / COMMON_FILE).write_bytes(strategy.common.content)
        (copy_hf_files if lora else keep_hf_files)(hf_files, partial / "hf", own_files)
        save_resolved(cfg, partial / "config.yaml")
        with write_then_rename(partial / INFO_FILE) as file:
            file.write_text(json.dumps(record, indent=1))

    return Save(final, parallel, strategy.files, _rng_state(parallel.device.type), small_files)


def _trained_state(
    model: Sequence[MegatronModule], optimizer: MegatronOptimizer | None, parallel: ParallelContext, *, lora: bool
) -> dict[str, Any]:
    """The weights, or with LoRA the adapters, and their optimizer state."""
    weights = sharded_adapters(model, parallel.grid) if lora else sharded_weights(model)
    if optimizer is None:
        return {"weights": weights}
    per_layer = not lora and has_frozen_weights(model, parallel)
    whose = sharded_weights(model, per_layer=True) if per_layer else weights
    return {"weights": weights, "optimizer": sharded_state(optimizer, whose, is_loading=False)}


def _begin_folder(partial: Path, parallel: ParallelContext) -> None:
    """Rank 0 makes the folder. Raises SaveError on every rank if it can't. Collectives: a broadcast of a pickled object."""
    words: list[str | None] = [None]
    if parallel.rank == 0:
        try:
            delete_unfinished(partial.parent)
            (partial / "model").mkdir(parents=True)
            (partial / "rng").mkdir()
        except OSError as error:
            words = [_words(error, partial, 0)]
    dist.broadcast_object_list(words, src=0)
    if words[0] is not None:
        raise SaveError(words[0])


class Save:
    """A checkpoint that is being written. `write` may run in a thread beside training. All ranks call `finish` together,
    when each has written."""

    def __init__(
        self,
        final: Path,
        parallel: ParallelContext,
        files: RankFiles,
        rng: dict[str, Any],
        small_files: Callable[[], None],
    ) -> None:
        """small_files: writes the files that are not tensors; called on rank 0."""
        self.final = final
        self._partial = partial_folder(final)
        self._parallel = parallel
        self._files = files
        self._rng = rng
        self._small_files = small_files
        self._written: list[WriteResult] = []
        self._proofs: dict[str, FileProof] = {}
        self._error: str | None = "it was not written"

    def write(self) -> None:
        """Write this rank's files; they are on the disk when this returns. No collectives. `finish` reports an error."""
        try:
            self._write()
            self._error = None
        except Exception as error:
            disk = _disk_error(error)
            self._error = str(disk) if disk is not None else f"{type(error).__name__}: {first_line(error)}"

    def _write(self) -> None:
        self._written = self._files.write()
        rng = self._partial / "rng" / f"rank_{self._parallel.rank}.pt"
        torch.save(self._rng, rng)
        sync(rng)
        # Each rank reads its own files for the checksums: its node still has them in memory
        mine = [*(self._partial / "model").glob(f"__{self._parallel.rank}_*.distcp"), rng]
        self._proofs = prove(self._partial, mine)
        if self._parallel.rank == 0:
            self._small_files()
            sync_below(self._partial, but=set(mine))
        sync(rng.parent)
        sync(rng.parent.parent / "model")

    def finish(self, allowed: Callable[[], None] = lambda: None) -> Path:
        """Give the checkpoint its name, if every rank has written its part; returns its path.

        allowed: called on rank 0 right before the rename; may raise SaveError to prevent it. Raises SaveError on every
        rank. The partial folder then stays until the next save; complete checkpoints are untouched. Collectives: an
        all-gather and a broadcast of pickled objects.
        """
        mine = (self._error, self._files.bytes, self._proofs, self._written)
        everywhere = [mine] * self._parallel.world_size
        dist.all_gather_object(everywhere, mine)
        wanted = sum(size for _, size, _, _ in everywhere)
        if errors := sorted({error for error, _, _, _ in everywhere if error is not None}):
            raise SaveError(_words("; ".join(errors), self._partial, wanted))
        outcome: list[str | None] = [None]
        if self._parallel.rank == 0:
            try:
                self._files.write_metadata([written for _, _, _, written in everywhere])
                self._name({name: proof for _, _, proofs, _ in everywhere for name, proof in proofs.items()}, allowed)
            except SaveError as error:
                outcome = [str(error)]
            except OSError as error:
                outcome = [_words(error, self._partial, wanted)]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[0] is not None:
            raise SaveError(outcome[0])
        return self.final

    def _name(self, proofs: dict[str, FileProof], allowed: Callable[[], None]) -> None:
        """On rank 0: write the manifest and rename. Raises SaveError and OSError."""
        for name in (".metadata", "metadata.json"):
            sync(self._partial / "model" / name)
        sync(self._partial / "model")
        write_manifest(self._partial, proofs)
        sync(self._partial)
        allowed()
        if self.final.exists():  # the same step again, after a resume from an older checkpoint
            delete(self.final)
        os.replace(self._partial, self.final)
        sync(self.final.parent)


def _disk_error(error: BaseException | None) -> OSError | None:
    """The OSError behind `error`, if there is one: after it torch's zip writer raises another error."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _words(reason: OSError | str, partial: Path, wanted: int) -> str:
    try:
        free = f"{shutil.disk_usage(partial.parent).free:,} bytes are free there"
    except OSError as error:
        free = str(error)
    takes = f"{wanted:,} bytes of tensors are to be written, " if wanted else ""
    return f"{partial}: {reason}; {takes}{free}; make room, or set checkpointing.keep_top_k or another checkpoint_dir"


def sharded_weights(model: Sequence[MegatronModule], *, per_layer: bool = False) -> dict[str, Any]:
    """The weights of this rank's chunks. Keys in the file have names and layer numbers of the whole model, so that any
    layout can read them; the chunk names in the result are not written.

    per_layer: one key for each layer, not one for all layers. Needed for optimizer state when some layers are frozen and
    have none, because megatron-core refuses a stacked tensor with missing layers.
    """
    metadata = {**METADATA, "non_homogeneous_layers": per_layer}
    return {
        f"model{number}": _same_in_every_implementation(chunk.sharded_state_dict(metadata=metadata))
        for number, chunk in enumerate(model)
    }


def has_frozen_weights(model: Sequence[torch.nn.Module], parallel: ParallelContext) -> bool:
    """Whether any rank has a frozen weight. All ranks must write the same kind of keys, and one pipeline stage may be frozen
    while another is not. Collectives: an all-reduce of one number over the world."""
    frozen = any(not parameter.requires_grad for chunk in model for parameter in chunk.parameters())
    shared = torch.tensor([frozen], dtype=torch.int32, device=parallel.device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared.item())


def _same_in_every_implementation(state: dict[str, Any]) -> dict[str, Any]:
    """Makes the `_extra_state` entries the same for all implementations of layers. Every linear layer keeps an empty one.
    Those of Transformer Engine's norms are left out, since other implementations have none. In float8 its linear layers
    store their recipe there; it is emptied, since the config has it, and megadpo's recipes keep no state between
    batches."""
    kept = {}
    for name, value in state.items():
        if EXTRA_STATE in name:
            if "norm." in name:
                continue
            value.data = None
        kept[name] = value
    return kept


def layout_name(grid: Grid, sequence_parallel: bool) -> str:
    """Text that is equal for layouts between which a resume gives the same bits."""
    sequence = " sp" if sequence_parallel else ""
    virtual = f" vpp{grid.virtual_pipeline}" if grid.virtual_pipeline > 1 else ""
    experts = f" ep{grid.expert} etp{grid.expert_tensor}" if (grid.expert, grid.expert_tensor) != (1, 1) else ""
    context = f" cp{grid.context}" if grid.context > 1 else ""
    return f"tp{grid.tensor} pp{grid.pipeline}{virtual}{context} dp{grid.data}{sequence}{experts}"


def optimizer_format(optimizer: MegatronOptimizer | None) -> str:
    """Class names of the optimizers that hold the state: each class writes tensors under other names."""
    if optimizer is None:
        return ""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return "+".join(f"{type(p).__name__}({type(p.optimizer).__name__})" for p in parts)


def _rng_state(device_type: str) -> dict[str, Any]:
    return {
        "device": device_type,  # a GPU's generator can't read a CPU's state, nor the reverse
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
