"""Reads and writes adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

Names of tensors: base_model.model.<Hugging Face module>.lora_A.weight [r, in] and .lora_B.weight [rows, r]. The model computes
W x + scale * B A x (peft 0.21, tuners/lora/layer.py).
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megadpo.config.architecture import Architecture
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.schema import Config
from megadpo.config.schema_peft import PeftConfig
from megadpo.lora.adapter import LinearAdapter
from megadpo.lora.attach import load_a, load_b
from megadpo.lora.targets import PEFT, Target, find_targets, hf_modules, linear_entries, unlike_experts

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MUST_BE: dict[str, tuple[tuple[Any, ...], str]] = {
    "peft_type": (("LORA",), "another kind of adapter can't be trained here"),
    "use_dora": ((None, False), "DoRA is not supported: its norm needs the whole B A in every step, which ranks share"),
    "bias": ((None, "none"), "biases are frozen with the model"),
    "modules_to_save": ((None, []), "only adapters are trained, no whole modules"),
    "rank_pattern": ((None, {}), "all adapters have one rank"),
    "alpha_pattern": ((None, {}), "all adapters have one alpha"),
    "fan_in_fan_out": ((None, False), "the supported models' layers are linear, not convolutions"),
    "target_parameters": ((None, []), "adapters are on modules; experts are written one by one"),
    "lora_bias": ((None, False), "an adapter has no bias"),
}


@dataclass(frozen=True)
class PeftFolder:
    """An adapter that fits a model's shape."""

    folder: Path
    field: str
    """The config key that names it, for messages."""
    peft: PeftConfig
    """Its rank and scale, and its modules as targets, each with its own A."""

    def load(self, adapters: Sequence[LinearAdapter]) -> None:
        """Load the adapters; each rank reads the matrices and keeps its part. Raises ConfigError if modules that share one A
        here have different ones in the folder."""
        with safe_open(self.folder / WEIGHTS_FILE, "pt", device="cpu") as handle:
            for adapter in adapters:
                target = adapter.target
                for shared in target.adapters:
                    first, *others = (handle.get_tensor(tensor_name(target.modules[m], "A")) for m in shared)
                    if not all(torch.equal(first, other) for other in others):
                        raise ConfigError(_not_shared(self, target, shared))
                    load_a(adapter, shared, first)
                    for name, parts in groupby(shared, key=lambda module: target.modules[module]):
                        numbers = [*parts]
                        rows = [target.out_features(number) for number in numbers]
                        b = handle.get_tensor(tensor_name(name, "B"))
                        for number, part in zip(numbers, b.split(rows), strict=True):
                            load_b(adapter, number, part)


def tensor_name(module: str, half: str) -> str:
    """half: A or B."""
    return f"{_PREFIX}{module}.lora_{half}.weight"


def read_peft(folder: str | Path, field: str, arch: Architecture) -> PeftFolder:
    """The adapter in `folder`; reads its config and the headers of its tensors. Raises ConfigError with every reason why it
    doesn't fit a model of this shape. Collectives: none."""
    folder = Path(folder)
    config = _read_config(folder, field)
    problems = [
        Problem(f"{folder / CONFIG_FILE}: {key}", config[key], f"{allowed[-1]!r} ({why})", "use a plain LoRA adapter")
        for key, (allowed, why) in _MUST_BE.items()
        if key in config and config[key] not in allowed
    ]
    rank, shapes = config.get("r"), _read_shapes(folder, field)
    if not isinstance(rank, int) or rank < 1:
        problems.append(Problem(f"{folder / CONFIG_FILE}: r", rank, "the rank, 1 or more", "export the adapter again"))
        raise ConfigError(problems)
    wanted = {
        name: shape
        for entry in linear_entries(arch)
        for module, (rows, columns) in zip(hf_modules(entry), entry.shapes, strict=True)
        for name, shape in ((tensor_name(module, "A"), (rank, columns)), (tensor_name(module, "B"), (rows, rank)))
    }
    problems += _tensor_problems(folder, shapes, wanted)
    if problems:
        raise ConfigError(problems)
    modules = dict.fromkeys(name.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for name in shapes)
    peft = PeftConfig(
        enabled=True,
        target_modules=tuple(modules),
        dim=rank,
        alpha=float(config.get("lora_alpha", 8)),
        use_rslora=bool(config.get("use_rslora")),
    )
    if (expected := unlike_experts(find_targets(peft, arch), linear_entries(arch))) is not None:
        fix = "train an adapter for all of them, or merge this one into its base"
        raise ConfigError(Problem(str(folder / WEIGHTS_FILE), f"adapters of {len(modules)} modules", expected, fix))
    return PeftFolder(folder, field, peft)


def folder_problems(cfg: Config, arch: Architecture) -> list[Problem]:
    """Problems of `peft.init_from`, whose adapters must be those that the config names, and of `dpo.reference.adapter`.
    `lora_problems` must have found nothing."""
    problems: list[Problem] = []
    peft, start = cfg.policy.megatron_cfg.peft, f"{PEFT}.init_from"
    named_by = {start: peft.init_from if peft.enabled else None, "dpo.reference.adapter": cfg.dpo.reference.adapter}
    for field, named in named_by.items():
        if named is None:
            continue
        try:
            found = read_peft(named, field, arch)
        except ConfigError as error:
            problems += error.problems
            continue
        if field == start:
            problems += _differences(found, peft, arch)
    return problems


