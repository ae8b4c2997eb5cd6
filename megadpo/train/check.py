"""Checks a config with its model folder, layout and data before anything is built: at every start, and for `--check`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from collections.abc import Sequence

from megadpo.config.architecture import Architecture
from megadpo.config.check import check_layout
from megadpo.config.load import Purpose, load_config
from megadpo.config.no_effect import dropout_notes, warmup_notes, without_experts
from megadpo.config.problems import Attempts, ConfigError, Problem
from megadpo.config.schema import Config
from megadpo.families import read_architecture


def checked_config(
    path: str,
    overrides: Sequence[str],
    world_size: int | None,
    purpose: Purpose = "train",
    *,
    weights: bool = True,
) -> Config:
    """The config, checked with the model's config.json and the number of ranks. weights: also download a hub model's weights.
    Raises ConfigError with every problem. For training under tensor parallelism it sets CUDA_DEVICE_MAX_CONNECTIONS."""
    cfg = load_config(path, overrides, purpose=purpose)  # first: it needs no torch, and most refusals come from it
    if purpose == "train" and cfg.policy.megatron_cfg.tensor_model_parallel_size > 1:
        _start_kernels_in_order()
    from megadpo.lora.checkpoint import LoraCheckpoint
    from megadpo.lora.peft_folder import folder_problems
    from megadpo.lora.targets import lora_problems
    from megadpo.model.freeze import freeze_problems
    from megadpo.model.source import reference_source, resolve_source
    from megadpo.model.weights import linked_out

    source = resolve_source(cfg.policy.model_name, "policy.model_name", weights=weights)
    arch = read_architecture(source.hf_files)
    reference, other = reference_source(cfg, source, weights=weights), arch
    if reference != source:
        other = read_architecture(reference.hf_files, "dpo.reference.model_name")
    cfg = without_experts(cfg, arch, other)
    problems = check_layout(cfg, arch, world_size) + freeze_problems(cfg.policy.freeze, arch)
    problems += lora_problems(cfg, arch) + folder_problems(cfg, arch)
    if purpose == "train" and (adapters := LoraCheckpoint.open(source.megatron)) is not None:
        problems.append(adapters.not_to_train)
    if reference != source:
        # the reference runs in the policy's layout, so its shape must allow this layout too
        for one in check_layout(cfg, other, None):
            problems.append(dataclasses.replace(one, expected=f"{one.expected} (for dpo.reference.model_name)"))
    if purpose == "evaluate":
        problems += _adapter_of_no_reference(cfg)
    if purpose == "train" and cfg.checkpointing.enabled:
        problems += linked_out(source.hf_files)
    if problems:
        raise ConfigError(problems)
    notes = [*cfg.notes, *dropout_notes(arch), *_slow_notes(cfg, arch)]
    if purpose == "train" and cfg.checkpointing.enabled and not cfg.checkpointing.save_optimizer:
        notes.append("checkpointing.save_optimizer: false: if this run is stopped, it can't be resumed")
    return dataclasses.replace(cfg, notes=tuple(notes))


def _adapter_of_no_reference(cfg: Config) -> list[Problem]:
    """A problem if an evaluation would have no reference that dpo.reference.adapter could be added to."""
    reference = cfg.dpo.reference
    if reference.adapter is None or reference.model_name is not None or reference.mode == "adapter_off":
        return []
    expected = "null without dpo.reference.model_name: an evaluation then has no reference to add it to"
    fix = "set dpo.reference.model_name to the model that training started from, or remove the adapter"
    return [Problem("dpo.reference.adapter", reference.adapter, expected, fix)]


def _start_kernels_in_order() -> None:
    """With one queue, kernels start in the order of their calls. The backward pass needs that order to run a collective at the
    same time as a matrix product (megatron-core: tensor_parallel/layers.py:525-560; Transformer Engine: module/base.py:1080);
    without it both libraries warn that the two may run one after the other.

    CUDA reads the variable when it starts, and the import of megatron-core starts it, by counting the GPUs
    (dist_checkpointing/strategies/torch.py:64)."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _slow_notes(cfg: Config, arch: Architecture) -> list[str]:
    """One note of what this model does more slowly on a GPU than it could."""
    if arch.delta_net is None or cfg.policy.device == "cpu":
        return []
    return [
        f"{arch.hf_class}: linear attention runs in torch's own operations, on a GPU too, where kernels made for it "
        "would be faster; megadpo has none (docs/families.md)"
    ]


def asked_world_size(options: argparse.Namespace) -> int | None:
    """The ranks that a command line with --world-size and torchrun's options (`add_rank_options`) asks for: --world-size, or
    --nnodes x --nproc-per-node; None if it says neither. Raises ConfigError if they differ, or have no number (auto, 1:4)."""
    stated: int | None = options.world_size
    if options.nnodes is None and options.nproc_per_node is None:
        return stated
    given = {"--nnodes": options.nnodes or "1", "--nproc-per-node": options.nproc_per_node or "1"}
    unclear = {name: text for name, text in given.items() if not text.isdecimal() or int(text) == 0}
    if unclear and stated is not None:
        return stated
    if unclear:
        fix = "give the number, or --world-size"
        raise ConfigError(Problem(name, text, "a number, to check for", fix) for name, text in unclear.items())
    counted = math.prod(map(int, given.values()))
    if stated not in (None, counted):
        expected = f"{counted}, which is " + " x ".join(f"{name} {text}" for name, text in given.items())
        raise ConfigError(Problem("--world-size", stated, expected, "leave it out"))
    return counted


def check(path: str, overrides: Sequence[str], world_size: int | None) -> int:
    """`megadpo check`: checks everything that does not need the weights, and downloads none. Prints a summary of the data files
    and the number of steps. Returns the exit code.

    Raises UserError. If the config itself has problems, only these are reported, because it names all other files. Else the
    problems of model folder, layout, weight files and data are reported together.
    """
    cfg = load_config(path, overrides)
    from megadpo.train.inputs import open_run_inputs

    attempt = Attempts()
    cfg = attempt(lambda: checked_config(path, overrides, world_size, weights=False)) or cfg
    inputs = attempt(lambda: open_run_inputs(cfg, weights=False, thorough=True))
    attempt.refuse()
    assert inputs is not None
    total_steps = cfg.dpo.total_steps(inputs.train_loader.batches_per_epoch)
    notes = [*cfg.notes, *warmup_notes(cfg, total_steps)]
    if inputs.source.from_hub or inputs.reference.from_hub:
        notes.append(
            "the hub's weights are not downloaded here; a run compares them with config.json when it loads them"
        )
    for line in [*notes, *inputs.reports]:
        print(line)
    print(f"{total_steps} steps; no problem found")
    return 0
