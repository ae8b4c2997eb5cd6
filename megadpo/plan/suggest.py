"""Searches the best layouts for a number of ranks. It estimates every possible layout by arithmetic, and builds the best
ones that fit.

"Best" is an order by exact counts, not by predicted times:

1. fewest groups (tensor x context, expert) that span nodes, because they communicate in every layer;
2. the largest share of needed operations (`needed_share`), in steps of 5%. Idle pipeline slots, a stage with more work than
   the others, and recomputation lower it;
3. fewest ranks that split a layer: tensor x context, then expert;
4. fewest model chunks, because activations are sent between them;
5. most free memory on the rank with the least.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias

from megadpo.config.architecture import Architecture, Layer
from megadpo.config.check import chunk_layers, micro_batch_multiple
from megadpo.config.grid import Grid
from megadpo.config.load import load_config
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.schema import Config
from megadpo.lora.targets import find_targets
from megadpo.plan.activations import Estimate
from megadpo.plan.flops import stage_flops
from megadpo.plan.memory import GIB, memory_limit
from megadpo.plan.packs import Pack, Workload, full_pack, workload
from megadpo.plan.parameters import Buffer, Parameter, StageBuffers, layer_parameters, static_bytes
from megadpo.plan.plan import Job, Plan, check_job, make_plan, optimizer_temporaries, too_large
from megadpo.plan.schedule import alive

_MEG = "policy.megatron_cfg"
_Layers: TypeAlias = Sequence[Sequence[Layer]]  # of each chunk of a stage
_ESTIMATE_MARGIN = (
    1.05  # layouts with an estimate up to this factor of the limit are built; building gives the exact size
)
_MOST_BUILT_PER_SUGGESTION = 4
_CHUNKS = (1, 2, 3, 4, 5, 6, 8)
_CONTEXTS = (1, 2, 4, 8)
_LONG = 8192  # context parallelism is searched from this length of a pair in tokens


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits, as overrides of the config, and its plan."""

    overrides: tuple[str, ...]
    plan: Plan
    needed_share: float


@dataclass(frozen=True)
class Candidate:
    """A layout, estimated."""

    cfg: Config
    grid: Grid
    overrides: tuple[str, ...]
    needed_share: float
    static: int
    """Bytes of weights, gradients, optimizer and reference on the fullest rank."""
    peak: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Two suggestions must differ in this."""
        return self.grid.tensor, self.grid.context, self.grid.pipeline, self.grid.expert

    def order(self, gpus_per_node: int) -> tuple[float, ...]:
        """Sort key, best first; see the module's docstring."""
        split, experts = self.grid.tensor * self.grid.context, self.grid.expert * self.grid.expert_tensor
        crossing = sum(gpus_per_node % ranks != 0 for ranks in (split, experts))
        chunks = self.grid.pipeline * self.grid.virtual_pipeline
        return crossing, -round(20 * self.needed_share), split, experts, chunks, self.peak


def needed_share(job: Job, grid: Grid, pack: Pack, micro_batches: int) -> float:
    """Share (0..1): operations that a step needs / operations that all its ranks could do in the time of the busiest stage
    (its micro-batches and its idle slots). Every micro-batch counts as `pack`."""
    stages = stage_flops(job.cfg, job.arch, job.reference, pack)
    busiest = max(stage.needed + stage.repeated for stage in stages)
    waits = (grid.pipeline - 1) / grid.virtual_pipeline
    needed = sum(stage.needed for stage in stages) * micro_batches
    return needed / (busiest * grid.pipeline * (micro_batches + waits))


