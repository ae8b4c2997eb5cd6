"""An override on the command line wins over another key of the file that says the same thing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megadpo.config.tree import drop, get

_MEG = "policy.megatron_cfg"
_OPT = f"{_MEG}.optimizer"
_SCHED = f"{_MEG}.scheduler"
_CHUNKS = tuple(f"{_MEG}.{name}" for name in ("fused_linear_logprobs_chunk_size", "linear_ce_fusion_chunk_size"))

# key -> other keys with the same meaning
_SAME: dict[str, tuple[str, ...]] = {
    f"{_OPT}.weight_decay": (f"{_SCHED}.start_weight_decay", f"{_SCHED}.end_weight_decay"),
    "policy.max_grad_norm": (f"{_OPT}.clip_grad",),
    "policy.precision": (f"{_MEG}.pipeline_dtype", f"{_OPT}.bf16"),
    "policy.logprob_chunk_size": _CHUNKS,
    "policy.max_total_sequence_length": ("data.max_input_seq_length",),
    "data.train_data_path": ("data.train",),
    "data.train": ("data.train_data_path",),
    "data.val_data_paths": ("data.val_data_path", "data.validation"),
    "data.val_data_path": ("data.val_data_paths", "data.validation"),
    "data.validation": ("data.val_data_paths", "data.val_data_path"),
}


def _above(limit: object, value: object) -> bool:
    return isinstance(limit, (int, float)) and isinstance(value, (int, float)) and value > limit


# key of the file -> whether its value contradicts that of the command line; for other keys: if the values differ
_CLASHES: dict[str, Callable[[Any, Any], bool]] = {
    f"{_OPT}.bf16": lambda precision, bf16: bool(bf16) != (precision == "bfloat16"),
    "data.max_input_seq_length": _above,
}


def drop_contradicted(tree: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Removes from `tree` the values that contradict an override of another key. Returns a note for each."""
    overridden = [one.partition("=")[0].lstrip("+").strip() for one in overrides if not one.startswith("~")]
    notes = []
    for winner, others in _SAME.items():
        if not _overridden(winner, overridden):
            continue
        for other in others:
            mine, theirs = get(tree, winner), get(tree, other)
            if theirs is None or _overridden(other, overridden) or not _clash(tree, winner, other):
                continue
            drop(tree, other)
            notes.append(f"{other}: {theirs!r} of the file gives way to {winner}: {mine!r} of the command line")
    return notes


def _clash(tree: dict[str, Any], winner: str, other: str) -> bool:
    if winner.endswith(".weight_decay") and get(tree, f"{_SCHED}.weight_decay_incr_style", "constant") != "constant":
        return False  # start and end are used, and weight_decay is not
    mine, theirs = get(tree, winner), get(tree, other)
    return _CLASHES[other](mine, theirs) if other in _CLASHES else bool(mine != theirs)


def _overridden(path: str, overridden: list[str]) -> bool:
    """Whether the command line sets `path`, a section around it, or a key in it."""
    return any(one == path or path.startswith(f"{one}.") or one.startswith(f"{path}.") for one in overridden)
