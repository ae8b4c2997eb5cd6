"""Reads a checkpoint of a LoRA run in one process, without a model: its settings, its base model and its adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import yaml

from megadpo.config.architecture import Architecture
from megadpo.config.problems import ConfigError, Problem
from megadpo.config.reader import Reader
from megadpo.config.schema_peft import PeftConfig
from megadpo.families import read_architecture
from megadpo.lora.peft_folder import tensor_name
from megadpo.lora.state import checkpoint_key, index_of
from megadpo.lora.targets import PEFT, find_targets
from megadpo.model.manifest import INFO_FILE
from megadpo.model.source import ModelSource, resolve_source, weights_fingerprint
from megadpo.model.weights.dist_folder import MODEL_FOLDER, DistFolder

BASE = "policy.model_name"
"""Key of the base model's fingerprint in a checkpoint's data settings."""


@dataclass(frozen=True)
class LoraCheckpoint:
    """The adapters of <checkpoint_dir>/step_<N>, and their base model."""

    folder: Path
    peft: PeftConfig
    arch: Architecture
    base: str
    """policy.model_name of the run."""
    base_fingerprint: str

    @classmethod
    def open(cls, folder: str | Path | None) -> LoraCheckpoint | None:
        """None for a folder with a whole model. Raises ConfigError for a damaged record."""
        folder = Path(folder or "")
        try:
            record = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
            if not record.get("lora", False):
                return None
            policy = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["policy"]
            reader = Reader(frozenset())
            peft = reader.section(PeftConfig, policy["megatron_cfg"]["peft"], PEFT)
            if reader.problems:
                raise ConfigError(reader.problems)
            return cls(
                folder=folder,
                peft=peft,
                arch=read_architecture(folder / "hf", str(folder)),
                base=policy["model_name"],
                base_fingerprint=record["position"]["data_settings"][BASE],
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            fix = "copy the checkpoint again from where it is whole"
            expected = "the record of a run with LoRA"
            raise ConfigError(Problem(str(folder), f"{type(error).__name__}: {error}", expected, fix)) from error

    @property
    def not_to_train(self) -> Problem:
        """The problem if it is named as a model to train."""
        expected = "a whole model to train; this checkpoint holds adapters of one"
        fix = "export it, with --merge, or name its base and give the export to policy.megatron_cfg.peft.init_from"
        return Problem("policy.model_name", str(self.folder), expected, fix)

    def base_source(self, named: str | None = None) -> ModelSource:
        """The base model: `named`, or the run's own. Raises ConfigError if its weights are now others, or quantised."""
        source = resolve_source(named or self.base, "the base of the adapters")
        read_architecture(source.hf_files, "the base of the adapters")  # refuses quantised weights
        if weights_fingerprint(source, every_tensor=True) != self.base_fingerprint:
            expected = f"the model that the adapters in {self.folder} were trained on, with the weights that it had"
            raise ConfigError(
                Problem("the base of the adapters", named or self.base, expected, "give its folder: --base")
            )
        return source

    def tensors(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(Hugging Face module, A [r, in], B [rows, r]) of every module, read one by one."""
        stored = DistFolder(self.folder / MODEL_FOLDER)

        def read(target: Any, name: str) -> torch.Tensor:
            return stored.read(stored.region(checkpoint_key(target, name), index_of(target)))

        for target in find_targets(self.peft, self.arch):
            for shared in target.adapters:
                a = read(target, f"A_{target.label(shared[0])}")
                for name, parts in groupby(shared, key=lambda module: target.modules[module]):
                    yield name, a, torch.cat([read(target, f"B_{target.label(part)}") for part in parts])

    def peft_tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by PEFT's names. An A that modules share occurs once for each module."""
        found: dict[str, torch.Tensor] = {}
        for module, a, b in self.tensors():
            found |= {tensor_name(module, "A"): a.clone(), tensor_name(module, "B"): b}
        return found
