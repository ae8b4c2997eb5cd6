"""All pairs of options on every model, and what each of them takes to run."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

import yaml

from tests.layouts.models import MODELS, Model
from tests.layouts.options import BY_NAME, MEG, OPTIONS, Option

MOST_PROCESSES = 4
CORE_SEED = 4


@dataclass(frozen=True)
class Case:
    """Some options together on one model: one, two, or more."""

    model: Model
    options: tuple[Option, ...]

    @property
    def name(self) -> str:
        return f"{self.model.name}: {' + '.join(option.name for option in self.options)}"

    @property
    def values(self) -> dict[str, object] | None:
        """Config key -> value; None where the options want one key at two values."""
        merged: dict[str, object] = {}
        for option in self.options:
            own = {**option.overrides, **(option.moe_overrides if self.model.has_experts else {})}
            if any(merged.get(key, value) != value for key, value in own.items()):
                return None
            merged |= own
        return merged

    @property
    def overrides(self) -> list[str]:
        """As on the command line."""
        return as_overrides(self.values or {})

    @property
    def altering(self) -> list[str]:
        """Those of `overrides` that the run of one process has too."""
        return as_overrides({k: v for one in self.options if one.alters_the_run for k, v in one.overrides.items()})

    @property
    def world_size(self) -> int:
        """Fewest processes in which every option of the case means something."""
        values = self.values or {}

        def size(name: str) -> int:
            found = values.get(f"{MEG}.{name}_parallel_size", 1)
            assert isinstance(found, int)
            return found

        data = max(option.data_parallel for option in self.options)
        dense = size("tensor_model") * size("context") * data
        experts = size("expert_model") * size("expert_tensor")
        return size("pipeline_model") * math.lcm(dense, experts)

    @property
    def computes_the_same_tokens(self) -> bool:
        """Whether prompts are shared, as in the run of one process."""
        return not {"unpacked", "unshared"} & {option.name for option in self.options}

    def may_be_named(self, field: str) -> bool:
        """Whether a refusal that names `field` is about one of the options, and not about something else."""
        keys = [*(self.values or {}), *(name for option in self.options for name in option.also_names)]
        return any(key in field or field in key for key in keys)


def as_overrides(values: Mapping[str, object]) -> list[str]:
    """`values` as they are written on the command line."""
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).split(chr(10))[0]}" for key, value in values.items()
    ]


def options_of(model: Model) -> tuple[Option, ...]:
    """Rows and columns of the model's table."""
    return tuple(option for option in OPTIONS if model.has_experts or not option.moe_only)


def single_cases(model: Model) -> list[Case]:
    return [Case(model, (option,)) for option in options_of(model)]


def pair_cases(model: Model) -> list[Case]:
    """Pairs that name a key twice at different values are no cases."""
    pairs = [Case(model, pair) for pair in itertools.combinations(options_of(model), 2)]
    return [case for case in pairs if case.values is not None]


def all_cases() -> list[Case]:
    """Every cell of every table, and the larger ones."""
    return [case for model in MODELS for case in (*single_cases(model), *pair_cases(model))] + larger_cases()


def larger_cases() -> list[Case]:
    """Three and more options at once: what runs on clusters, in small."""
    together = {
        "dense": [("SP", "PP", "unshared"), ("SP", "VPP", "recompute parts"), ("VPP", "overlap gather", "freeze"),
                  ("SP", "dist. optimizer", "recompute full"), ("SP", "VPP", "overlap gather"),
                  ("SP", "CP", "unshared"), ("CP", "VPP", "recompute block"), ("CP", "overlap gather", "unpacked"),
                  ("SP", "VPP", "recompute full", "LoRA")],
        "tied": [("SP", "VPP", "uneven"), ("VPP", "overlap gather", "recompute block"), ("SP", "uneven", "freeze"),
                 ("SP", "CP", "recompute parts")],
        "MoE": [("SP", "EP", "DP"), ("SP", "EP", "PP", "recompute full"), ("SP", "EP", "ETP", "dist. optimizer"),
                ("EP", "VPP", "overlap gather"), ("SP", "EP", "allgather", "freeze", "frozen router", "dist. optimizer"),
                ("SP", "CP", "EP", "recompute full"), ("SP", "EP", "ETP", "dist. optimizer", "LoRA")],
    }  # fmt: skip
    models = {model.name: model for model in MODELS}
    return [Case(models[m], tuple(BY_NAME[n] for n in names)) for m, cases in together.items() for names in cases]


def core_cases() -> list[Case]:
    """A small choice of `all_cases` for `make test`: every option with another on every model, by a fixed seed, and the
    larger ones."""
    rng = random.Random(CORE_SEED)
    chosen: list[Case] = []
    for model in MODELS:
        met: set[str] = set()
        for option in options_of(model):
            if option.name in met:
                continue
            found = [case for case in pair_cases(model) if option in case.options]
            new = [case for case in found if not met & {one.name for one in case.options}]
            chosen.append(rng.choice(new or found))
            met |= {one.name for one in chosen[-1].options}
    return [*chosen, *larger_cases()]
