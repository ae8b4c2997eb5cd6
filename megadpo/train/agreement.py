"""Opens the inputs on every rank, and compares them. Each rank reads the data and deals it out for itself: with other pairs
or settings on one node, training would hang or be wrong without an error."""

from __future__ import annotations

import dataclasses
import hashlib
import socket
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

from megadpo.config.load import as_dict, as_written
from megadpo.config.problems import Attempts, ConfigError, Problem
from megadpo.config.reader import leaves
from megadpo.config.schema import HOLDOUT, Config
from megadpo.config.tree import get
from megadpo.config.types import names_files
from megadpo.parallel import ParallelContext
from megadpo.train.inputs import REFERENCE, TRAIN, RunInputs, open_run_inputs

_MOST_NAMED = 3
_ONE_CONFIG = "start every node with the same config, overrides and environment"


class Fact(NamedTuple):
    """What must be the same on every rank."""

    compared: str
    shown: str
    fix: str


def open_together(cfg: Config, parallel: ParallelContext, *, sets: Collection[str] | None = None) -> RunInputs:
    """`open_run_inputs` for this rank. Files may lie in different places on different nodes.

    Raises ConfigError on every rank if any rank has a problem, or has other pairs, another architecture or other settings
    than rank 0. Collectives: a broadcast and an all-gather of pickled objects, on the host.
    """
    attempt = Attempts()
    inputs = attempt(lambda: open_run_inputs(cfg, parallel.grid, sets=sets))
    facts = None if inputs is None else facts_of(cfg, inputs)
    first: list[Any] = [(socket.gethostname(), facts)]
    dist.broadcast_object_list(first, src=0, group=parallel.host_group)
    problems = [*attempt.problems, *_differences(facts, *first[0])]
    found: list[Any] = [None] * parallel.world_size
    dist.all_gather_object(found, (socket.gethostname(), problems), group=parallel.host_group)
    if any(problems for _, problems in found):
        raise ConfigError(_of_all([host for host, _ in found], [problems for _, problems in found]))
    assert inputs is not None
    return inputs


def facts_of(cfg: Config, inputs: RunInputs) -> dict[str, Fact]:
    """Key of the config -> what this rank has. For files and models that is what is in them, and not where they are. The logger's
    settings are left out: only rank 0 logs."""
    values, written = as_dict(cfg), as_written(cfg)
    facts = {
        path: Fact(repr(get(values, path)), repr(get(written, path)), _ONE_CONFIG)
        for path, annotation in leaves(Config)
        if not names_files(annotation) and not path.startswith("logger.")
    }
    fix = "give every node the same files, or name some on a file system that all nodes see"
    for name, loader in inputs.loaders.items():
        data, batches = loader.dataset, loader.batches_per_epoch
        field = {TRAIN: "data.train_data_path", HOLDOUT: "data.holdout"}.get(name, f"data.val_data_paths.{name}")
        compared = f"{data.fingerprint} {batches} {cfg.data.train_shares if name == TRAIN else None}"
        shown = f"{data.report.path}: {len(data)} pairs, {batches} batches, sha256 {data.fingerprint[:12]}"
        facts[field] = Fact(compared, shown, fix)
    models = {"policy.model_name": (cfg.policy.model_name, inputs.arch)}
    if inputs.reference != inputs.source:
        models[REFERENCE] = (str(cfg.dpo.reference.model_name), inputs.reference_arch)
    for field, (model, arch) in models.items():
        digest = hashlib.sha256(arch.fingerprint.encode()).hexdigest()[:12]
        facts[field] = Fact(digest, f"{model}: {arch.hf_class}, sha256 of its shape {digest}", fix)
    return facts


def _differences(mine: Mapping[str, Fact] | None, host: str, firsts: Mapping[str, Fact] | None) -> list[Problem]:
    """A problem for each fact that isn't that of rank 0, on `host`. None: not known, since opening failed."""
    if mine is None or firsts is None:
        return []
    absent = Fact("", "nothing", _ONE_CONFIG)
    pairs = {field: (mine.get(field, absent), firsts.get(field, absent)) for field in {**firsts, **mine}}
    return [
        Problem(field, own.shown, f"the same on every rank; {host} (rank 0) has {other.shown}", own.fix)
        for field, (own, other) in pairs.items()
        if own.compared != other.compared
    ]


def _of_all(hosts: Sequence[str], problems: Sequence[Sequence[Problem]]) -> list[Problem]:
    """The problems of all ranks, each once. Those that not every rank has name the hosts."""
    ranks: dict[str, tuple[Problem, list[int]]] = {}
    for rank, some in enumerate(problems):
        for one in some:
            ranks.setdefault(str(one), (one, []))[1].append(rank)
    return [
        one if len(having) == len(hosts) else dataclasses.replace(one, where=f"{one.where} on {_places(hosts, having)}")
        for one, having in ranks.values()
    ]


def _places(hosts: Sequence[str], ranks: Sequence[int]) -> str:
    """Such as "node7 (rank 8)": each host with its first rank."""
    first_of: dict[str, int] = {}
    for rank in ranks:
        first_of.setdefault(hosts[rank], rank)
    named = [f"{host} (rank {rank})" for host, rank in first_of.items()]
    return ", ".join(named[:_MOST_NAMED]) + (f" and {len(named) - _MOST_NAMED} more" if named[_MOST_NAMED:] else "")
