"""Whole runs for tests: a small model folder, pairs that are made up, and `megadpo train` in real processes."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from tests.helpers.tiny_tokenizer import tiny_tokenizer
from tests.model.weights.hf_models import make_hf_folder

VOCAB = 320
SENTENCE = "the sum of two and three is five at shore where sand what that one other said there it sea"
WORDS = SENTENCE.split()


def make_model(folder: Path, case: str = "llama", **changes: Any) -> Path:
    """A random Hugging Face model of 4 layers with a tokenizer that fits it."""
    make_hf_folder(folder, case, vocab_size=VOCAB, **changes)
    for extra in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / extra).unlink()
    shutil.rmtree(folder / "additional_chat_templates")
    tiny_tokenizer(vocab_size=VOCAB).save_pretrained(folder)
    return folder


def make_pairs(path: Path, count: int, seed: int = 0) -> Path:
    """Pairs of very different lengths, so that packs are uneven."""
    rng = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, longest)))

    rows = [
        {"prompt": text(25) + "?", "chosen": f" {text(12)} yes{i}", "rejected": f" {text(12)} no{i}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ranked_pairs(path: Path, *, prompts: int, answers: int, seed: int, begin: int = 0) -> Path:
    """All pairs of `answers` answers to each prompt. The first three begin with the same `begin` words, and two of these with
    as many more."""
    rng = random.Random(seed)

    def words(number: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(number))

    rows = []
    for number in range(prompts):
        prompt = words(rng.randint(1, 20)) + f" {number}?"
        texts = [f" {words(rng.randint(1, 10))} no{i}" for i in range(answers)]
        if begin:
            first, second = words(begin), words(begin)
            common = [f" {first} {second}"] * 2 + [f" {first}"]
            texts = [one + text for one, text in zip(common, texts, strict=False)] + texts[3:]
        rows += [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in combinations(texts, 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(folder: Path, model: Path, *, pairs: int = 40, **sections: dict[str, Any]) -> Path:
    """config.yaml in `folder` with data and a small run; `sections` are merged in, one dict a section."""
    tree: dict[str, Any] = {
        "policy": {
            "model_name": str(model),
            "train_global_batch_size": 8,
            "max_total_sequence_length": 100,
            "precision": "float32",
            "sequence_packing": {"train_mb_tokens": 200},
            "megatron_cfg": {"optimizer": {"lr": 1e-3, "weight_decay": 0.01, "use_distributed_optimizer": False}},
        },
        "dpo": {"max_num_steps": 3, "val_at_start": False, "val_period": 0, "reference_policy_kl_penalty": 0.1},
        "data": {
            "train_data_path": str(make_pairs(folder / "train.jsonl", pairs)),
            "val_data_paths": {"held_out": str(make_pairs(folder / "valid.jsonl", 11, seed=1))},
        },
        "checkpointing": {"enabled": False, "checkpoint_dir": str(folder / "checkpoints")},
        "logger": {"log_dir": str(folder / "logs")},
    }
    for name, values in sections.items():
        merge(tree[name], values)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


def train(config: str, overrides: list[str]) -> int:
    """Target for run_distributed(init_process_group=False): `megadpo train` on one rank."""
    from megadpo.commands import main

    return main(["train", config, *overrides])


def evaluate(config: str, overrides: list[str]) -> int:
    """The same of `megadpo evaluate`."""
    from megadpo.commands import main

    return main(["evaluate", config, *overrides])


def train_and_read(config: str, overrides: list[str]) -> tuple[int, str]:
    """Target for run_distributed: the exit code, and what was printed on both streams."""
    return _and_read(train, config, overrides)


def evaluate_and_read(config: str, overrides: list[str]) -> tuple[int, str]:
    """The same of `megadpo evaluate`."""
    return _and_read(evaluate, config, overrides)


def _and_read(command: Callable[[str, list[str]], int], config: str, overrides: list[str]) -> tuple[int, str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = command(config, overrides)
    return code, " ".join(printed.getvalue().split())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
