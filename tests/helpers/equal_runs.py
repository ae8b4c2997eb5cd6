"""Two runs compared: every metric of every step, and the trained weights of every rank."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config, read_metrics, train

TOLERANCE = 1e-5
"""Largest difference, relative to the scale of what is compared, in float32."""
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
EXACT = ("step", "epoch", "train/lr", "train/num_pairs", "train/num_tokens", "train/skipped_steps")
BETA = 0.1  # make_config's


@dataclass
class Piece:
    """Part of a weight, as one rank holds it."""

    name: str
    """Megatron's, of the whole model: layers and experts by their numbers there."""
    shape: tuple[int, ...]
    """Of the whole weight."""
    offset: tuple[int, ...]
    data: torch.Tensor


@dataclass
class Outcome:
    """What a run logged, and every rank's weights after the last step, copies included."""

    metrics: list[dict[str, Any]]
    pieces: list[Piece]

    @functools.cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """Whole weights by name. Raises AssertionError where the ranks leave a part of one out."""
        whole: dict[str, torch.Tensor] = {}
        for piece in self.pieces:
            if piece.name not in whole:
                whole[piece.name] = torch.full(piece.shape, torch.nan)
            _part(whole[piece.name], piece).copy_(piece.data)
        missing = [name for name, weight in whole.items() if weight.isnan().any()]
        assert not missing, f"no rank holds all of {missing}, or it is not a number"
        return whole


@dataclass(frozen=True)
class Difference:
    """The largest one between two runs."""

    relative: float
    where: str


def run(
    folder: Path,
    model: Path,
    world_size: int,
    overrides: Sequence[str],
    *,
    timeout_s: float = 280,
    **sections: dict[str, Any],
) -> Outcome:
    """Three steps with a validation after the second, in real processes. `folder` is made; `sections` are merged into
    the config. Gradient buckets are small, so that a small model has several."""
    folder.mkdir(parents=True)
    dpo = {"sft_loss_weight": 0.1, "val_period": 2, "val_at_end": False, **sections.pop("dpo", {})}
    saving = {"enabled": True, "save_period": 1000}
    config = make_config(folder, model, dpo=dpo, checkpointing=saving, **sections)
    ranks = run_distributed(
        train_in_small_buckets,
        world_size,
        str(config),
        list(overrides),
        init_process_group=False,
        timeout_s=timeout_s,
    )
    assert [code for code, _ in ranks] == [0] * world_size
    return Outcome(read_metrics(folder / "logs"), [piece for _, pieces in ranks for piece in pieces])


def train_in_small_buckets(config: str, overrides: list[str]) -> tuple[int, list[Piece]]:
    """Target for run_distributed(init_process_group=False): the exit code, and this rank's weights where the run would
    have saved them. (Writing a checkpoint takes longer than three steps; tests of resuming do it.)"""
    from megadpo.optimizer import build
    from megadpo.train import saving

    build.DistributedDataParallelConfig = functools.partial(build.DistributedDataParallelConfig, bucket_size=2000)
    kept: list[Piece] = []
    not_written = SimpleNamespace(write=lambda: None, finish=lambda allowed: None)
    saving.begin_save = lambda *_, model, **__: kept.extend(pieces_of(model)) or not_written
    return train(config, overrides), kept


