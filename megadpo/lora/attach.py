"""Adapters on a model that is built: the base frozen, a LinearAdapter beside each targeted layer, run by a forward hook.

So megatron-core's layers, Transformer Engine's and their specs stay as they are, and a model without its adapters is the
very model that was loaded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megadpo.config.architecture import Architecture
from megadpo.config.schema_peft import PeftConfig
from megadpo.families import weight_table
from megadpo.lora.adapter import LinearAdapter, LinearCut
from megadpo.lora.targets import Target, find_targets
from megadpo.model.norm import rms_norm
from megadpo.model.transformer_config import DTYPES
from megadpo.model.weights.load import named_global_parameters
from megadpo.parallel import ParallelContext

TRAINED, REFERENCE = "lora", "reference_lora"
"""Names of the modules beside a layer: the adapter that is trained, and one that the reference has."""


def attach(
    chunks: Sequence[torch.nn.Module],
    arch: Architecture,
    peft: PeftConfig,
    parallel: ParallelContext,
    *,
    name: str = TRAINED,
) -> list[LinearAdapter]:
    """Freeze this rank's chunks and put adapters with memory but no numbers on the layers that `peft` names; to be called
    before anything allocates gradients. name: TRAINED or REFERENCE, which is frozen as well. Collectives: none."""
    targets = {entry_name: one for one in find_targets(peft, arch) for entry_name in one.entry.names}
    made = []
    for chunk in chunks:
        for local, layer, target in list(_layers(chunk, arch, targets, parallel)):
            weight = layer.get_parameter(local)
            dtype = weight.dtype if peft.lora_dtype is None else DTYPES[peft.lora_dtype]
            adapter = LinearAdapter(target, peft, _cut(target, parallel, chunk), dtype=dtype, device=weight.device)
            _join(layer, name, adapter, number=local.removeprefix("weight"))
            made.append(adapter)
        for parameter_name, parameter in chunk.named_parameters():
            if f".{TRAINED}." not in parameter_name:
                parameter.requires_grad_(False)
    return made


def adapters_of(model: torch.nn.Module, name: str = TRAINED) -> Iterator[tuple[str, LinearAdapter]]:
    """(name in the model, adapter) of every adapter of that name."""
    for where, module in model.named_modules():
        if isinstance(module, LinearAdapter) and f".{name}." in f".{where}.":
            yield where, module


def init_adapters(adapters: Sequence[LinearAdapter], peft: PeftConfig, seed: int) -> None:
    """The first A and B of each, the same in every layout: the whole matrix is drawn, and each rank keeps its part."""
    for adapter in adapters:
        for shared in adapter.target.adapters:
            whole = _drawn(adapter, shared[0], "A", peft.lora_A_init_method, seed)
            load_a(adapter, shared, whole)
            for module in shared:
                load_b(adapter, module, _drawn(adapter, module, "B", peft.lora_B_init_method, seed))


def load_a(adapter: LinearAdapter, shared: Sequence[int], whole: torch.Tensor) -> None:
    """This rank's part of an A [r, in]."""
    _load(adapter.get_parameter(adapter.a_name(shared)), whole, adapter.cut)


def load_b(adapter: LinearAdapter, module: int, whole: torch.Tensor) -> None:
    """This rank's part of the B [rows, r] of one Hugging Face module."""
    _load(adapter.get_parameter(adapter.b_name(module)), whole, adapter.cut)


@contextmanager
def switched(off: Sequence[LinearAdapter], on: Sequence[LinearAdapter] = ()) -> Iterator[None]:
    """Inside, the adapters `off` do nothing and `on` do; outside it is the other way round."""
    for adapter in (*off, *on):
        adapter.enabled = not adapter.enabled
    try:
        yield
    finally:
        for adapter in (*off, *on):
            adapter.enabled = not adapter.enabled


