"""The best layouts for a world: every one that divides it is estimated by arithmetic, the fastest that fit are built."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megadpo.config.architecture import Architecture
from megadpo.config.check import micro_batch_multiple
from megadpo.config.load import load_config
from megadpo.config.problems import ConfigError
from megadpo.config.schema import Config
from megadpo.plan.activations import Estimate, FullPack
from megadpo.plan.grid import Grid
from megadpo.plan.packs import Workload, full_pack, workload
from megadpo.plan.parameters import Buffer, Parameter, StageBuffers, layer_parameters, static_bytes
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
from megadpo.plan.schedule import alive

_MEG = "policy.megatron_cfg"
_ESTIMATE_MARGIN = 1.05  # an estimate this much over the limit is still built: building decides
_MOST_BUILT_PER_SUGGESTION = 4
_CHUNKS = (1, 2, 3, 4, 5, 6, 8)
_CONTEXTS = (1, 2, 4, 8)
_LONG = 8192  # tokens of a pair from which on sharing out its tokens is looked at


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits, as overrides of the config, and its plan."""

    overrides: tuple[str, ...]
    plan: Plan


Shape = tuple[int, int, int, int]
"""Tensor, context, pipeline and expert parallel sizes."""


def suggest(job: Job, path: str, overrides: Sequence[str], count: int) -> list[Suggestion]:
    """At most `count` layouts, fastest first by the stated model, each built and found to fit. A shape appears once, with
    the recomputation and the virtual pipeline that are fastest for it. Everything but the layout stays the config's."""
    assert job.gpu is not None, "without a GPU nothing is ranked"
    limit = memory_limit(job.gpu, job.assumed)
    contexts = _contexts(job, path, overrides)
    ranked = sorted(_Search(job, limit * _ESTIMATE_MARGIN).estimates(contexts), key=lambda one: one[0])
    found: list[Suggestion] = []
    taken: set[Shape] = set()
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


def _contexts(job: Job, path: str, overrides: Sequence[str]) -> tuple[int, ...]:
    """Context-parallel sizes worth a look: more than 1 for long pairs only, and where the config accepts it."""
    if job.cfg.policy.max_total_sequence_length < _LONG:
        return (1,)
    try:
        load_config(path, [*overrides, f"{_MEG}.context_parallel_size=2"])
    except ConfigError:
        return (1,)
    return _CONTEXTS


class _Search:
    """Every layout of a job's world, estimated by arithmetic."""

    def __init__(self, job: Job, limit: float) -> None:
        self.job, self.limit = job, limit
        self._dealt: dict[tuple[int, int, int], Workload | None] = {}
        self._layers: dict[tuple[int, int, int], tuple[int, int]] = {}

    def estimates(self, contexts: Sequence[int]) -> Iterator[tuple[float, Shape, list[str]]]:
        """(seconds a step, shape, overrides) of each candidate that may fit."""
        for cfg, changes in _candidates(self.job, contexts):
            one = dataclasses.replace(self.job, cfg=cfg)
            if check_job(one):
                continue
            grid = Grid.of(cfg, one.world_size)
            work = self._work(cfg, grid)
            if work is None:
                continue
            peak, buffers = self._peak(one, grid, work)
            if peak > self.limit:
                continue
            time = step_time(one, work, buffers)
            assert time is not None
            yield time.total_s, (grid.tensor, grid.context, grid.pipeline, grid.expert), changes

    def _work(self, cfg: Config, grid: Grid) -> Workload | None:
        key = (grid.data, cfg.policy.make_sequence_length_divisible_by, micro_batch_multiple(cfg))
        if key not in self._dealt:
            try:
                self._dealt[key] = workload(cfg, self.job.arch, self.job.lengths, self.job.said, dp=grid.data)
            except ConfigError:  # padding leaves too little room for the longest pair
                self._dealt[key] = None
        return self._dealt[key]

    def _peak(self, job: Job, grid: Grid, work: Workload) -> tuple[int, list[StageBuffers]]:
        """Estimated bytes of the fullest rank, and each stage's buffers."""
        megatron, layers = job.cfg.policy.megatron_cfg, stage_layers(job)
        estimate = Estimate(
            job.cfg, job.arch, FullPack.of(job.cfg, full_pack(job.cfg, job.lengths)), job.assumed.expert_load
        )
        highest, buffers = 0, []
        for stage, count in enumerate(layers):
            chunks = self._parameters(job.arch, grid, stage, count)
            reference = []
            if job.reference is not None:
                reference = [
                    self._parameters(
                        job.reference, grid, stage, count * job.reference.num_layers // job.arch.num_layers
                    )
                ]
            rough = _rough_buffers(chunks, grid, megatron.optimizer.use_distributed_optimizer)
            buffers.append(rough)
            shards = rough.shards(grid, 0)
            static = static_bytes([chunks], reference, rough, sum(shards), megatron, job.bf16)
            each = count // grid.virtual_pipeline
            used = [
                estimate.chunk(each, last=grid.is_last_chunk(stage, number)) for number in range(grid.virtual_pipeline)
            ]
            training = alive(grid, stage, min(work.micro_batches, 3 * grid.pipeline), used).peak
            high = max(training, optimizer_temporaries(job, shards, [chunks]))
            highest = max(highest, static.total + used[0].buffers + high)
        return highest, buffers

    def _parameters(self, arch: Architecture, grid: Grid, stage: int, layers: int) -> list[Parameter]:
        """A stage's as two: all that is no expert's, and all experts'."""
        key = (id(arch), grid.tensor, grid.expert)
        if key not in self._layers:
            layer = list(layer_parameters(arch, grid))
            experts = sum(one.elements for one in layer if one.expert)
            self._layers[key] = sum(one.elements for one in layer) - experts, experts
        dense, experts = (layers * elements for elements in self._layers[key])
        table = arch.vocab_size // grid.tensor * arch.hidden_size
        first, last = stage == 0, stage == grid.pipeline - 1
        dense += table * (first + last - (first and last and arch.tie_word_embeddings)) + last * arch.hidden_size
        return [Parameter(dense), Parameter(experts, expert=True)]


