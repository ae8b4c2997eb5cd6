"""Which linear layers get adapters: the names of a config, matched against the weight table. No torch.

A target is one linear layer of megatron-core, in which several Hugging Face modules may lie (q_proj, k_proj and v_proj in
linear_qkv). Each of those modules has a B of its own. Named by Hugging Face's names each has an A of its own too; named by
megatron-core's, all modules of the layer share one A, which is one adapter on the fused matrix: its B is theirs, one below
the other. So both kinds export to PEFT exactly, a shared A being written once for each module.

A module that is itself several matrices one below the other (qkv_proj) counts here as so many modules of one name: parts
with an A in common and a B each, which are one B in PEFT's format.
"""

from __future__ import annotations

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
        """The Hugging Face modules in the layer: model.layers.0.self_attn.q_proj; one of several parts once for each."""
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
        """Where the modules' rows lie in the layer, of the rank among the ranks that cut it; `source` is the module."""
        flat = [part for parts in self.entry.parts for part in parts]
        return self.entry.row.layout.rectangles(flat, self.entry.groups, rank, ranks)

    def elements(self, rank: int, ranks: int) -> int:
        """Numbers in the adapters of rank `rank` on each of the `ranks` that cut the layer."""
        a = len(self.adapters) * rank * self.in_features
        b = rank * sum(self.out_features(module) for adapter in self.adapters for module in adapter)
        return a // ranks + b if self.is_row_parallel else a + b // ranks

    def label(self, module: int) -> str:
        """q_proj; of one of several parts with its number."""
        name = self.modules[module]
        number = f"_{self.modules[:module].count(name)}" if self.modules.count(name) > 1 else ""
        return name.rpartition(".")[2] + number


def hf_modules(entry: WeightEntry) -> tuple[str, ...]:
    return tuple(name.removesuffix(".weight") for name in entry.hf)


def _part_modules(entry: WeightEntry) -> tuple[str, ...]:
    return tuple(module for module, parts in zip(hf_modules(entry), entry.parts, strict=True) for _ in parts)


def megatron_module(entry: WeightEntry) -> str:
    """decoder.layers.0.self_attention.linear_qkv; decoder.layers.0.mlp.experts.local_experts.3.linear_fc1."""
    return entry.names[0].removesuffix(".weight")


def linear_entries(arch: Architecture) -> list[WeightEntry]:
    """The linear layers of the decoder, in the model's order. Embedding, head and routers are none."""
    return [
        entry
        for entry in weight_table(arch).entries
        if entry.layer is not None and entry.row.layout.sharded_dim is not None and entry.names[0].endswith(".weight")
    ]


def find_targets(peft: PeftConfig, arch: Architecture) -> list[Target]:
    """What `peft` names in a model of this shape; `lora_problems` has found nothing against it."""
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


def lora_problems(cfg: Config, arch: Architecture) -> list[Problem]:
    """Why `policy.megatron_cfg.peft` can't be followed on a model of this shape; empty where it can."""
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
    problems += _in_stacks(peft, targets)
    if not targets and not problems:
        fix = "name fewer in exclude_modules, or more in target_modules"
        problems.append(Problem(f"{PEFT}.exclude_modules", list(peft.exclude_modules), "a layer that is left", fix))
    return [*problems, *_too_wide(peft, targets)]


class _Names:
    """Names of a config. Without wildcards a name is the end of a path (q_proj, self_attn.q_proj); with them, of `*`, `?` and
    `[`, it matches the whole."""

    def __init__(self, names: Sequence[str]) -> None:
        self.all_linear = ALL_LINEAR in names
        self.plain = {name for name in names if not any(character in name for character in "*?[")}
        self.wild = [name for name in names if name not in self.plain]

    def has(self, path: str) -> bool:
        parts = path.split(".")
        ends = (".".join(parts[first:]) for first in range(len(parts)))
        return any(end in self.plain for end in ends) or any(fnmatchcase(path, name) for name in self.wild)

    def has_whole(self, entry: WeightEntry) -> bool:
        """Whether a megatron-core layer is named; its experts also as NeMo RL's grouped ones are, without a number."""
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
    """A layer by both kinds of names. A wildcard that matches both (`*`) means the whole layer."""
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
    """Experts that folders hold in one tensor are no modules that PEFT has names for."""
    stacked = dict.fromkeys(
        "experts." + megatron_module(one.entry).rpartition(".")[2] for one in targets if one.entry.stack_name
    )
    if stacked:
        expected = "layers that are modules of the Hugging Face model; its experts are one tensor for all"
        fix = f"set {PEFT}.exclude_modules: [{', '.join(stacked)}]"
        yield Problem(f"{PEFT}.target_modules", list(peft.target_modules), expected, fix)


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
