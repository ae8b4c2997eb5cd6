"""A config held against model folder, layout and data before anything is built: at every start, and by `--check`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megadpo.config.check import check_layout
from megadpo.config.load import Purpose, load_config
from megadpo.config.no_effect import unused_by_model
from megadpo.config.problems import Attempts, ConfigError
from megadpo.config.schema import Config
from megadpo.families import read_architecture


def checked_config(path: str, overrides: Sequence[str], world_size: int | None, purpose: Purpose = "train") -> Config:
    """The config, held against the model's config.json and the world. Raises ConfigError with every problem."""
    from megadpo.model.freeze import freeze_problems
    from megadpo.model.source import reference_source, resolve_source
    from megadpo.model.weights import linked_out

    cfg = load_config(path, overrides, purpose=purpose)
    source = resolve_source(cfg.policy.model_name, "policy.model_name")
    arch = read_architecture(source.hf_files)
    problems = check_layout(cfg, arch, world_size) + freeze_problems(cfg.policy.freeze, arch)
    if (reference := reference_source(cfg, source)) != source:
        # the reference runs in the policy's layout, so its own shape must allow that too
        for one in check_layout(cfg, read_architecture(reference.hf_files, "dpo.reference.model_name"), None):
            problems.append(dataclasses.replace(one, expected=f"{one.expected} (dpo.reference.model_name's)"))
    if purpose == "train" and cfg.checkpointing.enabled:
        problems += linked_out(source.hf_files)
    if problems:
        raise ConfigError(problems)
    return dataclasses.replace(cfg, notes=(*cfg.notes, *unused_by_model(cfg, arch)))


def check(path: str, overrides: Sequence[str], world_size: int | None) -> int:
    """`launch/train.py --check`: everything that can be said about a run without its weights; prints what the data files
    hold and the number of steps. Returns the exit code.

    Raises UserError: the config's problems first, since it says where the rest is, then those of model folder, layout,
    weight files and data together.
    """
    from megadpo.train.inputs import open_run_inputs

    cfg = load_config(path, overrides)
    attempt = Attempts()
    cfg = attempt(lambda: checked_config(path, overrides, world_size)) or cfg
    inputs = attempt(lambda: open_run_inputs(cfg, thorough=True))
    attempt.refuse()
    assert inputs is not None
    for line in [*cfg.notes, *inputs.reports]:
        print(line)
    print(f"{cfg.dpo.total_steps(inputs.train_loader.batches_per_epoch)} steps; no problem found")
    return 0
