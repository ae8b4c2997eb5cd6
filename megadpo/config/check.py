"""Checks of a layout against the model's shape and the number of processes: everything that needs no weights."""

from __future__ import annotations

from collections.abc import Iterator

from megadpo.config.architecture import Architecture
from megadpo.config.check_moe import expert_problems, expert_world_problems
from megadpo.config.known import Known
from megadpo.config.problems import Problem
from megadpo.config.schema import Config
from megadpo.config.variants import variant_problems

_MEG = "policy.megatron_cfg"
_LARGEST_TP = 64


def model_parallel_size(cfg: Config) -> int:
    """Processes that hold one copy of the model: tp x pp x cp."""
    megatron = cfg.policy.megatron_cfg
    return megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size * megatron.context_parallel_size


def data_parallel_size(cfg: Config, world_size: int) -> int:
    """Copies of the model in the world: world_size / (tp x pp x cp), rounded down."""
    return world_size // model_parallel_size(cfg)


def stated_world_size(cfg: Config) -> int | None:
    """Processes that the `cluster` section speaks of; None where it doesn't."""
    if cfg.cluster.gpus_per_node is None or cfg.cluster.num_nodes is None:
        return None
    return cfg.cluster.gpus_per_node * cfg.cluster.num_nodes


def layers_per_stage(cfg: Config, num_layers: int) -> list[int] | None:
    """Layers of each pipeline stage, first to last; None where they can't be divided so."""
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


def micro_batch_multiple(cfg: Config) -> int:
    """What the micro-batches of a data-parallel rank must be a multiple of: with a virtual pipeline, its stages."""
    megatron = cfg.policy.megatron_cfg
    return megatron.pipeline_model_parallel_size if megatron.virtual_pipeline_model_parallel_size > 1 else 1


def check_layout(cfg: Config, arch: Architecture | None, world_size: int | None) -> list[Problem]:
    """Every problem of running `cfg` on a model of shape `arch` in `world_size` processes.

    What is None is not checked. Empty list: the layout is possible.
    """
    problems: list[Problem] = []
    if arch is not None:
        problems += _tensor_parallel(cfg, arch)
        problems += expert_problems(cfg, arch)
        problems += variant_problems(Known(cfg=cfg, arch=arch))
        problems += _pipeline_parallel(cfg, arch)
        problems += _virtual_pipeline(cfg, arch)
        problems += _uniform_recomputation(cfg, arch)
        problems += _sequence_length(cfg, arch)
    if world_size is not None:
        problems += _world(cfg, world_size)
        problems += expert_world_problems(cfg, world_size)
    return problems


def _tensor_parallel(cfg: Config, arch: Architecture) -> Iterator[Problem]:
    where = f"{_MEG}.tensor_model_parallel_size"
    tp = cfg.policy.megatron_cfg.tensor_model_parallel_size
    # what the tensor-parallel ranks cut of a layer of experts is its shared expert; the others: check_moe.py
    dense_channels = arch.ffn_hidden_size if arch.moe is None else arch.moe.shared_ffn_hidden_size or 0
    divided = {
        "attention heads": arch.num_heads,
        "key-value heads": arch.num_kv_heads,
        "MLP channels (intermediate_size)": dense_channels,
        "vocabulary entries (vocab_size)": arch.vocab_size,
    }
    possible = [n for n in range(1, _LARGEST_TP + 1) if not any(count % n for count in divided.values())]
    fix = f"set it to {' or '.join(map(str, possible))}"
    for what, count in divided.items():
        if count % tp:
            yield Problem(where, tp, f"a divisor of the model's {count} {what}", fix)


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
    """Chunks of a stage are of equal size, an uneven first or last stage's too (megatron-core's rule)."""
    stages, chunks = (
        layers_per_stage(cfg, arch.num_layers),
        cfg.policy.megatron_cfg.virtual_pipeline_model_parallel_size,
    )
    if stages is None or all(layers % chunks == 0 for layers in stages):
        return
    possible = [n for n in range(1, min(stages) + 1) if not any(layers % n for layers in stages)]
    where = f"{_MEG}.virtual_pipeline_model_parallel_size"
    expected = f"a divisor of the layers of every pipeline stage, here {_sum(stages)}"
    yield Problem(
        where, chunks, expected, f"set it to {' or '.join(map(str, possible))}, or divide the layers otherwise"
    )


def _uniform_recomputation(cfg: Config, arch: Architecture) -> Iterator[Problem]:
    """megatron-core goes past the end of a chunk whose layers don't divide (transformer_block.py, `uniform`)."""
    megatron, stages = cfg.policy.megatron_cfg, layers_per_stage(cfg, arch.num_layers)
    size, full = megatron.recompute_num_layers, megatron.recompute_granularity == "full"
    if not megatron.activation_checkpointing or not full or megatron.recompute_method != "uniform" or stages is None:
        return
    per_stage = megatron.virtual_pipeline_model_parallel_size
    if any(layers % per_stage for layers in stages):  # another problem's
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
    if arch.sliding_window is not None and longest > arch.sliding_window:
        window = arch.sliding_window
        expected = f"at most {window}, the model's sliding_window, since attention here sees every earlier token"
        yield Problem(where, longest, expected, f"set it to {window} or less")


def _world(cfg: Config, world_size: int) -> Iterator[Problem]:
    cluster, shards = cfg.cluster, model_parallel_size(cfg)
    told = stated_world_size(cfg)
    if told is not None and told != world_size:
        fix = f"start {told} processes, or remove the cluster section: torchrun decides"
        shown = f"{cluster.num_nodes} x {cluster.gpus_per_node}"
        yield Problem("cluster.num_nodes x gpus_per_node", shown, f"{world_size}, the processes started", fix)
    if world_size % shards:
        megatron = cfg.policy.megatron_cfg
        shown = f"{megatron.tensor_model_parallel_size} x {megatron.pipeline_model_parallel_size}"
        expected = f"a product that divides the {world_size} processes started"
        fix = f"start a multiple of {shards} processes (torchrun --nproc-per-node), or lower one of them"
        where = f"{_MEG}.tensor_model_parallel_size x pipeline_model_parallel_size"
        if megatron.context_parallel_size > 1:
            shown, where = f"{shown} x {megatron.context_parallel_size}", f"{where} x context_parallel_size"
        yield Problem(where, shown, expected, fix)
        return
    dp, pairs = world_size // shards, cfg.policy.train_global_batch_size
    where = "policy.train_global_batch_size"
    if pairs < dp:
        expected = f"at least {dp} pairs, one for each data-parallel rank"
        yield Problem(where, pairs, expected, f"raise it to a multiple of {dp}, or start fewer processes")
    elif not cfg.policy.sequence_packing.enabled:
        micro = cfg.policy.train_micro_batch_size
        if pairs % (micro * dp):
            expected = f"a multiple of {micro * dp}, train_micro_batch_size ({micro}) x data-parallel ranks ({dp})"
            fix = "change it, or set policy.sequence_packing.enabled: true, which needs no such multiple"
            yield Problem(where, pairs, expected, fix)
        elif pairs // (micro * dp) % micro_batch_multiple(cfg):
            count, stages = pairs // (micro * dp), micro_batch_multiple(cfg)
            expected = (
                f"a multiple of {micro * dp * stages}: with a virtual pipeline each data-parallel rank's micro-batches "
                f"(here {count}) are a multiple of the pipeline stages ({stages})"
            )
            fix = "change it, or set policy.sequence_packing.enabled: true, which divides the pairs as needed"
            yield Problem(where, pairs, expected, fix)