def _rough_buffers(parameters: Sequence[Parameter], grid: Grid, distributed: bool) -> StageBuffers:
    """Without padding, in equal shards."""

    def of(elements: int, ranks: int) -> tuple[Buffer, ...]:
        return (Buffer(elements, (-(-elements // ranks) if distributed else elements,) * ranks),)

    dense, experts = parameters
    return StageBuffers(of(dense.elements, grid.replicas), of(experts.elements, grid.expert_replicas))


def _candidates(job: Job, contexts: Sequence[int]) -> Iterator[tuple[Config, list[str]]]:
    """Tensor parallel inside a node, with sequence parallel; pipeline stages of equal depth, in equal chunks; experts whole;
    three recomputations."""
    arch, world = job.arch, job.world_size
    experts = 1 if arch.moe is None else arch.moe.num_experts
    for tp in range(1, int(job.assumed.gpus_per_node) + 1):
        if arch.num_kv_heads % tp:
            continue
        for pp in (n for n in range(1, arch.num_layers + 1) if not (world % (tp * n) or arch.num_layers % n)):
            for cp in (n for n in contexts if not world % (tp * pp * n)):
                for ep in (n for n in range(1, experts + 1) if not (experts % n or world // pp % n)):
                    for chunks in (n for n in _CHUNKS if n == 1 or (pp > 1 and not arch.num_layers // pp % n)):
                        for recompute in ("none", "selective", "full"):
                            yield _candidate(
                                job.cfg,
                                Grid(tensor=tp, context=cp, pipeline=pp, expert=ep, virtual_pipeline=chunks),
                                recompute,
                            )


def _candidate(cfg: Config, grid: Grid, recompute: str) -> tuple[Config, list[str]]:
    changes: dict[str, object] = {
        "tensor_model_parallel_size": grid.tensor,
        "context_parallel_size": grid.context,
        "pipeline_model_parallel_size": grid.pipeline,
        "virtual_pipeline_model_parallel_size": grid.virtual_pipeline,
        "expert_model_parallel_size": grid.expert,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": grid.tensor > 1,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "activation_checkpointing": recompute != "none",
        "recompute_granularity": "full" if recompute == "none" else recompute,
    }
    megatron = dataclasses.replace(cfg.policy.megatron_cfg, **changes)  # type: ignore[arg-type]
    multiple = grid.tensor * grid.context
    policy = dataclasses.replace(cfg.policy, megatron_cfg=megatron, make_sequence_length_divisible_by=multiple)
    told = {name: value for name, value in changes.items() if name != "context_parallel_size" or value != 1}
    return dataclasses.replace(cfg, policy=policy), [f"{_MEG}.{name}={_yaml(value)}" for name, value in told.items()]


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower()