def suggest(job: Job, path: str, overrides: Sequence[str], count: int) -> list[Suggestion]:
    """At most `count` layouts that fit, best first; each has been built. A shape appears once, with its best number of
    chunks, division of layers and recomputation. All other settings are the config's.

    Raises ConfigError if none fits, with the layout that needs the least memory.
    """
    assert job.gpu is not None, "the limit is that of a GPU"
    limit, node = memory_limit(job.gpu, job.assumed), int(job.assumed.gpus_per_node)
    search = _Search(job)
    candidates = sorted(search.candidates(_contexts(job, path, overrides)), key=lambda one: one.order(node))
    found: list[tuple[tuple[float, ...], Suggestion]] = []
    too_big: list[Candidate] = []
    taken: set[tuple[int, ...]] = set()
    built = 0
    for one in candidates:
        if len(found) == count or (found and built >= count * _MOST_BUILT_PER_SUGGESTION):
            break
        if one.peak > limit * _ESTIMATE_MARGIN:
            too_big.append(one)
            continue
        if one.shape in taken:
            continue
        try:
            cfg = load_config(path, [*overrides, *one.overrides])
            plan = make_plan(dataclasses.replace(job, cfg=cfg))
        except ConfigError as error:  # other keys of the config exclude this layout
            search.refused = search.refused or error.problems[0]
            continue
        built += 1
        counted = dataclasses.replace(one, peak=plan.peak_bytes, static=max(s.static.total for s in plan.stages))
        if too_large(plan):
            too_big.append(counted)
        else:
            taken.add(one.shape)
            found.append((counted.order(node), Suggestion(one.overrides, plan, one.needed_share)))
    if not found:
        raise ConfigError(_nothing_fits(job, limit, too_big, search.refused))
    return [suggestion for _, suggestion in sorted(found, key=lambda pair: pair[0])]


def _nothing_fits(job: Job, limit: float, too_big: Sequence[Candidate], refused: Problem | None) -> Problem:
    """The problem, with the layout that needs the least memory, and how to lower its memory."""
    assert job.gpu is not None
    shown = f"{job.world_size} ranks of {job.gpu.name}"
    if not too_big:
        reason = "" if refused is None else f"; the first refusal: {refused}"
        fix = "choose another --world-size, or correct the settings that exclude layouts"
        return Problem("--suggest", shown, f"a number of ranks for which this model has a layout{reason}", fix)
    nearest = min(too_big, key=lambda one: one.peak)
    expected = (
        f"a layout with at most {limit / GIB:.1f} GiB per rank; the smallest, {nearest.grid}, needs "
        f"{nearest.peak / GIB:.1f}; {nearest.static / GIB:.1f} of them are weights, gradients, optimizer and reference"
    )
    fixes = ["raise --world-size", "choose a larger GPU"]
    if nearest.static < limit:
        fixes.insert(0, "lower policy.sequence_packing.train_mb_tokens")
    if nearest.grid.replicas > 1 and not job.cfg.policy.megatron_cfg.optimizer.use_distributed_optimizer:
        fixes.insert(0, "set policy.megatron_cfg.optimizer.use_distributed_optimizer: true")
    return Problem("--suggest", shown, expected, "; or ".join(fixes))


def _contexts(job: Job, path: str, overrides: Sequence[str]) -> tuple[int, ...]:
    """Context-parallel sizes to search: more than 1 only for long pairs, and if the config allows it."""
    if job.cfg.policy.max_total_sequence_length < _LONG:
        return (1,)
    try:
        load_config(path, [*overrides, f"{_MEG}.context_parallel_size=2"])
    except ConfigError:
        return (1,)
    return _CONTEXTS


