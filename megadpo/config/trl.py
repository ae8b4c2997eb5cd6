"""Translates TRL's form of several losses: lists `loss_type` and `loss_weights` of the same length."""

from __future__ import annotations

from typing import Any

from megadpo.config.problems import Problem
from megadpo.config.tree import drop, get, put

_TYPES, _WEIGHTS, _SFT = "dpo.loss_type", "dpo.loss_weights", "dpo.sft_loss_weight"


def translate_losses(tree: dict[str, Any], problems: list[Problem], notes: list[str]) -> set[str]:
    """Replaces the lists in `tree`, in place. `sft` among them becomes dpo.sft_loss_weight. Returns the keys that a refused
    list would have set."""
    types, weights = get(tree, _TYPES), get(tree, _WEIGHTS)
    if not isinstance(types, list) and not isinstance(weights, list):
        return set()
    names = types if isinstance(types, list) else [types]
    weights = [1.0] * len(names) if weights is None else weights
    if not names or not all(isinstance(name, str) for name in names):
        problems.append(Problem(_TYPES, types, "one or several names of losses", "for example [sigmoid, bco_pair]"))
        return _refused(tree)
    good = isinstance(weights, list) and len(weights) == len(names)
    if not good or not all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in weights):
        expected = f"{len(names)} numbers, one for each of dpo.loss_type"
        problems.append(Problem(_WEIGHTS, weights, expected, "write them in the same order"))
        return _refused(tree)
    total: dict[str, float] = {}
    for name, weight in zip(names, weights, strict=True):
        total[name] = total.get(name, 0.0) + weight
    sft = total.pop("sft", None)
    if sft is not None:
        if get(tree, _SFT) not in (None, 0, sft):
            fix = "take sft out of dpo.loss_type, or set the other to 0"
            problems.append(Problem(_SFT, get(tree, _SFT), f"{sft:g}, the weight of sft in dpo.loss_type", fix))
        put(tree, _SFT, sft)
        notes.append(f"sft in dpo.loss_type: read as {_SFT}: {sft:g}, a mean over pairs; TRL's is one over tokens")
    drop(tree, _WEIGHTS)
    if not total:
        drop(tree, _TYPES)
        put(tree, "dpo.preference_loss_weight", 0.0)
    elif list(total.values()) == [1]:
        put(tree, _TYPES, next(iter(total)))
    else:
        put(tree, _TYPES, "weighted")
        put(tree, _WEIGHTS, total)
    return set()


def _refused(tree: dict[str, Any]) -> set[str]:
    drop(tree, _TYPES)
    drop(tree, _WEIGHTS)
    return {_TYPES, _WEIGHTS}
