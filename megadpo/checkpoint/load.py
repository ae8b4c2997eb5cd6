"""Reads checkpoints: weights to start from, or the whole state of a run to resume."""

from __future__ import annotations

import io
import logging
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.strategies import common as common_strategy
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem

from megadpo.checkpoint.folder import CheckpointInfo
from megadpo.checkpoint.save import EXTRA_STATE, layout_name, optimizer_format, sharded_weights
from megadpo.checkpoint.verify import require_whole_weights
from megadpo.config.architecture import Architecture
from megadpo.config.problems import ConfigError, Problem, UserError
from megadpo.lora.attach import attach
from megadpo.lora.checkpoint import LoraCheckpoint
from megadpo.lora.state import sharded_adapters
from megadpo.model.manifest import no_manifest
from megadpo.model.source import ModelSource
from megadpo.model.weights.dist_folder import COMMON_FILE
from megadpo.model.weights.load import load_hf_weights
from megadpo.model.weights.safe_files import MetadataGiven, read_data, read_metadata
from megadpo.optimizer.state import load_sharded_state, sharded_state
from megadpo.parallel import ParallelContext

LOG = logging.getLogger(__name__)
_ONE_LAYERS_STATE = re.compile(r"optimizer\.state\..+\.layers\.\d+\.")


def load_weights(
    model: Sequence[MegatronModule], source: ModelSource, arch: Architecture, parallel: ParallelContext
) -> None:
    """Load this rank's chunks (unwrapped) from `source`: a Hugging Face folder of shape `arch`, or a Megatron checkpoint of
    any layout, without its optimizer. For a frozen model it may be a checkpoint of a run with LoRA; then the adapters are
    attached too.

    The parts of a checkpoint that are read are verified first; without a manifest, rank 0 logs that this is impossible.
    Collectives: for a checkpoint those of require_whole_weights and dist_checkpointing.load. Raises ConfigError for a
    folder that is damaged, or has the tensors of another model.
    """
    if (lora := LoraCheckpoint.open(source.megatron)) is not None:
        _load_with_adapters(model, lora, arch, parallel)
        return
    if source.megatron is None:
        load_hf_weights(model, arch, source.hf_files, parallel.grid)
        return
    whole = _wanted_weights(model)
    apply_factories(whole)
    keys = {part.key for part in nested_values(whole)}
    if not require_whole_weights(source.megatron, keys) and parallel.rank == 0:
        LOG.warning(no_manifest(source.megatron))
    _load_chunks(model, _load({"weights": _wanted_weights(model)}, source.megatron))


def _load_with_adapters(
    model: Sequence[MegatronModule], lora: LoraCheckpoint, arch: Architecture, parallel: ParallelContext
) -> None:
    """The base model's weights and, unmerged, the adapters: the same numbers as in the run."""
    if any(parameter.requires_grad for chunk in model for parameter in chunk.parameters()):
        raise ConfigError(lora.not_to_train)
    load_weights(model, lora.base_source(), arch, parallel)
    for adapter in attach(model, arch, lora.peft, parallel):
        adapter.requires_grad_(False)
    wanted = sharded_adapters(model, parallel.grid)
    require_whole_weights(lora.folder, {part.key for part in nested_values(wanted)})
    _load_chunks(model, _load({"weights": wanted}, lora.folder), adapters_only=True)


def load_training_state(
    info: CheckpointInfo,
    parallel: ParallelContext,
    *,
    model: Sequence[MegatronModule],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    lora: bool,
) -> None:
    """Restore weights, optimizer, schedule and random-number states from the checkpoint of `info`. lora: its weights are
    adapters; `model` has the base model's weights already.

    In the same layout the next losses have the same bits. In another layout, or from a GPU to a CPU, random-number states
    start again from the seed. Collectives: those of dist_checkpointing.load. Raises ConfigError if the optimizer state is
    of another kind.
    """
    _check_optimizer(info, optimizer)
    weights = sharded_adapters(model, parallel.grid) if lora else _wanted_weights(model)
    per_layer = not lora and _is_per_layer(info.path)
    whose = _wanted_weights(model, per_layer=True) if per_layer else weights
    wanted = {
        "weights": weights,
        "optimizer": sharded_state(optimizer, whose, is_loading=True),
        "scheduler": scheduler.state_dict(),
    }
    state = _load(wanted, info.path)
    _load_chunks(model, state, adapters_only=lora)
    load_sharded_state(optimizer, state["optimizer"])
    scheduler.num_steps = 0
    scheduler.step(increment=info.position.step)
    if info.layout == layout_name(parallel.grid, model[0].config.sequence_parallel):
        file = info.path / "rng" / f"rank_{parallel.rank}.pt"
        state = read_data(file, file)
        if state.get("device", parallel.device.type) == parallel.device.type:
            _restore_rng(state)


