"""What the plan foretells, measured: a real rank in a real gloo world, its storages counted and a real step watched.

A module of its own, since every rank imports it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from megadpo.config.grid import Grid
from megadpo.config.load import load_config
from megadpo.config.schema import Config
from megadpo.data.batches.cut import context_part
from megadpo.data.batches.loader import GlobalBatch
from megadpo.optimizer.step import gradient_norm, update
from megadpo.parallel import initialize, setup_device
from megadpo.plan.packs import Lengths
from megadpo.plan.trace import LiveBytes, empty_pack
from megadpo.train.setup import seed_everything
from megadpo.train.step import Trainer


def storages(tensors: Any) -> int:
    """Bytes of the tensors' storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def build(path: str, overrides: list[str]) -> tuple[Config, Any, Trainer]:
    """The trainer of this rank as train/setup.py builds it, with weights that nothing was loaded into."""
    from megadpo.families import read_architecture
    from megadpo.lora.attach import attach
    from megadpo.model.build import build_model
    from megadpo.model.freeze import freeze
    from megadpo.optimizer.build import build_optimizer, build_scheduler, wrap_for_training
    from megadpo.reference import ResidentReference, SwitchedReference

    cfg = load_config(path, overrides)
    parallel = initialize(Grid.of(cfg), setup_device("cpu"))
    seed_everything(0, parallel)
    arch = read_architecture(cfg.policy.model_name)
    policy = build_model(arch, cfg.policy, parallel, frozen=False)
    freeze(policy, cfg.policy.freeze, arch)
    peft = cfg.policy.megatron_cfg.peft
    adapters = attach(policy, arch, peft, parallel) if peft.enabled else []
    fill(policy)
    wrapped = wrap_for_training(policy, cfg.policy)
    optimizer = build_optimizer(wrapped, cfg.policy, parallel.device)
    if peft.enabled:
        reference: ResidentReference = SwitchedReference(policy, parallel, adapters)
    else:
        reference = ResidentReference(build_model(arch, cfg.policy, parallel, frozen=True), parallel)
        fill(reference.model)
    trainer = Trainer(
        cfg.dpo,
        parallel,
        policy=wrapped,
        reference=reference,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, cfg.policy, 100),
    )
    return cfg, parallel, trainer


def fill(chunks: list[Any]) -> None:
    """Small random numbers: routers must not send every token to the same experts."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.normal_(0.0, 0.02)


def parameters(chunks: Any) -> list[torch.nn.Parameter]:
    return [parameter for chunk in chunks for parameter in chunk.parameters()]


def static(path: str, overrides: list[str]) -> dict[str, Any]:
    """Parameters and bytes of this rank after a step on zero gradients, which makes Adam's state."""
    _, parallel, trainer = build(path, overrides)
    update(trainer.optimizer, gradient_norm(trainer.optimizer))
    weights = parameters(trainer.model)
    reference = trainer.reference
    assert reference is not None
    owned = {t.untyped_storage().data_ptr() for t in weights}
    return {
        "stage": parallel.grid.pp_rank,
        "rank": parallel.rank,
        "parameters": sum(p.numel() for p in weights),
        "weights": storages(weights),
        "gradients": storages(p.main_grad for p in weights if p.requires_grad),
        "optimizer": storages(t for t in optimizer_tensors(trainer) if t.untyped_storage().data_ptr() not in owned),
        "reference": storages(p for p in parameters(reference.model) if p.untyped_storage().data_ptr() not in owned),
    }


def optimizer_tensors(trainer: Trainer) -> Iterator[torch.Tensor]:
    """Main parameters and moments. In float32 the main parameters ARE the weights, or views of them."""
    parts = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    for part in parts:
        if part.is_stub_optimizer:
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter
                yield from (t for name, t in part.optimizer.state[parameter].items() if name != "step")


def peak(path: str, overrides: list[str], lengths: Lengths, micro_batches: int) -> dict[str, Any]:
    """The most bytes alive in a real training step, weights and all, on micro-batches of pairs of `lengths`.

    The first step makes Adam's state and megatron-core's buffers; the second is watched.
    """
    cfg, parallel, trainer = build(path, overrides)
    whole = empty_pack(cfg, lengths)
    packs = [context_part(whole, parallel.grid.cp_rank, parallel.grid.context)] * micro_batches
    packs = [dataclasses.replace(pack, tokens=pack.tokens + 5) for pack in packs]
    pairs = len(lengths) * micro_batches * parallel.grid.data
    batch = GlobalBatch(micro_batches=packs, num_pairs=pairs, num_tokens=0, pair_indices=list(range(pairs)))
    trainer.step(batch)
    assert trainer.reference is not None
    weights = parameters(trainer.model)
    held = [*weights, *parameters(trainer.reference.model)]
    held += [p.main_grad for p in weights if p.requires_grad] + list(optimizer_tensors(trainer))
    watch = LiveBytes(held)
    with watch:
        trainer.step(batch)
    return {"stage": parallel.grid.pp_rank, "static": storages(held), "peak": storages(held) + watch.peak}
