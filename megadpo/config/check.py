"""Rules of layouts: the grid of ranks must fit the model's shape and the number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megadpo.config.architecture import Architecture, Layer
from megadpo.config.grid import Grid
from megadpo.config.known import Known, find_problems, rule
from megadpo.config.problems import Problem
from megadpo.config.schema import Config
from megadpo.config.schema_megatron import MegatronConfig

_MEG = "policy.megatron_cfg"
_OPT = f"{_MEG}.optimizer"
_DDP = f"{_MEG}.distributed_data_parallel_config"
_LARGEST_TP = 64


def stated_world_size(cfg: Config) -> int | None:
    """Processes by the `cluster` section; None if it doesn't say."""
    if cfg.cluster.gpus_per_node is None or cfg.cluster.num_nodes is None:
        return None
    return cfg.cluster.gpus_per_node * cfg.cluster.num_nodes


def layers_per_stage(cfg: Config, num_layers: int) -> list[int] | None:
    """Layers of each pipeline stage, first to last; None if they can't be divided like this."""
    megatron = cfg.policy.megatron_cfg
    stages = megatron.pipeline_model_parallel_size
    first, last = megatron.num_layers_in_first_pipeline_stage, megatron.num_layers_in_last_pipeline_stage
    if stages == 1:
        return [num_layers]
    ends = [] if first is None else [first], [] if last is None else [last]
    inner_stages = stages - len(ends[0]) - len(ends[1])
    inner_layers = num_layers - sum(ends[0]) - sum(ends[1])
    if inner_stages == 0:
        each, rest = 0, inner_layers
    else:
        each, rest = divmod(inner_layers, inner_stages)
        if each < 1:
            return None
    if rest:
        return None
    return [*ends[0], *([each] * inner_stages), *ends[1]]


