"""Verifies a checkpoint against its manifest. Each rank reads a part of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from megadpo.config.problems import ConfigError, Problem
from megadpo.model.manifest import damages, read_manifest
from megadpo.model.weights.dist_folder import blocks_with


def damages_together(checkpoint: Path) -> tuple[list[Problem], bool]:
    """Verify every byte of a checkpoint. Returns a problem for each damaged file, the same on every rank, and whether there
    is a manifest. Collectives: an all-gather of pickled objects."""
    return _together(checkpoint, None)


def require_whole_weights(checkpoint: Path, keys: Iterable[str]) -> bool:
    """Verify the blocks that hold the tensors `keys` of all ranks, every file without tensors, and the sizes of all files.
    Returns whether there is a manifest. Raises ConfigError on every rank, naming each damaged file. Collectives: two
    all-gathers of pickled objects."""
    wanted: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(wanted, sorted(keys))
    problems, has_manifest = _together(checkpoint, {key for rank in wanted for key in rank})
    if problems:
        raise ConfigError(problems)
    return has_manifest


def _together(checkpoint: Path, keys: set[str] | None) -> tuple[list[Problem], bool]:
    found: list[tuple[list[Problem], bool]] = [([], False)] * dist.get_world_size()
    dist.all_gather_object(found, _of_this_rank(checkpoint, keys))
    problems = {problem.where: problem for some, _ in found for problem in some}
    return list(problems.values()), all(has_manifest for _, has_manifest in found)


def _of_this_rank(checkpoint: Path, keys: set[str] | None) -> tuple[list[Problem], bool]:
    try:
        manifest = read_manifest(checkpoint)
        if manifest is None:
            return [], False
        chosen = None if keys is None else blocks_with(keys, checkpoint, manifest)
        return damages(checkpoint, manifest, chosen, part=(dist.get_rank(), dist.get_world_size())), True
    except ConfigError as error:
        return error.problems, True
