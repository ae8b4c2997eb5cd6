"""Freezes weights: by `policy.freeze`, patterns of Hugging Face names, and by `freeze_moe_router`.

A frozen weight has requires_grad False; all other code asks for that."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from megatron.core.transformer.moe.router import TopKRouter

from megadpo.config.architecture import Architecture
from megadpo.config.problems import Problem
from megadpo.families import WeightEntry, WeightTable, weight_table
from megadpo.model.weights.load import named_global_parameters

FIELD = "policy.freeze"
_MOST_PATTERNS = 10_000
"""Limit on the patterns that one text of the config expands to. The largest models have a few hundred layers."""
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def freeze(chunks: Sequence[torch.nn.Module], patterns: Sequence[str], arch: Architecture) -> None:
    """Freeze every parameter of this rank's chunks that `patterns` name. Call it before gradients are allocated.
    `freeze_problems` must have found nothing. Collectives: none."""
    if not patterns:
        return
    table = weight_table(arch)
    names = {name for pattern in patterns for name in _matched(pattern, table)}
    for chunk in chunks:
        for name, parameter in named_global_parameters(chunk):
            # The last stage's copy of tied embeddings has the embedding's Hugging Face name too.
            if table.by_name[name].hf[0] in names:
                parameter.requires_grad_(False)


def freeze_routers(chunk: torch.nn.Module) -> None:
    """Freeze the weights of routers."""
    for module in chunk.modules():
        if isinstance(module, TopKRouter):
            module.requires_grad_(False)


def freeze_problems(patterns: Sequence[str], arch: Architecture) -> list[Problem]:
    """Why `patterns` can't be used on a model of this shape; empty if they can."""
    if not patterns:
        return []
    too_many = [pattern for pattern in patterns if count(pattern) > _MOST_PATTERNS]
    if too_many:
        expected, fix = f"ranges that stand for at most {_MOST_PATTERNS} patterns", "name layers that the model has"
        return [Problem(FIELD, pattern, expected, fix) for pattern in too_many]
    table = weight_table(arch)
    matched = {pattern: _matched(pattern, table) for pattern in patterns}
    problems = [_nothing(pattern, arch, table) for pattern, names in matched.items() if not names]
    frozen = {name for names in matched.values() for name in names}
    shown = ", ".join(patterns)
    problems += [Problem(FIELD, shown, *words) for words in _torn(frozen, table)]
    if frozen == set(table.hf_shapes):
        fix = "leave something to train, or use megadpo evaluate"
        problems.append(Problem(FIELD, shown, "patterns that leave a weight to train; these freeze all of them", fix))
    return problems


def count(pattern: str) -> int:
    """About how many patterns `expand` would give. A number of more than 9 digits counts as 10**9."""
    sizes = [
        10**9 if max(map(len, ends)) > 9 else max(0, int(ends[1]) - int(ends[0]) + 1)
        for ends in _RANGE.findall(pattern)
    ]
    return math.prod(sizes)


def expand(pattern: str) -> list[str]:
    """The shell patterns that `pattern` means. `{4..7}` is each whole number from 4 to 7, as in bash."""
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    numbers = range(int(found[1]), int(found[2]) + 1)
    return [one for n in numbers for one in expand(f"{pattern[: found.start()]}{n}{pattern[found.end() :]}")]


def _matched(pattern: str, table: WeightTable) -> set[str]:
    return {name for one in expand(pattern) for name in table.hf_shapes if fnmatchcase(name, one)}


def _nothing(pattern: str, arch: Architecture, table: WeightTable) -> Problem:
    if arch.tie_word_embeddings and any(fnmatchcase("lm_head.weight", one) for one in expand(pattern)):
        expected = "model.embed_tokens.weight, which is this model's output layer as well (tied embeddings)"
        return Problem(FIELD, pattern, expected, "name that, or remove the pattern")
    expected = f"a pattern that matches a weight's Hugging Face name, such as {next(reversed(table.hf_shapes))}"
    last = arch.num_layers - 1
    fix = (
        f"see model.safetensors; layers are model.layers.0 to {last}: model.layers.{{0..{last}}}.* matches all of them"
    )
    return Problem(FIELD, pattern, expected, fix)


def _torn(frozen: set[str], table: WeightTable) -> Iterator[tuple[str, str]]:
    """(expected, fix) for each kind of parameter that `frozen` has only a part of. Parameters can only be frozen whole."""
    seen = set()
    for entry in table.entries:
        kind = entry.row.megatron
        part = [name for name in entry.hf if name in frozen]
        if part and kind not in seen and (missing := [name for name in entry.hf if name not in frozen]):
            seen.add(kind)
            expected = f"{' and '.join(missing)} with {' and '.join(part)}: they are one parameter here ({kind})"
            yield expected, "name all of them or none"
        bias = _bias_of(entry, table)
        if len(part) == len(entry.hf) and bias is not None and kind not in seen and not frozen & set(bias.hf):
            seen.add(kind)
            expected = (
                f"{' and '.join(bias.hf)} frozen with their weights: megatron-core gives a bias no gradient alone"
            )
            yield expected, "name the biases too, or train the weights as well"
    yield from _torn_experts(frozen, table)


def _torn_experts(frozen: set[str], table: WeightTable) -> Iterator[tuple[str, str]]:
    """The same for layers of which only some experts are frozen: in checkpoints the optimizer state of a layer's experts is one
    tensor, and megatron-core refuses to save it with missing parts."""
    experts: dict[tuple[str, int | None], list[WeightEntry]] = {}
    for entry in table.entries:
        if entry.expert is not None:
            experts.setdefault((entry.row.megatron, entry.layer), []).append(entry)
    for entries in experts.values():
        left = [entry.expert for entry in entries if not frozen & set(entry.hf)]
        if 0 < len(left) < len(entries):
            kind = entries[0].hf[0].replace("experts.0.", "experts.{e}.")
            expected = f"all experts of a layer or none; {kind} leaves {', '.join(map(str, left))} to train"
            yield expected, "name every expert of the layer (experts.*), or freeze other weights"
            return  # once: other layers and projections mostly have the same problem


def _bias_of(entry: WeightEntry, table: WeightTable) -> WeightEntry | None:
    name = entry.names[0]
    return table.by_name.get(name.removesuffix("weight") + "bias") if name.endswith(".weight") else None
