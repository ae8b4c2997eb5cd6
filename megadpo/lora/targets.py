"""Finds the linear layers that get adapters: matches the config's names with the weight table. No torch.

A target is one linear layer of megatron-core. It may have several Hugging Face modules (linear_qkv has q_proj, k_proj and
v_proj). Each module has its own B. With Hugging Face's names in the config each has its own A too. With megatron-core's
names all modules of the layer share one A: that is one adapter on the fused matrix, whose B has the modules' rows. Both
kinds are exported to PEFT exactly; a shared A is written once for each module.

A module with several matrices (qkv_proj) counts as several modules of one name: they share an A, and have one B each, which
are joined in PEFT's format.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import groupby

from megadpo.config.architecture import Architecture
from megadpo.config.problems import Problem
from megadpo.config.schema import Config
from megadpo.config.schema_peft import PeftConfig
from megadpo.families import WeightEntry, weight_table
from megadpo.families.layouts import Rectangle

PEFT = "policy.megatron_cfg.peft"
ALL_LINEAR = "all-linear"
_EXPERT = re.compile(r"local_experts\.\d+\.")


@dataclass(frozen=True)
class Target:
    """A linear layer with adapters on it."""

    entry: WeightEntry
    adapters: tuple[tuple[int, ...], ...]
    """Each adapter: the numbers of those modules of `modules` that share its A."""

    @property
    def modules(self) -> tuple[str, ...]:
        """The Hugging Face modules in the layer (model.layers.0.self_attn.q_proj). A module appears once for each of its
        matrices."""
        return _part_modules(self.entry)

    @property
    def is_row_parallel(self) -> bool:
        """Whether tensor parallelism cuts the layer's input, not its output."""
        return self.entry.row.layout.sharded_dim == 1

    @property
    def in_features(self) -> int:
        return self.entry.shapes[0][1]

    def out_features(self, module: int) -> int:
        """Rows of one Hugging Face module."""
        return [part[0] for parts in self.entry.parts for part in parts][module]

    def rectangles(self, rank: int, ranks: int) -> list[Rectangle]:
        """Where the modules' rows lie in this rank's part of the layer; `source` is the module's number."""
        flat = [part for parts in self.entry.parts for part in parts]
        return self.entry.row.layout.rectangles(flat, self.entry.groups, rank, ranks)

    def elements(self, rank: int, ranks: int) -> int:
        """How many parameters the adapters (of LoRA rank `rank`) have on each of the `ranks` processes that share the layer."""
        a = len(self.adapters) * rank * self.in_features
        b = rank * sum(self.out_features(module) for adapter in self.adapters for module in adapter)
        return a // ranks + b if self.is_row_parallel else a + b // ranks

    def label(self, module: int) -> str:
        """The module's last name (q_proj), with a number where several matrices have that name."""
        name = self.modules[module]
        number = f"_{self.modules[:module].count(name)}" if self.modules.count(name) > 1 else ""
        return name.rpartition(".")[2] + number


def hf_modules(entry: WeightEntry) -> tuple[str, ...]:
    return tuple(name.removesuffix(".weight") for name in entry.hf)


def _part_modules(entry: WeightEntry) -> tuple[str, ...]:
    return tuple(module for module, parts in zip(hf_modules(entry), entry.parts, strict=True) for _ in parts)


def megatron_module(entry: WeightEntry) -> str:
    """The layer's name in megatron-core: decoder.layers.0.self_attention.linear_qkv, or
    decoder.layers.0.mlp.experts.local_experts.3.linear_fc1."""
    return entry.names[0].removesuffix(".weight")


def linear_entries(arch: Architecture) -> list[WeightEntry]:
    """The decoder's linear layers that can get adapters, in the model's order: not the embedding, the head or the routers."""
    return [
        entry
        for entry in weight_table(arch).entries
        if entry.layer is not None and entry.row.layout.sharded_dim is not None and entry.names[0].endswith(".weight")
    ]


def find_targets(peft: PeftConfig, arch: Architecture) -> list[Target]:
    """The layers that `peft` selects. Call it only after `lora_problems` returned nothing."""
    wanted, unwanted = _Names(peft.target_modules or ("*",)), _Names(peft.exclude_modules)
    found = []
    for entry in linear_entries(arch):
        modules = _part_modules(entry)
        left = [] if unwanted.has_whole(entry) else [n for n, one in enumerate(modules) if not unwanted.has(one)]
        adapters: list[tuple[int, ...]]
        if wanted.all_linear or not wanted.has_whole(entry):
            named = [n for n in left if wanted.all_linear or wanted.has(modules[n])]
            adapters = [tuple(parts) for _, parts in groupby(named, key=lambda n: modules[n])]
        else:
            adapters = [tuple(left)] if left else []
        if adapters:
            found.append(Target(entry, tuple(adapters)))
    return found


def unlike_experts(targets: Sequence[Target], entries: Sequence[WeightEntry]) -> str | None:
    """What a config would have to name, if some experts of a layer have other adapters than the rest. (In checkpoints a layer's
    experts are one tensor, which must be whole, and grouped experts are one layer.) entries: all of `linear_entries`."""
    adapters = {megatron_module(target.entry): target.adapters for target in targets}
    of_first: dict[str, tuple[tuple[int, ...], ...]] = {}
    for entry in entries:
        name = megatron_module(entry)
        mine = adapters.get(name, ())
        if of_first.setdefault(_EXPERT.sub("", name), mine) != mine:
            expert = hf_modules(entry)[0].rpartition(".")[0]
            return f"the same adapters on all experts of a layer, or none; {expert} has others than experts.0"
    return None


