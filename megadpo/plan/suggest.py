"""The best layouts for a world: every one that divides it is estimated by arithmetic, the fastest that fit are built."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from megadpo.config.check import data_parallel_size
from megadpo.config.load import load_config
from megadpo.config.problems import ConfigError
from megadpo.config.schema import Config
from megadpo.plan.activations import FullPack, estimate
from megadpo.plan.packs import Workload, full_pack, workload
from megadpo.plan.parameters import Buffer, buffer_of, stage_parameters, static_bytes
from megadpo.plan.plan import (
    Job,
    Plan,
    check_job,
    make_plan,
    memory_limit,
    optimizer_temporaries,
    stage_layers,
    step_time,
    too_large,
)

_MEG = "policy.megatron_cfg"
_ESTIMATE_MARGIN = 1.05  # an estimate this much over the limit is still built: building decides
_MOST_BUILT_PER_SUGGESTION = 4


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits, as overrides of the config, and its plan."""

    overrides: tuple[str, ...]
    plan: Plan


def suggest(job: Job, path: str, overrides: Sequence[str], count: int) -> list[Suggestion]:
    """At most `count` layouts, fastest first by the stated model, each built and found to fit. A tensor x pipeline
    shape appears once, with the recomputation that is fastest for it. Everything but the layout stays the config's."""
    assert job.gpu is not None, "without a GPU nothing is ranked"
    limit = memory_limit(job.gpu, job.assumed)
    ranked = sorted(_estimates(job, limit * _ESTIMATE_MARGIN), key=lambda one: one[0])
    found: list[Suggestion] = []
    taken: set[tuple[int, int]] = set()
    built = 0
    for _, shape, changes in ranked:
        if len(found) == count or built == count * _MOST_BUILT_PER_SUGGESTION:
            break
        if shape in taken:
            continue
        try:
            cfg = load_config(path, [*overrides, *changes])
            plan = make_plan(dataclasses.replace(job, cfg=cfg))
        except ConfigError:  # the config's other keys forbid this layout
            continue
        built += 1
        if not too_large(plan):
            taken.add(shape)
            found.append(Suggestion(tuple(changes), plan))
    return sorted(found, key=lambda one: one.plan.time.total_s if one.plan.time else 0.0)


def _estimates(job: Job, limit: float) -> Iterator[tuple[float, tuple[int, int], list[str]]]:
    """(seconds a step, (tensor, pipeline), overrides) of each candidate that may fit."""

    @cache
    def dealt(dp: int, multiple: int) -> Workload | None:
        try:
            return workload(_with_multiple(job.cfg, multiple), job.lengths, job.said, dp=dp)
        except ConfigError:  # padding leaves too little room for the longest pair
            return None

    for cfg, changes in _candidates(job):
        one = dataclasses.replace(job, cfg=cfg)
        dp = data_parallel_size(cfg, job.world_size)
        if check_job(one):
            continue
        work = dealt(dp, cfg.policy.make_sequence_length_divisible_by)
        if work is None:
            continue
        peak, buffers = _peak(one, work, dp)
        time = step_time(one, work, buffers)
        if peak <= limit and time is not None:
            megatron = cfg.policy.megatron_cfg
            shape = (megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size)
            yield time.total_s, shape, changes


def _candidates(job: Job) -> Iterator[tuple[Config, list[str]]]:
    """Tensor parallel inside a node, with sequence parallel; pipeline stages of equal depth; three recomputations."""
    for tp in range(1, int(job.assumed.gpus_per_node) + 1):
        for pp in range(1, job.arch.num_layers + 1):
            if job.world_size % (tp * pp) or job.arch.num_layers % pp:
                continue
            for recompute in ("none", "selective", "full"):
                changes: dict[str, object] = {
                    "tensor_model_parallel_size": tp,
                    "pipeline_model_parallel_size": pp,
                    "sequence_parallel": tp > 1,
                    "num_layers_in_first_pipeline_stage": None,
                    "num_layers_in_last_pipeline_stage": None,
                    "activation_checkpointing": recompute != "none",
                    "recompute_granularity": "full" if recompute == "none" else recompute,
                }
                megatron = dataclasses.replace(job.cfg.policy.megatron_cfg, **changes)  # type: ignore[arg-type]
                cfg = _with_multiple(job.cfg, tp if tp > 1 else 1)
                cfg = dataclasses.replace(cfg, policy=dataclasses.replace(cfg.policy, megatron_cfg=megatron))
                yield cfg, [f"{_MEG}.{name}={_yaml(value)}" for name, value in changes.items()]


def _with_multiple(cfg: Config, multiple: int) -> Config:
    return dataclasses.replace(cfg, policy=dataclasses.replace(cfg.policy, make_sequence_length_divisible_by=multiple))


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower()


def _peak(job: Job, work: Workload, dp: int) -> tuple[int, list[Buffer]]:
    """Estimated bytes of the fullest rank, and each stage's buffer."""
    megatron = job.cfg.policy.megatron_cfg
    tp, pp = megatron.tensor_model_parallel_size, megatron.pipeline_model_parallel_size
    pack = FullPack.of(job.cfg, full_pack(job.cfg, job.lengths))
    highest, buffers = 0, []
    for stage, layers in enumerate(stage_layers(job)):
        first, last = stage == 0, stage == pp - 1
        parameters = stage_parameters(job.arch, tp=tp, layers=layers, first=first, last=last)
        reference = []
        if job.reference is not None:
            frozen_layers = job.reference.num_layers // pp
            reference = stage_parameters(job.reference, tp=tp, layers=frozen_layers, first=first, last=last)
        buffer = buffer_of(parameters, megatron, dp=dp, first_stage=first)
        buffers.append(buffer)
        static = static_bytes(parameters, reference, buffer, megatron, job.bf16)
        used = estimate(job.cfg, job.arch, pack, layers=layers, last=last)
        in_flight = min(pp - stage, work.micro_batches)
        training = (in_flight - 1) * used.saved + used.peak
        largest = max(one.elements for one in parameters)
        high = max(training, optimizer_temporaries(job, buffer, largest))
        highest = max(highest, static.total + used.buffers + high)
    return highest, buffers
