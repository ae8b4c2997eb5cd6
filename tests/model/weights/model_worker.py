"""Runs in a process of its own: megatron-core models of every layout, loaded from Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megadpo.checkpoint import load_weights
from megadpo.config.grid import Grid
from megadpo.config.schema_megatron import MegatronConfig
from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
from megadpo.families import read_architecture
from megadpo.model.build import build_model
from megadpo.model.source import resolve_source
from megadpo.model.weights import load_hf_weights
from megadpo.optimizer.state import METADATA
from megadpo.parallel import ParallelContext, destroy, initialize, setup_device

State = dict[str, torch.Tensor]


def build(folder: str, parallel: ParallelContext, precision: str = "float32") -> torch.nn.Module:
    """A model whose every parameter is NaN, so that what a loader forgets is seen."""
    policy = PolicyConfig(
        model_name=folder,
        tokenizer=TokenizerConfig(name=folder),
        precision=precision,
        attention_kernel="sdpa",
        megatron_cfg=MegatronConfig(
            tensor_model_parallel_size=parallel.grid.tensor, pipeline_model_parallel_size=parallel.grid.pipeline
        ),
    )
    [model] = build_model(read_architecture(folder), policy, parallel, frozen=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return model


def global_state(model: torch.nn.Module) -> State:
    """Parameters with layers numbered over the whole model."""
    state = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[:2] == ["decoder", "layers"]:
            parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
        state[".".join(parts)] = parameter.detach().clone()
    return state


def load_in_every_layout(folders: dict[str, str], layouts: list[tuple[int, int]]) -> dict[Any, list[list[State]]]:
    """(case, tp, pp) -> [pp rank][tp rank] -> parameters. One process plays each rank in turn."""
    results: dict[Any, list[list[State]]] = {}
    for tp, pp in layouts:
        for rank in range(tp * pp):
            torch.distributed.init_process_group("fake", rank=rank, world_size=tp * pp, store=FakeStore())
            parallel = initialize(Grid(tensor=tp, pipeline=pp), setup_device("auto"))
            for case, folder in folders.items():
                model = build(folder, parallel)
                load_hf_weights([model], read_architecture(folder), folder, parallel.grid)
                stages = results.setdefault((case, tp, pp), [[] for _ in range(pp)])
                stages[parallel.grid.pp_rank].append(global_state(model))
            destroy()
    return results


def in_a_world_of_two(saves: list[tuple[str, str, int, int]], load: str) -> State:
    """Each of `saves` is (Hugging Face folder, checkpoint folder, tp, pp); then this rank's parameters from `load`."""
    for save in saves:
        save_as_training_does(*save)
        parallel_state.destroy_model_parallel()  # the layout only: gloo can't join the same world twice
    loaded = load_with_megatron(load, 2, 1)
    destroy()
    return loaded


def save_as_training_does(hf: str, folder: str, tp: int, pp: int) -> None:
    """A checkpoint of the model in this layout, by megatron-core's own save, with tensors of an optimizer beside it."""
    parallel = initialize(Grid(tensor=tp, pipeline=pp), setup_device("auto"))
    model = build(hf, parallel)
    load_hf_weights([model], read_architecture(hf), hf, parallel.grid)
    state = {
        "weights": model.sharded_state_dict(metadata=METADATA),
        "moment": ShardedTensor.from_rank_offsets(
            "optimizer.state.exp_avg.output_layer.weight", torch.ones(4), replica_id=parallel.rank
        ),
    }
    if parallel.rank == 0:
        (Path(folder) / "model").mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(Path(folder) / "model"))


def load_with_megatron(folder: str, tp: int, pp: int) -> State:
    """This rank's parameters from a Megatron checkpoint folder, by the trainer's own loader."""
    parallel = initialize(Grid(tensor=tp, pipeline=pp), setup_device("auto"))
    model = build(str(Path(folder) / "hf"), parallel)
    load_weights([model], resolve_source(folder, "folder"), read_architecture(Path(folder) / "hf"), parallel)
    return global_state(model)
