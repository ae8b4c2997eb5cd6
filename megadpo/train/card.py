"""The model card of a checkpoint: its base model, data, settings and results. It is the README.md of an export."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load

from megadpo.checkpoint import TrainingPosition
from megadpo.config.interpolation import hidden_words
from megadpo.config.load import resolved_text
from megadpo.config.schema import Config
from megadpo.data.tokens.tokenizer import resolve_chat_template
from megadpo.model.weights.convert import CARD_FILE
from megadpo.train.report import loss_words, reference_words
from megadpo.train.setup import Run

LIBRARIES = ("megadpo", "torch", "megatron-core", "transformers", "tokenizers")
KEPT = ("license", "license_name", "license_link", "language")
"""Metadata copied from the base model's card. The rest, such as its scores, does not hold for the trained model."""


def model_card(run: Run, position: TrainingPosition) -> str:
    """The card of the checkpoint at `position`: Markdown with the hub's metadata."""
    cfg, base = run.cfg, base_metadata(run.inputs.source.hf_files)
    facts = hidden_words(_table([("what", "value"), *_facts(run, position)]), cfg.environment)
    name = hidden_words(cfg.policy.model_name, cfg.environment)
    data = ModelCardData(
        base_model=None if Path(cfg.policy.model_name).exists() else name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["dpo", "megadpo"],
        **{name: base[name] for name in KEPT if name in base},
    )
    measured = {name: value for name, value in position.metrics.items() if name.startswith("validation")}
    numbers = [(name, _number(value)) for name, value in sorted(measured.items())]
    validation = _table([("metric", "value"), *numbers]) if numbers else "No validation was run at this step."
    return f"""---
{data.to_yaml()}
---

# {name.rstrip("/")}, trained on preferences

Trained with megadpo {_version("megadpo")}, {position.step} of {run.total_steps} optimizer steps. README.base.md, if there is
one, is the card of the base model. Its scores are not those of this model.

{facts}

## Validation at step {position.step}

{validation}

## Train again

Save the config below as config.yaml. The base model and the data must be at the paths that it names.

    megadpo train config.yaml {_processes(run.parallel.world_size)}

<details><summary>config.yaml</summary>

```yaml
{resolved_text(cfg).rstrip()}
```

</details>
"""


def base_metadata(hf_files: Path) -> dict[str, Any]:
    """The metadata of the base model's card. Empty if there is none, or it can't be read."""
    try:
        return dict(metadata_load(hf_files / CARD_FILE) or {})
    except Exception:  # no card, or broken YAML
        return {}


def _facts(run: Run, position: TrainingPosition) -> list[tuple[str, str]]:
    cfg, pairs = run.cfg, run.inputs.train_loader.dataset
    optimizer = cfg.policy.megatron_cfg.optimizer
    return [
        ("base_model", cfg.policy.model_name),
        ("loss", loss_words(cfg)),
        ("beta", f"{cfg.dpo.reference_policy_kl_penalty:g}"),
        ("reference", reference_words(cfg)),
        ("steps", f"{position.step} of {run.total_steps}, {position.skipped_steps} skipped"),
        ("pairs per step", str(cfg.policy.train_global_batch_size)),
        ("epochs", f"{position.epoch + position.batch / run.inputs.train_loader.batches_per_epoch:.2f}"),
        ("learning rate", f"{optimizer.lr:g}, {cfg.policy.megatron_cfg.scheduler.lr_decay_style}"),
        ("precision", cfg.policy.precision),
        ("data", str(pairs.report)),
        ("data, rows and pairs", f"{pairs.report.rows} rows, {pairs.report.pairs} pairs"),
        ("data, fingerprint", pairs.fingerprint),
        *(("validation data", str(loader.dataset.report)) for loader in run.inputs.validation.values()),
        ("tokenizer", _tokenizer_words(cfg, run)),
        ("frozen weights", _frozen_words(cfg)),
        (
            "versions",
            ", ".join(f"{name} {_version(name)}" for name in LIBRARIES),
        ),
    ]


def _frozen_words(cfg: Config) -> str:
    peft = cfg.policy.megatron_cfg.peft
    if not peft.enabled:
        return ", ".join(cfg.policy.freeze) or "none"
    named = ", ".join(peft.target_modules) or "all linear layers"
    return f"all of the base; LoRA adapters of rank {peft.dim}, scale {peft.scale:g}, on {named}"


def _tokenizer_words(cfg: Config, run: Run) -> str:
    settings, tokenizer = cfg.policy.tokenizer, run.inputs.tokenizer
    template = resolve_chat_template(tokenizer, settings.chat_template)
    words = f"{settings.name}, EOS {tokenizer.eos_token}, {'with its' if template else 'no'} chat template"
    given = settings.chat_template_kwargs
    return words + (f", with chat_template_kwargs {given} (model files can't store them)" if given else "")


def _processes(world_size: int) -> str:
    node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return f"--nnodes {world_size // node} --nproc-per-node {node}" if world_size > node else f"--nproc-per-node {node}"


def _table(rows: list[tuple[str, str]]) -> str:
    first, *rest = [f"| {name} | {' '.join(value.split()).replace('|', chr(92) + '|')} |" for name, value in rows]
    return "\n".join([first, "|---|---|", *rest])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "unknown"
