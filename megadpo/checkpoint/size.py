"""Computes the size of a checkpoint from the config, for the planner and for the start of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase

from megadpo.config.architecture import Architecture
from megadpo.config.schema import Config
from megadpo.families import weight_table
from megadpo.lora.targets import find_targets
from megadpo.model.freeze import expand
from megadpo.optimizer.size import optimizer_bytes_per_element


@dataclass(frozen=True)
class CheckpointBytes:
    """Bytes of the tensors of one checkpoint."""

    weights: int
    """This is also the size of an export (with LoRA: of the adapter)."""
    with_optimizer: int


def checkpoint_bytes(arch: Architecture, cfg: Config) -> CheckpointBytes:
    """Bytes of the weights in the training dtype, and of the optimizer state of all weights that are not frozen; with LoRA only
    those of the adapters. Call it after `freeze_problems`. Padding is not written. The distributed optimizer writes float32
    weights a second time, as its main parameters."""
    peft = cfg.policy.megatron_cfg.peft
    plain = [one for pattern in cfg.policy.freeze for one in expand(pattern)]
    bf16, weights, trained = cfg.policy.precision == "bfloat16", 0, 0
    if peft.enabled:
        bf16 = (peft.lora_dtype or cfg.policy.precision) == "bfloat16"
        trained = sum(target.elements(peft.dim, 1) for target in find_targets(peft, arch))
        weights = trained * (2 if bf16 else 4)
    else:
        for entry in weight_table(arch).entries:
            for name, shape in zip(entry.hf, entry.shapes, strict=True):
                weights += math.prod(shape) * (2 if bf16 and not entry.row.frozen else 4)
                frozen = entry.row.frozen or any(fnmatchcase(name, one) for one in plain)
                trained += 0 if frozen else math.prod(shape)
    each = optimizer_bytes_per_element(cfg.policy.megatron_cfg, bf16)
    if not bf16 and cfg.policy.megatron_cfg.optimizer.use_distributed_optimizer:
        each += 4
    return CheckpointBytes(weights, weights + trained * each)