def _layers(
    chunk: torch.nn.Module, arch: Architecture, targets: dict[str, Target], parallel: ParallelContext
) -> Iterator[tuple[str, torch.nn.Module, Target]]:
    """(name of the weight in its module, the module, target) of each targeted layer of a chunk."""
    owners = {id(p): (name, module) for module in chunk.modules() for name, p in module.named_parameters(recurse=False)}
    first_expert = weight_table(arch).num_experts // parallel.grid.expert * parallel.grid.ep_rank
    for name, parameter in named_global_parameters(chunk, first_expert):
        if name in targets:
            yield *owners[id(parameter)], targets[name]


def _cut(target: Target, parallel: ParallelContext, chunk: Any) -> LinearCut:
    grid = parallel.grid
    if target.entry.expert is not None:
        return LinearCut(parallel.etp_group, grid.etp_rank, grid.expert_tensor, sequence_parallel=False)
    return LinearCut(parallel.tp_group, grid.tp_rank, grid.tensor, chunk.config.sequence_parallel)


def _join(layer: torch.nn.Module, name: str, adapter: LinearAdapter, number: str) -> None:
    """number: of the expert on this rank, in a layer that holds several (`weight0`, `weight1`, ...)."""
    if not number:
        layer.add_module(name, adapter)
        layer.register_forward_hook(_add_to_output(adapter))
        return
    if not hasattr(layer, name):
        layer.add_module(name, torch.nn.ModuleList())
        layer.register_forward_hook(_add_to_grouped_output(layer.get_submodule(name)))
    layer.get_submodule(name).append(adapter)  # type: ignore[operator]


def _add_to_output(adapter: LinearAdapter) -> Any:
    def hook(layer: torch.nn.Module, inputs: tuple[Any, ...], output: tuple[torch.Tensor, Any]) -> Any:
        if not adapter.enabled:
            return output
        x = inputs[0]
        norm = getattr(layer, "layer_norm_weight", None)
        if norm is not None:  # Transformer Engine's norm and linear layer in one don't say what lies between
            centre = 1.0 if layer.config.layernorm_zero_centered_gamma else 0.0  # type: ignore[union-attr]
            x = rms_norm(x, norm, layer.eps, centre=centre)  # type: ignore[arg-type]
        return output[0] + adapter(x), *output[1:]

    return hook


def _add_to_grouped_output(adapters: Any) -> Any:
    """Experts in one kernel: tokens [T, in], sorted by expert, and how many each has."""

    def hook(layer: torch.nn.Module, inputs: tuple[Any, ...], output: tuple[torch.Tensor, Any]) -> Any:
        if not adapters[0].enabled:
            return output
        x, counts = inputs
        parts = zip(adapters, x.split([int(count) for count in counts]), strict=True)
        return output[0] + torch.cat([adapter(part) for adapter, part in parts]), *output[1:]

    return hook


def _load(parameter: torch.Tensor, whole: torch.Tensor, cut: LinearCut) -> None:
    dim: int | None = parameter.cut_dim  # type: ignore[attr-defined]
    part = whole if dim is None else whole.chunk(cut.size, dim)[cut.rank]
    with torch.no_grad():
        parameter.copy_(part)


def _drawn(adapter: LinearAdapter, module: int, half: str, method: str, seed: int) -> torch.Tensor:
    """float32 on the CPU, by the run's seed and the Hugging Face name."""
    target, rank = adapter.target, adapter.peft.dim
    rows, columns = (rank, target.in_features) if half == "A" else (target.out_features(module), rank)
    name = f"{seed} {target.modules[module].rpartition('.')[0]}.{target.label(module)}.lora_{half}"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1)
    whole = torch.zeros(rows, columns)
    if method == "xavier":
        whole.normal_(0.0, math.sqrt(2.0 / (rows + columns)), generator=generator)
    elif method == "kaiming":  # a = sqrt(5): PEFT's, and torch's own of a linear layer
        whole.uniform_(-1 / math.sqrt(columns), 1 / math.sqrt(columns), generator=generator)
    elif method == "normal":
        whole.normal_(0.0, 0.2, generator=generator)
    return whole
