"""The plan of one layout: every distinct pipeline stage built in a pretend world, its memory, and the step's time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megadpo.config.architecture import Architecture
from megadpo.config.check import check_layout, data_parallel_size, layers_per_stage
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.schema import Config
from megadpo.plan.gpus import GIB, Assumptions, Gpu
from megadpo.plan.packs import Lengths, Workload, full_pack, packed_lengths, shares_prompt, workload
from megadpo.plan.parameters import Buffer, StaticBytes, buffer_of, static_bytes
from megadpo.plan.timing import StepTime, TimeModel

if TYPE_CHECKING:
    from megadpo.plan.trace import StageTrace


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be planned."""

    cfg: Config
    arch: Architecture
    reference: Architecture | None
    world_size: int
    gpu: Gpu | None
    """None: on CPUs. No memory limit and no expected time then."""
    assumed: Assumptions
    lengths: Lengths
    said: str
    """Where the lengths are from."""

    @property
    def bf16(self) -> bool:
        return self.cfg.policy.precision == "bfloat16"


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One pipeline stage; figures of one rank, the fullest of its data-parallel peers. Bytes unless named otherwise."""

    stage: int
    layers: int
    parameters: int
    static: StaticBytes
    buffers: int
    in_flight: int
    """Micro-batches between their forward and their backward at the worst moment."""
    activations: int
    """At that moment, at the token budget."""
    reference_activations: int
    optimizer_temporaries: int

    @property
    def peak(self) -> int:
        """Training, the reference's pass and the optimizer's step follow each other: the highest of the three."""
        return self.static.total + self.buffers + max(self._phases.values())

    @property
    def peak_phase(self) -> str:
        """Which of the three it is."""
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
    """What `tools/plan.py` shows."""

    job: Job
    tensor: int
    pipeline: int
    data: int
    sequence_parallel: bool
    stages: tuple[StagePlan, ...]
    pack_tokens: int
    work: Workload
    time: StepTime | None

    @property
    def peak_bytes(self) -> int:
        return max(stage.peak for stage in self.stages)


def memory_limit(gpu: Gpu, assumed: Assumptions) -> float:
    """Bytes that a rank's tensors may take at their peak."""
    return (gpu.hbm_bytes - assumed.reserve_gib * GIB) / (1 + assumed.allocator_slack)


def check_job(job: Job) -> list[Problem]:
    """Everything that would fail and can be known without building: layout, both models, attention kernel."""
    problems = check_layout(job.cfg, job.arch, job.world_size)
    if job.reference is not None and job.reference is not job.arch:
        problems += [one for one in check_layout(job.cfg, job.reference, None) if one not in problems]
    kernel = job.cfg.policy.attention_kernel
    where = "policy.attention_kernel"
    if job.gpu is not None and kernel == "cpu":
        problems.append(Problem(where, kernel, "another kernel on a GPU", "set it to auto"))
    if job.gpu is not None and not job.bf16 and kernel in ("varlen", "transformer_engine"):
        problems.append(Problem(where, kernel, "policy.precision bfloat16", "set it to sdpa for float32"))
    return problems


def make_plan(job: Job) -> Plan:
    """Raises ConfigError with every problem of the layout. Too little memory is no error here: see `too_large`."""
    from megadpo.plan.trace import trace_stage  # torch and megatron-core: after the cheap refusals

    problems = check_job(job)
    if problems:
        raise ConfigError(problems)
    megatron = job.cfg.policy.megatron_cfg
    pp, dp = megatron.pipeline_model_parallel_size, data_parallel_size(job.cfg, job.world_size)
    work = workload(job.cfg, job.lengths, job.said, dp=dp)
    pack = full_pack(job.cfg, job.lengths)
    layers = stage_layers(job)
    own_reference = None if job.reference is None or job.reference is job.arch else job.reference
    traces: dict[tuple[bool, bool, int], StageTrace] = {}
    stages, buffers = [], []
    for stage, count in enumerate(layers):
        kind = (stage == 0, stage == pp - 1, count)
        if kind not in traces:
            traces[kind] = trace_stage(
                job.cfg,
                job.arch,
                own_reference,
                pack,
                world_size=job.world_size,
                stage=stage,
                device_type="cpu" if job.gpu is None else "cuda",
            )
        buffer = buffer_of(traces[kind].parameters, megatron, dp=dp, first_stage=stage == 0)
        buffers.append(buffer)
        stages.append(_stage(job, traces[kind], buffer, stage, count, min(pp - stage, work.micro_batches)))
    return Plan(
        job=job,
        tensor=megatron.tensor_model_parallel_size,
        pipeline=pp,
        data=dp,
        sequence_parallel=megatron.sequence_parallel,
        stages=tuple(stages),
        pack_tokens=int(packed_lengths(pack, share_prompt=shares_prompt(job.cfg)).sum()),
        work=work,
        time=step_time(job, work, buffers),
    )