def lora_problems(cfg: Config, arch: Architecture) -> list[Problem]:
    """The errors in `policy.megatron_cfg.peft` for a model of this architecture."""
    peft = cfg.policy.megatron_cfg.peft
    if not peft.enabled:
        return []
    entries = linear_entries(arch)
    problems = []
    for field in ("target_modules", "exclude_modules"):
        for name in getattr(peft, field):
            if name != ALL_LINEAR and not any(_Names((name,)).has_some(entry) for entry in entries):
                problems.append(_nothing(f"{PEFT}.{field}", name, entries))
    problems += _named_twice(peft, entries)
    targets = find_targets(peft, arch)
    problems += [*_in_stacks(peft, targets), *_unlike_experts(peft, targets, entries, arch)]
    if not targets and not problems:
        fix = "name fewer in exclude_modules, or more in target_modules"
        problems.append(Problem(f"{PEFT}.exclude_modules", list(peft.exclude_modules), "a layer that is left", fix))
    return [*problems, *_too_wide(peft, targets)]


class _Names:
    """The names in a config's list. A name without wildcards (`*`, `?`, `[`) matches the end of a path (q_proj,
    self_attn.q_proj); a name with wildcards must match the whole path."""

    def __init__(self, names: Sequence[str]) -> None:
        self.all_linear = ALL_LINEAR in names
        self.plain = {name for name in names if not any(character in name for character in "*?[")}
        self.wild = [name for name in names if name not in self.plain]

    def has(self, path: str) -> bool:
        parts = path.split(".")
        ends = (".".join(parts[first:]) for first in range(len(parts)))
        return any(end in self.plain for end in ends) or any(fnmatchcase(path, name) for name in self.wild)

    def has_whole(self, entry: WeightEntry) -> bool:
        """Whether the megatron-core layer is named. An expert's layer may also be named without its number, as in NeMo RL."""
        name = megatron_module(entry)
        return self.has(name) or (entry.expert is not None and self.has(_EXPERT.sub("", name)))

    def has_some(self, entry: WeightEntry) -> bool:
        return self.has_whole(entry) or any(map(self.has, hf_modules(entry)))


def _nothing(field: str, name: str, entries: Sequence[WeightEntry]) -> Problem:
    known = dict.fromkeys(megatron_module(entry).rpartition(".")[2] for entry in entries)
    known |= dict.fromkeys(module.rpartition(".")[2] for entry in entries for module in hf_modules(entry))
    near = difflib.get_close_matches(name.rpartition(".")[2], list(known), n=1, cutoff=0.4)
    fix = f"did you mean {near[0]}?" if near else f"name some of {', '.join(known)}, or {ALL_LINEAR}"
    return Problem(field, name, f"a linear layer of the decoder: {', '.join(known)}, or {ALL_LINEAR}", fix)


def _named_twice(peft: PeftConfig, entries: Sequence[WeightEntry]) -> Iterator[Problem]:
    """The error for a layer named in both ways. A wildcard that matches both (`*`) is no error: it means the whole layer."""
    names = _Names(peft.target_modules)
    names.wild = []
    for entry in entries:
        modules = [module for module in hf_modules(entry) if names.has(module)]
        if names.has_whole(entry) and (modules or names.all_linear):
            expected = "a layer by megatron-core's name (one A for all in it) or by Hugging Face's (an A for each)"
            other = ", ".join(module.rpartition(".")[2] for module in modules) or ALL_LINEAR
            fix = f"keep one of {megatron_module(entry).rpartition('.')[2]} and {other}"
            yield Problem(f"{PEFT}.target_modules", list(peft.target_modules), expected, fix)
            return


def _in_stacks(peft: PeftConfig, targets: Sequence[Target]) -> Iterator[Problem]:
    """The error for experts whose Hugging Face model keeps them in one tensor: PEFT has no module names for them."""
    stacked = dict.fromkeys(
        "experts." + megatron_module(one.entry).rpartition(".")[2] for one in targets if one.entry.stack_name
    )
    if stacked:
        expected = "layers that are modules of the Hugging Face model; its experts are one tensor for all"
        fix = f"set {PEFT}.exclude_modules: [{', '.join(stacked)}]"
        yield Problem(f"{PEFT}.target_modules", list(peft.target_modules), expected, fix)


def _unlike_experts(
    peft: PeftConfig, targets: Sequence[Target], entries: Sequence[WeightEntry], arch: Architecture
) -> Iterator[Problem]:
    expected = unlike_experts(targets, entries)
    if expected is not None:
        whole = find_targets(dataclasses.replace(peft, exclude_modules=()), arch)
        field = "target_modules" if unlike_experts(whole, entries) else "exclude_modules"
        fix = "name layers without the number of an expert (such as experts.linear_fc1, experts.linear_fc2)"
        yield Problem(f"{PEFT}.{field}", list(getattr(peft, field)), expected, fix)


def _too_wide(peft: PeftConfig, targets: Sequence[Target]) -> Iterator[Problem]:
    widths = {}
    for target in targets:
        for adapter in target.adapters:
            rows = sum(target.out_features(module) for module in adapter)
            widths[" and ".join(map(target.label, adapter))] = min(target.in_features, rows)
    narrow = min(widths, key=lambda one: widths[one], default=None)
    if narrow is not None and widths[narrow] < peft.dim:
        expected = f"at most {widths[narrow]}, the smaller side of {narrow}: a higher rank is the whole matrix"
        yield Problem(f"{PEFT}.dim", peft.dim, expected, f"set it to {widths[narrow]} or less, or leave {narrow} out")