def pieces_of(model: Sequence[Any]) -> Iterator[Piece]:
    """The weights of this rank's chunks, by megatron-core's own description of what is where, and those with adapters as
    they come out."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from megadpo.checkpoint.save import sharded_weights
    from megadpo.lora.attach import TRAINED

    state = {
        chunk: {name: part for name, part in weights.items() if f".{TRAINED}." not in name}
        for chunk, weights in sharded_weights(model, per_layer=True).items()
    }
    apply_factories(state)
    for part in nested_values(state):
        if isinstance(part, ShardedTensor):
            data = part.data.detach().clone().reshape(*[1] * part.prepend_axis_num, *part.data.shape)
            yield Piece(part.key, tuple(part.global_shape), tuple(part.global_offset), data)
    for chunk in model:
        yield from _adapted(chunk)


def _adapted(chunk: torch.nn.Module) -> Iterator[Piece]:
    """The weights of Hugging Face modules with an adapter, scale * B A in them: by itself the product is what three steps
    have changed, and Adam's first steps make of a gradient near 0, which is rounding, as large a change as of any other."""
    from megadpo.lora.attach import adapters_of

    layers = dict(chunk.named_modules())
    for where, adapter in adapters_of(chunk):
        target, cut = adapter.target, adapter.cut
        weight = layers[where.rpartition(".")[0]].get_parameter("weight").detach()
        rectangles = target.rectangles(cut.rank, cut.size)
        for shared in target.adapters:
            a = adapter.get_parameter(adapter.a_name(shared)).detach()
            for module in shared:
                mine = torch.cat([weight[one.shard_index] for one in rectangles if one.source == module])
                b = adapter.get_parameter(adapter.b_name(module)).detach()
                dim = 1 if target.is_row_parallel else 0
                offset = [0, 0]
                offset[dim] = cut.rank * mine.shape[dim]
                shape = (target.out_features(module), target.in_features)
                yield Piece(target.modules[module], shape, tuple(offset), mine + adapter.peft.scale * b @ a)


def _part(whole: torch.Tensor, piece: Piece) -> torch.Tensor:
    sizes = zip(piece.offset, piece.data.shape, strict=True)
    return whole[tuple(slice(start, start + size) for start, size in sizes)]


def largest_difference(got: Outcome, want: Outcome, *, same_tokens: bool = True) -> Difference:
    """The largest relative difference in any metric of any step and in any weight on any rank.

    Relative to the number itself, but: a reward is beta times a difference of logps, near 0 at the start, so its rounding
    is theirs and its scale beta x |logps|; a weight's distance is the 2-norm over what the rank holds, by that part's
    norm. Left out: timing and memory; accuracies of step 1, where every margin is 0 but for the last bit, whose sign decides.
    same_tokens: whether both computed the same tokens (prompts shared, or not, in both). Raises AssertionError where one
    has metrics, steps or weights that the other lacks, and where what must be the same exactly is not.
    """
    assert len(got.metrics) == len(want.metrics)
    found = []
    for mine, theirs in zip(got.metrics, want.metrics, strict=True):
        found += list(_metric_differences(mine, theirs, same_tokens))
    assert got.weights.keys() == want.weights.keys()
    for piece in got.pieces:
        theirs = _part(want.weights[piece.name], piece)
        distance = float((piece.data - theirs).norm() / theirs.norm())
        found.append(Difference(distance, f"{piece.name} after the last step"))
    return max(found, key=lambda one: (one.relative != one.relative, one.relative))  # NaN first


def _metric_differences(mine: dict[str, Any], theirs: dict[str, Any], same_tokens: bool) -> Iterator[Difference]:
    assert _compared(mine) == _compared(theirs)
    for name in _compared(mine):
        if name == "train/num_tokens" and not same_tokens:
            continue
        a, b = mine[name], theirs[name]
        if name in EXACT:
            assert a == b, f"step {mine['step']} {name}: {a!r} instead of {b!r}"
            continue
        if name == "train/rewards/accuracies" and mine["step"] == 1:
            continue
        run_name, _, metric = name.partition("/")
        scale = BETA * abs(theirs[f"{run_name}/logps/chosen"]) if metric in REWARDS else abs(b)
        distance = abs(a - b)
        relative = distance / scale if scale else (0.0 if distance == 0 else float("inf"))
        yield Difference(relative, f"step {mine['step']} {name}: {a!r} instead of {b!r}")


def _compared(record: dict[str, Any]) -> list[str]:
    """context_imbalance says how a pack was cut, and is logged only where it was."""
    left_out = ("timing/", "machine/")
    return sorted(name for name in record if not name.startswith(left_out) and not name.endswith("/context_imbalance"))


def assert_equal_runs(
    got: Outcome, want: Outcome, *, tolerance: float = TOLERANCE, same_tokens: bool = True
) -> Difference:
    """Raises AssertionError that names the largest difference where it is over `tolerance`; returns it else."""
    largest = largest_difference(got, want, same_tokens=same_tokens)
    assert largest.relative <= tolerance, f"{largest.relative:.1e} apart: {largest.where}"
    return largest