def _is_per_layer(checkpoint: Path) -> bool:
    """Whether the optimizer state has a key for each layer (`sharded_weights`). The same on every rank."""
    return any(_ONE_LAYERS_STATE.search(key) for key in read_metadata(checkpoint / "model").state_dict_metadata)


def _wanted_weights(model: Sequence[MegatronModule], *, per_layer: bool = False) -> dict[str, Any]:
    """`sharded_weights` without the empty `_extra_state` entries, which differ between implementations of layers."""
    whole = sharded_weights(model, per_layer=per_layer)
    return {
        chunk: {name: value for name, value in state.items() if EXTRA_STATE not in name}
        for chunk, state in whole.items()
    }


def _load_chunks(model: Sequence[MegatronModule], loaded: dict[str, Any], *, adapters_only: bool = False) -> None:
    weights = loaded.get("weights", {})  # megatron-core leaves out what is empty: the adapters of a chunk without any
    for number, chunk in enumerate(model):
        left = chunk.load_state_dict(weights.get(f"model{number}", {}), strict=False)
        missing = [] if adapters_only else [name for name in left.missing_keys if EXTRA_STATE not in name]
        assert not missing and not left.unexpected_keys, (missing, left.unexpected_keys)


def _load(wanted: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    folder = checkpoint / "model"
    try:
        with _nothing_executed(folder):
            strategy = torch_strategy.TorchDistLoadShardedStrategy()
            return dist_checkpointing.load(wanted, str(folder), strategy, strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    except CheckpointException as error:  # a BaseException around each rank's
        causes = [cause for cause, _ in error.failures.values()]
        refusals = [cause.problems for cause in causes if isinstance(cause, UserError)]
        raise ConfigError(refusals[0]) if refusals else _not_readable(checkpoint, causes[0]) from error
    except (
        dist_checkpointing.core.CheckpointingException,
        *(KeyError, ValueError, RuntimeError, OSError, TypeError, AttributeError),
    ) as error:
        raise _not_readable(checkpoint, error) from error


def _not_readable(checkpoint: Path, error: BaseException) -> ConfigError:
    expected = f"a Megatron checkpoint of this architecture and dtype ({error})"
    return ConfigError(Problem("policy.model_name", str(checkpoint), expected, "name the folder it was made from"))


@contextmanager
def _nothing_executed(folder: Path) -> Iterator[None]:
    """In this context megatron-core's load reads .metadata, objects among the tensors, and common.pt with our readers,
    which execute nothing. (torch's would unpickle them, and a pickle may run any code.) Raises ConfigError if .metadata
    can't be read."""
    reader = MetadataGiven(folder, read_metadata(folder))

    def common(*_: object) -> Any:
        return read_data(folder / COMMON_FILE, folder / COMMON_FILE)

    ours: list[tuple[Any, str, Any]] = [
        (torch_strategy, "_get_filesystem_reader", lambda *_, **__: reader),
        (torch_strategy, "MCoreLoadPlanner", partial(_DataOnlyPlanner, folder)),
    ]
    if hasattr(common_strategy, "TorchCommonLoadStrategy"):
        ours.append((common_strategy.TorchCommonLoadStrategy, "load_common", common))
    else:  # megatron-core 0.19
        ours.append((serialization, "load_common_state_dict", common))
    theirs = [(owner, name, getattr(owner, name)) for owner, name, _ in ours]
    try:
        for owner, name, value in ours:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in theirs:
            setattr(owner, name, value)


class _DataOnlyPlanner(torch_strategy.MCoreLoadPlanner):
    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self._folder = folder

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        data = io.BytesIO()
        torch.save(read_data(value, f"{self._folder}: {read_item.dest_index.fqn}"), data)
        data.seek(0)
        super().load_bytes(read_item, data)  # it unpickles what we have just written: only data


def _check_optimizer(info: CheckpointInfo, optimizer: MegatronOptimizer) -> None:
    where, here = "checkpointing.checkpoint_dir", optimizer_format(optimizer)
    if info.optimizer_format != here:
        fix = (
            "resume with the same optimizer, optimizer.adam_impl (AdamW: torch, FusedAdam: transformer_engine or triton) and "
            "use_distributed_optimizer, or start anew in another checkpoint_dir"
        )
        raise ConfigError([Problem(where, f"{info.path} of {info.optimizer_format}", f"state of {here}", fix)])


def _restore_rng(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["tracker"])
