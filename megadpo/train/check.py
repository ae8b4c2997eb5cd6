"""Checks a config with its model folder, layout and data before anything is built: at every start, and for `--check`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megadpo.config.architecture import Architecture
from megadpo.config.check import check_layout
from megadpo.config.load import Purpose, load_config
from megadpo.config.no_effect import dropout_notes, warmup_notes, without_experts
from megadpo.config.problems import Attempts, ConfigError
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
    Raises ConfigError with every problem."""
    cfg = load_config(path, overrides, purpose=purpose)  # first: it needs no torch, and most refusals come from it
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
    if purpose == "train" and cfg.checkpointing.enabled:
        problems += linked_out(source.hf_files)
    if problems:
        raise ConfigError(problems)
    return dataclasses.replace(cfg, notes=(*cfg.notes, *dropout_notes(arch), *_slow_notes(cfg, arch)))


def _slow_notes(cfg: Config, arch: Architecture) -> list[str]:
    """One note of what this model does more slowly on a GPU than it could."""
    if arch.delta_net is None or cfg.policy.device == "cpu":
        return []
    return [
        f"{arch.hf_class}: linear attention runs in torch's own operations, on a GPU too, where kernels made for it "
        "would be faster; megadpo has none (docs/families.md)"
    ]


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
        notes.append("the hub's weights are not downloaded here; a run compares them with config.json when it loads them")
    for line in [*notes, *inputs.reports]:
        print(line)
    print(f"{total_steps} steps; no problem found")
    return 0