def stage_layers(job: Job) -> list[int]:
    """Layers of each stage; the layout was checked."""
    layers = layers_per_stage(job.cfg, job.arch.num_layers)
    assert layers is not None, "check_layout accepts only layers that can be divided"
    return layers


def step_time(job: Job, work: Workload, buffers: list[Buffer]) -> StepTime | None:
    """None on CPUs, which have no datasheet here."""
    if job.gpu is None:
        return None
    model = TimeModel(job.cfg, job.arch, job.reference, job.gpu, job.assumed, job.world_size)
    return model.step(work, buffers)


def optimizer_temporaries(job: Job, buffer: Buffer, largest_parameter: int) -> int:
    """What torch's AdamW takes for a moment: on GPUs one float32 an element, all parameters at once; on CPUs two, one
    parameter at a time. Where bfloat16 gradients are reduced, their float32 copies come on top."""
    megatron, shard = job.cfg.policy.megatron_cfg, max(buffer.shard_elements)
    narrow = job.bf16 and not megatron.distributed_data_parallel_config.grad_reduce_in_fp32
    copies = 4 * shard if narrow else 0
    if megatron.optimizer.optimizer != "adam":
        return copies
    return copies + (4 * shard if job.gpu is not None else 8 * min(shard, largest_parameter))


def _stage(job: Job, trace: StageTrace, buffer: Buffer, stage: int, layers: int, in_flight: int) -> StagePlan:
    reference = [] if job.reference is None else trace.reference or trace.parameters
    return StagePlan(
        stage=stage,
        layers=layers,
        parameters=sum(one.elements for one in trace.parameters),
        static=static_bytes(trace.parameters, reference, buffer, job.cfg.policy.megatron_cfg, job.bf16),
        buffers=trace.buffers,
        in_flight=in_flight,
        activations=(in_flight - 1) * trace.saved + max(trace.forward_peak, trace.backward_peak),
        reference_activations=trace.reference_peak if job.reference is not None else 0,
        optimizer_temporaries=optimizer_temporaries(job, buffer, max(one.elements for one in trace.parameters)),
    )


def too_large(plan: Plan) -> list[Problem]:
    """A Problem for every stage that would run out of the GPU's memory."""
    job = plan.job
    if job.gpu is None:
        return []
    limit = memory_limit(job.gpu, job.assumed)
    megatron = job.cfg.policy.megatron_cfg
    fixes = []
    if not megatron.activation_checkpointing:
        fixes.append("set policy.megatron_cfg.activation_checkpointing: true")
    if plan.tensor > 1 and not megatron.sequence_parallel:
        fixes.append("set policy.megatron_cfg.sequence_parallel: true")
    if plan.data > 1 and not megatron.optimizer.use_distributed_optimizer:
        fixes.append("set policy.megatron_cfg.optimizer.use_distributed_optimizer: true")
    fixes.append("lower policy.sequence_packing.train_mb_tokens, raise tensor or pipeline parallel, or see --suggest")
    return [
        Problem(
            f"pipeline stage {one.stage}",
            f"{one.peak / GIB:.1f} GiB at the peak",
            f"at most {limit / GIB:.1f} GiB on a {job.gpu.name} ({job.gpu.hbm_bytes / 1e9:.0f} GB less what is reserved)",
            "; or ".join(fixes),
        )
        for one in plan.stages
        if one.peak > limit
    ]