class _Search:
    """Estimates every layout of a job's ranks by arithmetic."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.refused: Problem | None = None
        """The first reason why a layout can't be used."""
        self._dealt: dict[tuple[int, int, int], Workload | None] = {}
        self._layers: dict[tuple[int, Layer, int, int], tuple[int, int]] = {}

    def candidates(self, contexts: Sequence[int]) -> Iterator[Candidate]:
        """Every layout that the checks accept, also those that don't fit."""
        for cfg, overrides in _layouts(self.job, contexts):
            one = dataclasses.replace(self.job, cfg=cfg)
            problems = check_job(one)
            if problems:
                self.refused = self.refused or problems[0]
                continue
            grid = Grid.of(cfg, one.world_size)
            work = self._work(cfg, grid)
            if work is None:
                continue
            pack = Pack.of(cfg, full_pack(cfg, one.pairs))
            static, peak = self._fullest(one, grid, pack, work.micro_batches)
            share = needed_share(one, grid, pack, work.micro_batches)
            yield Candidate(cfg, grid, overrides, share, static, peak)

    def _work(self, cfg: Config, grid: Grid) -> Workload | None:
        key = (grid.data, cfg.policy.make_sequence_length_divisible_by, micro_batch_multiple(cfg))
        if key not in self._dealt:
            try:
                self._dealt[key] = workload(cfg, self.job.arch, self.job.pairs, self.job.origin, dp=grid.data)
            except ConfigError as error:  # padding leaves too little room for the longest pair
                self.refused = self.refused or error.problems[0]
                self._dealt[key] = None
        return self._dealt[key]

    def _fullest(self, job: Job, grid: Grid, pack: Pack, micro_batches: int) -> tuple[int, int]:
        """Estimated bytes of the rank with the most memory: (static, peak)."""
        stages = chunk_layers(job.cfg, job.arch)
        of_reference = [[]] * len(stages) if job.reference is None else chunk_layers(job.cfg, job.reference)
        estimate = Estimate(job.cfg, job.arch, pack, job.assumed.expert_load)
        fullest = (0, 0)
        for stage in sorted(
            {0, min(1, grid.pipeline - 1), grid.pipeline - 1}
        ):  # of the inner stages the first one has the most in flight
            found = self._stage(job, grid.stage(stage), stages[stage], of_reference[stage], estimate, micro_batches)
            fullest = max(fullest, found, key=lambda sizes: sizes[1])
        return fullest

    def _stage(
        self, job: Job, grid: Grid, chunks: _Layers, reference_chunks: _Layers, estimate: Estimate, micro_batches: int
    ) -> tuple[int, int]:
        megatron, stage = job.cfg.policy.megatron_cfg, grid.pp_rank
        held = self._parameters(job.arch, grid, chunks)
        resident = job.reference is not None and job.cfg.dpo.reference.mode == "resident"
        reference = [self._parameters(job.reference, grid, reference_chunks)] if job.reference and resident else []
        if megatron.peft.enabled:
            held = [dataclasses.replace(one, trainable=False) for one in held]
            held += self._adapters(job, grid, sum(map(len, chunks)))
        trained = [one for one in held if one.trainable]
        buffers = _rough_buffers(trained, grid, megatron.optimizer.use_distributed_optimizer)
        shards = buffers.shards(grid, 0)
        static = static_bytes([held], reference, buffers, sum(shards), megatron, job.bf16).total
        used = [estimate.chunk(layers, last=grid.is_last_chunk(number)) for number, layers in enumerate(chunks)]
        training = alive(grid, stage, min(micro_batches, 3 * grid.pipeline), used).peak
        return static, static + used[0].buffers + max(training, optimizer_temporaries(job, shards, [held]))

    def _adapters(self, job: Job, grid: Grid, layers: int) -> list[Parameter]:
        """The parameters of the adapters as two, like `_parameters`. It assumes the same number of adapters in each layer."""
        peft, found = job.cfg.policy.megatron_cfg.peft, [0.0, 0.0]
        for target in find_targets(peft, job.arch):
            expert = target.entry.expert is not None
            cut, shared = (grid.expert_tensor, grid.expert) if expert else (grid.tensor, 1)
            found[expert] += target.elements(peft.dim, cut) / shared
        dense, experts = (int(elements * layers / job.arch.num_layers) for elements in found)
        return [Parameter(dense), Parameter(experts, expert=True)]

    def _parameters(self, arch: Architecture, grid: Grid, chunks: _Layers) -> list[Parameter]:
        """The parameters of a stage as two: all without experts, and all experts."""
        dense = experts = 0
        for layer, count in Counter(chain(*chunks)).items():
            key = (arch.hidden_size, layer, grid.tensor, grid.expert)
            if key not in self._layers:
                found = list(layer_parameters(arch, layer, grid))
                of_experts = sum(one.elements for one in found if one.expert)
                self._layers[key] = sum(one.elements for one in found) - of_experts, of_experts
            dense += count * self._layers[key][0]
            experts += count * self._layers[key][1]
        table = arch.vocab_size // grid.tensor * arch.hidden_size
        first, last = grid.pp_rank == 0, grid.pp_rank == grid.pipeline - 1
        dense += table * (first + last - (first and last and arch.tie_word_embeddings)) + last * arch.hidden_size
        return [Parameter(dense), Parameter(experts, expert=True)]


