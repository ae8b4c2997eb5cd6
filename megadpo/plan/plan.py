"""The plan of one layout. It builds each different pipeline stage in a pretend world, and counts the memory of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megadpo.config.architecture import Architecture, Layer
from megadpo.config.check import check_layout, chunk_layers
from megadpo.config.grid import Grid
from megadpo.config.known import Known, Machine
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.schema import Config
from megadpo.config.variants import ATTENTION_KERNELS
from megadpo.data.batches.groups import PairGroups
from megadpo.lora.targets import lora_problems
from megadpo.optimizer.kinds.adam import Adam
from megadpo.optimizer.slices import most_copied
from megadpo.plan.flops import stage_flops
from megadpo.plan.memory import GIB, Assumptions, Gpu, memory_limit
from megadpo.plan.packs import Workload, full_pack, pack_tokens, workload
from megadpo.plan.parameters import Chunk, StaticBytes, stage_buffers, static_bytes
from megadpo.plan.schedule import Slots, alive, slots

if TYPE_CHECKING:
    from megadpo.checkpoint.size import CheckpointBytes
    from megadpo.plan.trace import StageTrace


@dataclass(frozen=True, kw_only=True)
class Job:
    """The inputs of a plan."""

    cfg: Config
    arch: Architecture
    reference: Architecture | None
    world_size: int
    gpu: Gpu | None
    """None: for CPUs, without a memory limit."""
    assumed: Assumptions
    pairs: PairGroups
    """The pairs in the order of the first epoch."""
    origin: str
    """The origin of the lengths."""

    @property
    def bf16(self) -> bool:
        return self.cfg.policy.precision == "bfloat16"


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One pipeline stage. Numbers are for its rank that uses the most memory, in bytes unless the name says otherwise."""

    stage: int
    layers: int
    parameters: int
    static: StaticBytes
    buffers: int
    in_flight: int
    """Largest number of micro-batches between forward and backward. With a virtual pipeline: of passes through a chunk."""
    activations: int
    """Their peak, for packs that fill the token budget."""
    reference_activations: int
    optimizer_temporaries: int

    @property
    def peak(self) -> int:
        """The largest of three phases that follow each other: training, the reference's pass, the optimizer's step."""
        return self.static.total + self.buffers + max(self._phases.values())

    @property
    def peak_phase(self) -> str:
        """The phase of the peak."""
        return max(self._phases, key=lambda phase: self._phases[phase])

    @property
    def _phases(self) -> dict[str, int]:
        return {
            "training": self.activations,
            "reference": self.reference_activations,
            "optimizer": self.optimizer_temporaries,
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `megadpo plan` shows."""

    job: Job
    grid: Grid
    stages: tuple[StagePlan, ...]
    pack_tokens: int
    work: Workload
    slots: Slots
    flops_per_step: float
    """The policy's forward and backward with nothing frozen, and the reference's forward, without recomputation."""
    checkpoint: CheckpointBytes

    @property
    def sequence_parallel(self) -> bool:
        return self.job.cfg.policy.megatron_cfg.sequence_parallel

    @property
    def peak_bytes(self) -> int:
        return max(stage.peak for stage in self.stages)


def check_job(job: Job) -> list[Problem]:
    """Every problem that can be found without building: of layout, both models, attention kernel and optimizer."""
    problems = check_layout(job.cfg, job.arch, job.world_size)
    if job.reference is not None and job.reference is not job.arch:
        problems += [one for one in check_layout(job.cfg, job.reference, None) if one not in problems]
    if job.gpu is not None:
        problems += ATTENTION_KERNELS.problems(Known(cfg=job.cfg, machine=Machine(device="cuda")))
    if getattr(job.cfg.policy.megatron_cfg.optimizer.kind, "optimizer_cpu_offload", False):
        where = "policy.megatron_cfg.optimizer.optimizer_cpu_offload"
        expected = "false: the planner does not support it"
        problems.append(Problem(where, True, expected, "plan without it; the plan is then an upper bound"))
    if job.cfg.policy.megatron_cfg.fp8_cfg.enabled:
        where, expected = "policy.megatron_cfg.fp8_cfg.enabled", "false: the planner does not support float8"
        problems.append(Problem(where, True, expected, "plan in bfloat16"))
    peft = job.cfg.policy.megatron_cfg.peft
    if peft.enabled and peft.lora_dtype not in (None, job.cfg.policy.precision):
        where, expected = "policy.megatron_cfg.peft.lora_dtype", "null: adapters of another dtype are not planned"
        problems.append(Problem(where, peft.lora_dtype, expected, "plan with the model's dtype"))
    return problems


def make_plan(job: Job) -> Plan:
    """Makes the plan. Raises ConfigError with every problem of the layout. Too little memory is not an error here: see
    `too_large`."""
    from megadpo.checkpoint.size import checkpoint_bytes  # torch and megatron-core
    from megadpo.model.freeze import freeze_problems

    problems = check_job(job) + freeze_problems(job.cfg.policy.freeze, job.arch) + lora_problems(job.cfg, job.arch)
    if problems:
        raise ConfigError(problems)
    grid = Grid.of(job.cfg, job.world_size)
    work = workload(job.cfg, job.arch, job.pairs, job.origin, dp=grid.data)
    flops = stage_flops(job.cfg, job.arch, job.reference, work.total)
    return Plan(
        job=job,
        grid=grid,
        stages=tuple(_stages(job, grid, work.micro_batches)),
        pack_tokens=pack_tokens(job.cfg),
        work=work,
        slots=slots(grid, work.micro_batches),
        flops_per_step=sum(stage.needed for stage in flops) / work.batches,
        checkpoint=checkpoint_bytes(job.arch, job.cfg),
    )


def _stages(job: Job, grid: Grid, micro_batches: int) -> Iterator[StagePlan]:
    """Builds one stage of each kind."""
    from megadpo.plan.trace import trace_stage  # imports torch and megatron-core, after the fast checks

    pack = full_pack(job.cfg, job.pairs)
    own_reference = None if job.reference is job.arch else job.reference
    traces: dict[tuple[bool, bool, tuple[tuple[Layer, ...], ...], int], StageTrace] = {}
    for stage, chunks in enumerate(chunk_layers(job.cfg, job.arch)):
        # freezing goes by the number of a layer, and so may adapters: stages of one kind may differ
        by_number = job.cfg.policy.freeze or job.cfg.policy.megatron_cfg.peft.enabled
        kind = (stage == 0, stage == grid.pipeline - 1, tuple(chunks), stage if by_number else 0)
        if kind not in traces:
            traces[kind] = trace_stage(
                job.cfg,
                job.arch,
                own_reference,
                pack,
                grid=grid.stage(stage),
                device_type="cpu" if job.gpu is None else "cuda",
                expert_load=job.assumed.expert_load,
            )
        yield _stage(job, grid, traces[kind], stage, sum(map(len, chunks)), micro_batches)


def optimizer_temporaries(job: Job, shards: tuple[int, int], chunks: Sequence[Chunk]) -> int:
    """Bytes that an optimizer step uses temporarily. torch's AdamW on GPUs: a float32 for each element, for all parameters at
    once (experts separately); on CPUs two float32, for one parameter at a time. If bfloat16 gradients are reduced, float32
    copies of them are added. The precision-aware optimizer copies only the bfloat16 moments of a slice."""
    megatron = job.cfg.policy.megatron_cfg
    kind = megatron.optimizer.kind
    parameters = [one.elements for chunk in chunks for one in chunk if one.trainable]
    largest = min(max(shards), max(parameters, default=0))
    if isinstance(kind, Adam) and kind.use_precision_aware_optimizer:
        return most_copied(kind.copied_bytes, max(shards), largest)
    narrow = job.bf16 and not megatron.distributed_data_parallel_config.grad_reduce_in_fp32
    copies = 4 * sum(shards) if narrow else 0
    if not isinstance(kind, Adam) or kind.adam_impl in ("transformer_engine", "triton"):
        return copies
    return copies + (4 * max(shards) if job.gpu is not None else 8 * largest)


def _stage(job: Job, grid: Grid, trace: StageTrace, stage: int, layers: int, micro_batches: int) -> StagePlan:
    resident = job.cfg.dpo.reference.mode == "resident"  # else the policy without its adapters
    reference = (trace.reference or trace.parameters) if resident else []
    buffers = stage_buffers(trace.parameters, job.cfg.policy.megatron_cfg, grid, first_stage=stage == 0)
    shards = buffers.largest_shards(grid)
    moment = alive(grid, stage, micro_batches, trace.chunks)
    return StagePlan(
        stage=stage,
        layers=layers,
        parameters=sum(one.elements for chunk in trace.parameters for one in chunk),
        static=static_bytes(trace.parameters, reference, buffers, sum(shards), job.cfg.policy.megatron_cfg, job.bf16),
        buffers=trace.buffers,
        in_flight=moment.in_flight,
        activations=moment.peak,
        reference_activations=max(one.reference_peak for one in trace.chunks) if job.reference is not None else 0,
        optimizer_temporaries=optimizer_temporaries(job, shards, trace.parameters),
    )


def too_large(plan: Plan) -> list[Problem]:
    """A Problem for every stage that needs more than the GPU's memory."""
    job = plan.job
    if job.gpu is None:
        return []
    limit = memory_limit(job.gpu, job.assumed)
    megatron = job.cfg.policy.megatron_cfg
    fixes = []
    if not megatron.activation_checkpointing:
        fixes.append("set policy.megatron_cfg.activation_checkpointing: true")
    if plan.grid.tensor > 1 and not megatron.sequence_parallel:
        fixes.append("set policy.megatron_cfg.sequence_parallel: true")
    if plan.grid.replicas > 1 and not megatron.optimizer.use_distributed_optimizer:
        fixes.append("set policy.megatron_cfg.optimizer.use_distributed_optimizer: true")
    fixes.append("lower policy.sequence_packing.train_mb_tokens, raise tensor or pipeline parallel, or see --suggest")
    return [
        Problem(
            f"pipeline stage {one.stage}",
            f"{one.peak / GIB:.1f} GiB at the peak",
            f"at most {limit / GIB:.1f} GiB on a {job.gpu.name} ({job.gpu.hbm_bytes / 1e9:.0f} GB minus the reserve)",
            "; or ".join(fixes),
        )
        for one in plan.stages
        if one.peak > limit
    ]