def write_peft(
    folder: Path,
    peft: PeftConfig,
    tensors: Mapping[str, torch.Tensor],
    modules: Iterable[str],
    *,
    base: str,
    arch: Architecture,
) -> None:
    """Write the two files. tensors: by `tensor_name`. modules: the Hugging Face modules with adapters. base: name or folder
    of the base model."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": peft.dim,
        "lora_alpha": int(peft.alpha) if peft.alpha.is_integer() else peft.alpha,
        "lora_dropout": peft.dropout if peft.dropout_position == "pre" else 0.0,
        "use_rslora": peft.use_rslora,
        "use_dora": False,
        "target_modules": _shortest(list(modules), arch),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "inference_mode": True,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE, {"format": "pt"})


def adapter_fingerprint(folder: str | Path) -> str:
    """sha256 of an adapter's two files."""
    files = (Path(folder) / name for name in (CONFIG_FILE, WEIGHTS_FILE))
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def _shortest(modules: list[str], arch: Architecture) -> list[str]:
    """The last parts of the modules' names, if they mean the same modules of the model and no others; else the whole
    names."""
    last = sorted({module.rpartition(".")[2] for module in modules})
    meant = {m for entry in linear_entries(arch) for m in hf_modules(entry) if m.rpartition(".")[2] in last}
    return last if meant == set(modules) else modules


def _read_config(folder: Path, field: str) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
        return config
    except (OSError, ValueError) as error:
        expected = f"a folder with PEFT's {CONFIG_FILE} ({error})"
        raise ConfigError(Problem(field, str(folder), expected, "name the folder of an adapter")) from error


def _read_shapes(folder: Path, field: str) -> dict[str, tuple[int, ...]]:
    file = folder / WEIGHTS_FILE
    try:
        with safe_open(file, "pt", device="cpu") as handle:
            return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        fix = "save it with save_pretrained(DIR, safe_serialization=True)" if folder.is_dir() else "correct the path"
        raise ConfigError(Problem(field, str(folder), f"a folder with {WEIGHTS_FILE} ({error})", fix)) from error


def _tensor_problems(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> list[Problem]:
    """At most one problem of each kind: in an adapter of another model all tensors are wrong."""
    file = folder / WEIGHTS_FILE
    other = "name the adapter of this model"
    problems = []
    if unknown := [name for name in shapes if name not in wanted]:
        near = difflib.get_close_matches(unknown[0], list(wanted), n=1, cutoff=0.6)
        expected = f"adapters of this model's linear layers, such as {(near or list(wanted))[0]}"
        problems.append(Problem(str(file), f"{unknown[0]} and {len(unknown) - 1} more", expected, other))
    if wrong := [name for name in shapes if name in wanted and shapes[name] != wanted[name]]:
        expected = f"shape {wanted[wrong[0]]}, by the model and the rank"
        problems.append(Problem(f"{file}: {wrong[0]}", shapes[wrong[0]], expected, other))
    halves = {name: name.replace(".lora_A.", ".lora_B.") for name in shapes if ".lora_A." in name}
    halves |= {name: name.replace(".lora_B.", ".lora_A.") for name in shapes if ".lora_B." in name}
    if alone := [name for name, half in halves.items() if half not in shapes]:
        problems.append(Problem(str(file), "no such tensor", halves[alone[0]], "save the adapter again"))
    if not shapes:
        problems.append(Problem(str(file), "no tensors", "the adapter's tensors", "save the adapter again"))
    return problems


def _differences(found: PeftFolder, peft: PeftConfig, arch: Architecture) -> list[Problem]:
    problems = []
    for name in ("dim", "alpha", "use_rslora"):
        ours, theirs = getattr(peft, name), getattr(found.peft, name)
        if ours != theirs:
            expected = f"{theirs}, as in {found.folder / CONFIG_FILE}"
            problems.append(Problem(f"{PEFT}.{name}", ours, expected, f"set it to {theirs}"))
    here = {target.modules[m] for target in find_targets(peft, arch) for shared in target.adapters for m in shared}
    there = {*found.peft.target_modules}
    if here != there:
        expected = f"the modules of {found.folder}, no more and no fewer"
        fix = f"set it to [{', '.join(_shortest(list(found.peft.target_modules), arch)[:8])}]"
        problems.append(Problem(f"{PEFT}.target_modules", list(peft.target_modules), expected, fix))
    return problems


def _not_shared(found: PeftFolder, target: Target, shared: Sequence[int]) -> Problem:
    labels = ", ".join(map(target.label, shared))
    expected = f"one A for {labels}, which {PEFT}.target_modules names together; the adapter has one for each"
    fix = f"name them by Hugging Face's names in {PEFT}.target_modules: [{labels}, ...]"
    return Problem(found.field, str(found.folder), expected, fix)