def _rough_buffers(parameters: Sequence[Parameter], grid: Grid, distributed: bool) -> StageBuffers:
    """Buffers without padding, in equal shards."""

    def of(elements: int, ranks: int) -> tuple[Buffer, ...]:
        return (Buffer(elements, (-(-elements // ranks) if distributed else elements,) * ranks),)

    dense, experts = parameters
    return StageBuffers(of(dense.elements, grid.replicas), of(experts.elements, grid.expert_replicas))


def _layouts(job: Job, contexts: Sequence[int]) -> Iterator[tuple[Config, tuple[str, ...]]]:
    """All layouts to search: tensor and sequence parallel within a node; every pipeline depth, with equal chunks in a stage;
    experts not split; three kinds of recomputation."""
    arch, world = job.arch, job.world_size
    experts = 1 if arch.experts is None else arch.experts.number
    for tp in (
        n for n in range(1, int(job.assumed.gpus_per_node) + 1) if not (arch.attention.num_kv_heads % n or world % n)
    ):
        for pp in (n for n in range(1, arch.num_layers + 1) if not world % (tp * n)):
            depths = list(divisions(arch.num_layers, pp))
            for cp in (n for n in contexts if not world % (tp * pp * n)):
                for ep in (n for n in range(1, experts + 1) if not (experts % n or world // pp % n)):
                    for chunks, first, last in depths:
                        grid = Grid(tensor=tp, context=cp, pipeline=pp, expert=ep, virtual_pipeline=chunks)
                        for recompute in ("none", "selective", "full"):
                            yield _layout(job.cfg, grid, first, last, recompute)


def divisions(layers: int, stages: int) -> Iterator[tuple[int, int | None, int | None]]:
    """(chunks of a stage, layers of the first stage, layers of the last stage). None: as in the stages between.

    Equal stages, if they divide the layers. Also equal stages between a shorter first and last one: because the layers
    don't divide, or because the ends also have the embeddings and the head.
    """
    if stages == 1:
        yield 1, None, None
        return
    for chunks in _CHUNKS:
        units = layers // chunks
        if layers % chunks or units < stages:
            continue
        if not units % stages:
            yield chunks, None, None
        least = -(-units // stages)
        if stages == 2:  # without `last`, because megatron-core divides by the number of stages between
            yield from ((chunks, first * chunks, None) for first in (units // 2, least) if units % 2)
            continue
        for inner in (least, least + 1):
            ends = units - inner * (stages - 2)
            for first in range(max(1, ends - inner), min(inner, ends - 1) + 1):
                if ends != 2 * inner:
                    yield chunks, first * chunks, (ends - first) * chunks


def _layout(
    cfg: Config, grid: Grid, first: int | None, last: int | None, recompute: str
) -> tuple[Config, tuple[str, ...]]:
    changes: dict[str, object] = {
        "tensor_model_parallel_size": grid.tensor,
        "context_parallel_size": grid.context,
        "pipeline_model_parallel_size": grid.pipeline,
        "virtual_pipeline_model_parallel_size": grid.virtual_pipeline,
        "expert_model_parallel_size": grid.expert,
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": grid.tensor > 1,
        "num_layers_in_first_pipeline_stage": first,
        "num_layers_in_last_pipeline_stage": last,
        "activation_checkpointing": recompute != "none",
        "recompute_granularity": "full" if recompute == "none" else recompute,
    }
    megatron = dataclasses.replace(cfg.policy.megatron_cfg, **changes)  # type: ignore[arg-type]
    multiple = grid.tensor * grid.context
    policy = dataclasses.replace(cfg.policy, megatron_cfg=megatron, make_sequence_length_divisible_by=multiple)
    told = {name: value for name, value in changes.items() if getattr(cfg.policy.megatron_cfg, name) != value}
    overrides = (f"{_MEG}.{name}={'null' if value is None else str(value).lower()}" for name, value in told.items())
    return dataclasses.replace(cfg, policy=policy), tuple(overrides)
