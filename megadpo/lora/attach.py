"""Attaches adapters to a built model: freezes the base, and adds a LinearAdapter to each targeted layer with a forward hook.

So the layers of megatron-core and Transformer Engine, and their specs, are unchanged, and a model without its adapters is
exactly the loaded model.
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
"""Names of the added modules: the trained adapter, and the reference's."""


def attach(
    chunks: Sequence[torch.nn.Module],
    arch: Architecture,
    peft: PeftConfig,
    parallel: ParallelContext,
    *,
    name: str = TRAINED,
) -> list[LinearAdapter]:
    """Freeze this rank's chunks, and attach adapters without values to the layers that `peft` names. Call it before gradients
    are allocated. name: TRAINED, or REFERENCE for frozen adapters. Collectives: none."""
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


def adapters_of(model: torch.nn.Module) -> Iterator[tuple[str, LinearAdapter]]:
    """(name in the model, adapter) of every trained adapter."""
    for where, module in model.named_modules():
        if isinstance(module, LinearAdapter) and f".{TRAINED}." in f".{where}.":
            yield where, module


def init_adapters(adapters: Sequence[LinearAdapter], peft: PeftConfig, seed: int) -> None:
    """Set the initial values, which are the same in every layout: each rank draws the whole matrix and keeps its part."""
    for adapter in adapters:
        for shared in adapter.target.adapters:
            whole = _drawn(adapter, shared[0], "A", peft.lora_A_init_method, seed)
            load_a(adapter, shared, whole)
            for module in shared:
                load_b(adapter, module, _drawn(adapter, module, "B", peft.lora_B_init_method, seed))


def load_a(adapter: LinearAdapter, shared: Sequence[int], whole: torch.Tensor) -> None:
    """Load this rank's part of an A [r, in]."""
    _load(adapter.get_parameter(adapter.a_name(shared)), whole, adapter.cut)


def load_b(adapter: LinearAdapter, module: int, whole: torch.Tensor) -> None:
    """Load this rank's part of the B [rows, r] of one Hugging Face module."""
    _load(adapter.get_parameter(adapter.b_name(module)), whole, adapter.cut)


@contextmanager
def switched(off: Sequence[LinearAdapter], on: Sequence[LinearAdapter] = ()) -> Iterator[None]:
    """In this context the adapters `off` are switched off, and `on` are switched on. Outside it is the other way round."""
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
    """number: of the expert on this rank, in a layer for several experts (`weight0`, `weight1`, ...); else empty."""
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
        if norm is not None:  # Transformer Engine's joined norm and linear layer doesn't return the norm's output
            centre = 1.0 if layer.config.layernorm_zero_centered_gamma else 0.0  # type: ignore[union-attr]
            x = rms_norm(x, norm, layer.eps, centre=centre)  # type: ignore[arg-type]
        return output[0] + adapter(x), *output[1:]

    return hook


def _add_to_grouped_output(adapters: Any) -> Any:
    """The hook of experts in one kernel. Its inputs: tokens [T, in] sorted by expert, and the number of each expert's."""

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
    """The initial matrix, float32 on the CPU. The generator's seed depends on the run's seed and the Hugging Face name."""
    target, rank = adapter.target, adapter.peft.dim
    rows, columns = (rank, target.in_features) if half == "A" else (target.out_features(module), rank)
    name = f"{seed} {target.modules[module].rpartition('.')[0]}.{target.label(module)}.lora_{half}"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1)
    whole = torch.zeros(rows, columns)
    if method == "xavier":
        whole.normal_(0.0, math.sqrt(2.0 / (rows + columns)), generator=generator)
    elif method == "kaiming":  # with a = sqrt(5), as in PEFT and in torch's linear layer
        whole.uniform_(-1 / math.sqrt(columns), 1 / math.sqrt(columns), generator=generator)
    elif method == "normal":
        whole.normal_(0.0, 0.2, generator=generator)
    return whole