def chunk_layers(cfg: Config, arch: Architecture) -> list[list[tuple[Layer, ...]]]:
    """[stage][chunk] -> layers, for a layout that was checked."""
    counts = layers_per_stage(cfg, arch.num_layers)
    assert counts is not None, "check_layout accepts only layers that can be divided"
    chunks, first = cfg.policy.megatron_cfg.virtual_pipeline_model_parallel_size, 0
    stages: list[list[tuple[Layer, ...]]] = [[] for _ in counts]
    for _ in range(chunks):
        for stage, count in zip(stages, counts, strict=True):
            stage.append(arch.layers[first : first + count // chunks])
            first += count // chunks
    return stages


def micro_batch_multiple(cfg: Config) -> int:
    """The number of micro-batches of a data-parallel rank is a multiple of this: with a virtual pipeline, of its stages."""
    megatron = cfg.policy.megatron_cfg
    return megatron.pipeline_model_parallel_size if megatron.virtual_pipeline_model_parallel_size > 1 else 1


def check_layout(cfg: Config, arch: Architecture | None, world_size: int | None) -> list[Problem]:
    """Every problem of running `cfg` on a model of shape `arch` in `world_size` processes. What is None is not checked."""
    return find_problems(Known(cfg=cfg, arch=arch, world_size=world_size))


@rule
def _shares_of_a_pack(known: Known) -> Iterator[Problem]:
    megatron, multiple = known.cfg.policy.megatron_cfg, known.cfg.policy.make_sequence_length_divisible_by
    tp, cp = megatron.tensor_model_parallel_size, megatron.context_parallel_size
    if megatron.sequence_parallel and tp == 1:
        fix = f"set it to false, or raise {_MEG}.tensor_model_parallel_size"
        yield Problem(f"{_MEG}.sequence_parallel", True, "false with tensor_model_parallel_size 1", fix)
    shares = {"context_parallel_size": cp, "tensor_model_parallel_size": tp if megatron.sequence_parallel else 1}
    needed = math.prod(shares.values())
    if multiple % needed:
        where = "policy.make_sequence_length_divisible_by"
        named = " x ".join(f"{name} ({count})" for name, count in shares.items() if count > 1)
        expected = f"a multiple of {named}: each of these ranks holds as many tokens of a pack"
        yield Problem(where, multiple, expected, f"remove it, or set it to {needed}")


@rule
def _smallest_pack(known: Known) -> Iterator[Problem]:
    packing, multiple = known.cfg.policy.sequence_packing, known.cfg.policy.make_sequence_length_divisible_by
    if packing.enabled and packing.train_mb_tokens < multiple:
        where = "policy.sequence_packing.train_mb_tokens"
        expected = f"at least {multiple}, policy.make_sequence_length_divisible_by, to which packs are padded"
        yield Problem(where, packing.train_mb_tokens, expected, f"raise it to {multiple} or more")


@rule
def _pipeline_stages(known: Known) -> Iterator[Problem]:
    megatron = known.cfg.policy.megatron_cfg
    if megatron.pipeline_model_parallel_size > 1:
        yield from _two_uneven_stages(megatron)
        return
    if megatron.virtual_pipeline_model_parallel_size > 1:
        where = f"{_MEG}.virtual_pipeline_model_parallel_size"
        fix = f"set it to 1, or raise {_MEG}.pipeline_model_parallel_size"
        yield Problem(
            where, megatron.virtual_pipeline_model_parallel_size, "1 with pipeline_model_parallel_size 1", fix
        )
    for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        value = getattr(megatron, name)
        if value is not None:
            fix = f"set it to null, or raise {_MEG}.pipeline_model_parallel_size"
            yield Problem(f"{_MEG}.{name}", value, "null with pipeline_model_parallel_size 1", fix)


def _two_uneven_stages(megatron: MegatronConfig) -> Iterator[Problem]:
    """megatron-core would divide by the number of inner stages, which is 0 (transformer_layer.py,
    get_transformer_layer_offset)."""
    first, last = megatron.num_layers_in_first_pipeline_stage, megatron.num_layers_in_last_pipeline_stage
    virtual = megatron.virtual_pipeline_model_parallel_size > 1
    if virtual and megatron.pipeline_model_parallel_size == 2 and first is not None and last is not None:
        expected = (
            "null with two stages and a virtual pipeline: the layers that the first stage leaves are the last one's"
        )
        yield Problem(f"{_MEG}.num_layers_in_last_pipeline_stage", last, expected, "set it to null")


@rule
def _recomputation(known: Known) -> Iterator[Problem]:
    """Refuses options without effect under the granularity. megatron-core refuses the numbers too
    (transformer_config.py:1180)."""
    megatron, usual = known.cfg.policy.megatron_cfg, MegatronConfig()
    if not megatron.activation_checkpointing:
        return
    if megatron.recompute_granularity == "selective" and not megatron.recompute_modules:
        fix = f"name a module, such as core_attn, or set {_MEG}.activation_checkpointing: false"
        yield Problem(f"{_MEG}.recompute_modules", [], "at least one module, with activation_checkpointing true", fix)
    unused = {"selective": ("recompute_method", "recompute_num_layers"), "full": ("recompute_modules",)}
    for name in unused[megatron.recompute_granularity]:
        value, default = getattr(megatron, name), getattr(usual, name)
        if value != default:
            other = "full" if megatron.recompute_granularity == "selective" else "selective"
            expected = (
                f"{default!r}, the default: recompute_granularity {megatron.recompute_granularity} has no use for it"
            )
            yield Problem(f"{_MEG}.{name}", value, expected, f"remove it, or set {_MEG}.recompute_granularity: {other}")


@rule
def _overlap(known: Known) -> Iterator[Problem]:
    ddp = known.cfg.policy.megatron_cfg.distributed_data_parallel_config
    if not ddp.overlap_param_gather:
        return
    for needed, there in (
        (f"{_OPT}.use_distributed_optimizer", known.cfg.policy.megatron_cfg.optimizer.use_distributed_optimizer),
        (f"{_DDP}.overlap_grad_reduce", ddp.overlap_grad_reduce),
    ):
        if not there:
            fix = f"set it to false, or {needed}: true"
            yield Problem(f"{_DDP}.overlap_param_gather", True, f"false unless {needed} is true", fix)


@rule
def _fits_the_model(known: Known) -> Iterator[Problem]:
    if known.arch is not None:
        for part in (
            _tensor_parallel,
            _context_parallel,
            _pipeline_parallel,
            _virtual_pipeline,
            _uniform_recomputation,
            _sequence_length,
        ):
            yield from part(known.cfg, known.arch)


def _tensor_parallel(cfg: Config, arch: Architecture) -> Iterator[Problem]:
    where = f"{_MEG}.tensor_model_parallel_size"
    tp = cfg.policy.megatron_cfg.tensor_model_parallel_size
    # in a layer with experts, tensor parallelism cuts the shared expert; check_moe.py has rules for the others
    dense, shared = 0 if arch.mlp is None else arch.mlp.ffn_size, arch.experts and arch.experts.shared_ffn_size
    divided = {
        "attention heads": arch.attention.num_heads,
        "key-value heads": arch.attention.num_kv_heads,
        "key heads of linear attention": 0 if arch.delta_net is None else arch.delta_net.key_heads,
        "MLP channels (intermediate_size)": dense,
        "channels of the shared expert": shared or 0,
        "vocabulary entries (vocab_size)": arch.vocab_size,
    }
    possible = [n for n in range(1, _LARGEST_TP + 1) if not any(count % n for count in divided.values())]
    fix = f"set it to {' or '.join(map(str, possible))}"
    for what, count in divided.items():
        if count % tp:
            yield Problem(where, tp, f"a divisor of the model's {count} {what}", fix)


def _context_parallel(cfg: Config, arch: Architecture) -> Iterator[Problem]:
    size = cfg.policy.megatron_cfg.context_parallel_size
    if size > 1 and arch.delta_net is not None:
        expected = (
            f"1 for {arch.hf_class}: its linear attention goes through a text from token to token, "
            "and a rank would wait for the ranks with the tokens before"
        )
        yield Problem(
            f"{_MEG}.context_parallel_size", size, expected, "set it to 1; tensor parallelism cuts these layers"
        )


def _pipeline_parallel(cfg: Config, arch: Architecture) -> Iterator[Problem]:
    if layers_per_stage(cfg, arch.num_layers) is not None:
        return
    megatron, layers = cfg.policy.megatron_cfg, arch.num_layers
    first, last = megatron.num_layers_in_first_pipeline_stage, megatron.num_layers_in_last_pipeline_stage
    even = [n for n in range(1, layers + 1) if layers % n == 0]
    where = f"{_MEG}.pipeline_model_parallel_size"
    if first is None and last is None:
        expected = f"a divisor of the model's {layers} layers"
    else:
        expected = (
            f"stages that share the {layers} layers evenly after num_layers_in_first_pipeline_stage "
            f"({first}) and num_layers_in_last_pipeline_stage ({last}) are taken off"
        )
    fix = f"set it to one of {', '.join(map(str, even))}, or choose other counts for the first and last stage"
    yield Problem(where, megatron.pipeline_model_parallel_size, expected, fix)


def _virtual_pipeline(cfg: Config, arch: Architecture) -> Iterator[Problem]:
    """All chunks of a stage have equal size, also those of an uneven first or last stage (megatron-core's rule)."""
    stages = layers_per_stage(cfg, arch.num_layers)
    chunks = cfg.policy.megatron_cfg.virtual_pipeline_model_parallel_size
    if stages is None or all(layers % chunks == 0 for layers in stages):
        return
    possible = [n for n in range(1, min(stages) + 1) if not any(layers % n for layers in stages)]
    where = f"{_MEG}.virtual_pipeline_model_parallel_size"
    expected = f"a divisor of the layers of every pipeline stage, here {_sum(stages)}"
    yield Problem(
        where, chunks, expected, f"set it to {' or '.join(map(str, possible))}, or divide the layers otherwise"
    )


def _uniform_recomputation(cfg: Config, arch: Architecture) -> Iterator[Problem]:
    """If the groups don't divide a chunk's layers, megatron-core reads past its end (transformer_block.py, `uniform`)."""
    megatron, stages = cfg.policy.megatron_cfg, layers_per_stage(cfg, arch.num_layers)
    size, full = megatron.recompute_num_layers, megatron.recompute_granularity == "full"
    if not megatron.activation_checkpointing or not full or megatron.recompute_method != "uniform" or stages is None:
        return
    per_stage = megatron.virtual_pipeline_model_parallel_size
    if any(layers % per_stage for layers in stages):  # _virtual_pipeline reports it
        return
    chunks = [layers // per_stage for layers in stages]
    if any(layers % size for layers in chunks):
        possible = [n for n in range(1, min(chunks) + 1) if not any(layers % n for layers in chunks)]
        each = "chunk of a pipeline stage" if per_stage > 1 else "pipeline stage"
        expected = f"with recompute_method uniform a divisor of the layers of every {each}, here {_sum(chunks)}"
        fix = f"set it to {' or '.join(map(str, possible))}, or recompute_method: block"
        yield Problem(f"{_MEG}.recompute_num_layers", size, expected, fix)


def _sum(counts: list[int]) -> str:
    return " + ".join(map(str, counts))


def _sequence_length(cfg: Config, arch: Architecture) -> Iterator[Problem]:
    where, longest = "policy.max_total_sequence_length", cfg.policy.max_total_sequence_length
    if longest > arch.max_position_embeddings:
        limit = arch.max_position_embeddings
        expected = f"at most {limit}, the model's max_position_embeddings"
        yield Problem(where, longest, expected, f"set it to {limit} or less")
    limits = [
        one.rotary.longest for one in arch.attentions if one.rotary is not None and one.rotary.longest is not None
    ]
    if limits and longest > min(limits):
        expected = (
            f"at most {min(limits)}: in a batch with a longer text the model's longrope rotates every text differently"
        )
        yield Problem(where, longest, expected, f"set it to {min(limits)} or less")


@rule
def _fits_the_world(known: Known) -> Iterator[Problem]:
    if known.world_size is None:
        return
    cfg, world_size = known.cfg, known.world_size
    yield from _stated_world(cfg, world_size)
    shards = Grid.of(cfg).model_ranks
    if world_size % shards:
        yield _undivided_world(cfg, world_size)
    else:
        yield from _global_batch(cfg, world_size // shards)


def _stated_world(cfg: Config, world_size: int) -> Iterator[Problem]:
    told = stated_world_size(cfg)
    if told is not None and told != world_size:
        fix = f"start {told} processes, or remove the cluster section: torchrun decides"
        shown = f"{cfg.cluster.num_nodes} x {cfg.cluster.gpus_per_node}"
        yield Problem("cluster.num_nodes x gpus_per_node", shown, f"{world_size}, the processes started", fix)


def _undivided_world(cfg: Config, world_size: int) -> Problem:
    megatron = cfg.policy.megatron_cfg
    names = ["tensor_model_parallel_size", "pipeline_model_parallel_size"]
    names += ["context_parallel_size"] if megatron.context_parallel_size > 1 else []
    shown = " x ".join(str(getattr(megatron, name)) for name in names)
    expected = f"a product that divides the {world_size} processes started"
    fix = f"start a multiple of {Grid.of(cfg).model_ranks} processes (--nproc-per-node), or lower one of them"
    return Problem(f"{_MEG}.{' x '.join(names)}", shown, expected, fix)


def _global_batch(cfg: Config, dp: int) -> Iterator[Problem]:
    """dp: data-parallel ranks."""
    where, pairs = "policy.train_global_batch_size", cfg.policy.train_global_batch_size
    micro, stages = cfg.policy.train_micro_batch_size, micro_batch_multiple(cfg)
    if pairs < dp:
        expected = f"at least {dp} pairs, one for each data-parallel rank"
        yield Problem(where, pairs, expected, f"raise it to a multiple of {dp}, or start fewer processes")
    elif cfg.policy.sequence_packing.enabled:
        return
    elif pairs % (micro * dp):
        expected = f"a multiple of {micro * dp}, train_micro_batch_size ({micro}) x data-parallel ranks ({dp})"
        fix = "change it, or set policy.sequence_packing.enabled: true, which needs no such multiple"
        yield Problem(where, pairs, expected, fix)
    elif pairs // (micro * dp) % stages:
        expected = (
            f"a multiple of {micro * dp * stages}: with a virtual pipeline each data-parallel rank's micro-batches "
            f"(here {pairs // (micro * dp)}) are a multiple of the pipeline stages ({stages})"
        )
        fix = "change it, or set policy.sequence_packing.enabled: true, which divides the pairs as needed"
        yield Problem(where, pairs, expected, fix)
