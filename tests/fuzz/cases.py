"""What is damaged: configs, rows of data, and checkpoints. Case `number` of a seed is always the same."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from megadpo.config import ConfigError, build_config, load_config
from megadpo.data.tokens.dataset import open_dataset
from megadpo.data.tokens.encode import DataSettings
from megadpo.model.manifest import verify
from megadpo.model.weights import export_hf
from tests.data.formats.test_formats import ROWS
from tests.fuzz.mutate import STRANGE, damaged_bytes, damaged_tree, outcome
from tests.helpers.configs import tree_with
from tests.helpers.distributed import REPOSITORY, run_distributed
from tests.helpers.runs import make_config, make_model, train
from tests.helpers.tiny_tokenizer import tiny_tokenizer

Outcome = tuple[str, str]
"""What `outcome` returns."""


def config_case(folder: Path, seed: int) -> Callable[[int], Outcome]:
    """A shipped config, damaged as a tree or as text, with a damaged override now and then; read by load_config."""
    texts = [file.read_text() for file in sorted((REPOSITORY / "configs").glob("*.yaml"))]
    trees = [yaml.safe_load(text) for text in texts]

    def case(number: int) -> Outcome:
        rng = random.Random(f"{seed} config {number}")
        which = rng.randrange(len(texts))
        if rng.random() < 0.7:
            tree = damaged_tree(trees[which], rng, rng.randint(1, 4))
            content = yaml.safe_dump(tree, allow_unicode=rng.random() < 0.5).encode(errors="surrogatepass")
        else:
            content = damaged_bytes(texts[which].encode(), rng, rng.randint(1, 6))
        overrides = []
        if rng.random() < 0.3:
            path = rng.choice(
                ["dpo.max_num_steps", "policy.model_name", "data", "policy.megatron_cfg.optimizer.lr", "x", ""]
            )
            overrides = [f"{rng.choice(['', '+', '++', '~'])}{path}={rng.choice(STRANGE)}"]
        file = folder / "config.yaml"
        file.write_bytes(content)
        return outcome(lambda: load_config(file, overrides))

    return case


def row_case(folder: Path, seed: int) -> Callable[[int], Outcome]:
    """One to three rows of a format, damaged as trees or as text, in a file of JSON, JSON lines or CSV; read and tokenised
    with a chat template."""
    tokenizer = tiny_tokenizer(vocab_size=320)

    def case(number: int) -> Outcome:
        rng = random.Random(f"{seed} row {number}")
        row = ROWS[rng.choice(sorted(ROWS))][0]
        rows = [damaged_tree(row, rng, rng.randint(0, 3)) for _ in range(rng.randint(1, 3))]
        suffix = rng.choice([".jsonl", ".jsonl", ".json", ".csv"])
        content = _written(rows, suffix)
        if rng.random() < 0.4:
            content = damaged_bytes(content, rng, rng.randint(1, 4))
        file = folder / f"rows{suffix}"
        file.write_bytes(content)
        data = {
            "data__on_bad_row": rng.choice(["refuse", "drop"]),
            "data__on_too_long": rng.choice(["drop", "truncate"]),
        }
        settings = DataSettings.from_config(build_config(tree_with(**data)))
        return outcome(lambda: open_dataset(file, tokenizer, settings))

    return case


def _written(rows: list[Any], suffix: str) -> bytes:
    lines = [json.dumps(row) for row in rows]
    if suffix == ".json":
        return f"[{', '.join(lines)}]".encode()
    if suffix == ".csv":
        objects = [row for row in rows if isinstance(row, dict)]
        names = [*dict.fromkeys(str(name) for row in objects for name in row)]
        cells = [[str(row.get(name, "")) for name in names] for row in objects]
        quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in [names, *cells]]
        return "\n".join(quoted).encode(errors="surrogatepass")
    return "".join(line + "\n" for line in lines).encode()


def checkpoint_case(folder: Path, seed: int) -> Callable[[int], Outcome]:
    """A file of a checkpoint, damaged; the checkpoint is verified, which has to name the file, and exported, which has to
    refuse or to give the export of the whole checkpoint."""
    config = make_config(folder, make_model(folder / "model"), checkpointing={"enabled": True, "save_period": 1})
    steps = ["dpo.max_num_steps=1", "policy.megatron_cfg.tensor_model_parallel_size=2"]
    assert run_distributed(train, 2, str(config), steps, init_process_group=False) == [0, 0]
    checkpoint = folder / "checkpoints" / "step_1"
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file())
    whole = _exported(checkpoint, folder / "exported")

    def case(number: int) -> Outcome:
        rng = random.Random(f"{seed} checkpoint {number}")
        file = rng.choice(files)
        content = file.read_bytes()
        changed = _damage(content, rng)
        if changed == content:
            return "read", ""
        file.unlink()
        if changed is not None:
            file.write_bytes(changed)
        try:
            return outcome(lambda: _read(checkpoint, file, folder / "exported", whole))
        finally:
            file.write_bytes(content)

    return case


def _damage(content: bytes, rng: random.Random) -> bytes | None:
    kind = rng.choice(["gone", "empty", "half", "longer", "zeros", "bit", "bytes", "other"])
    if kind in ("gone", "empty"):
        return None if kind == "gone" else b""
    if kind == "half":
        return content[: rng.randrange(len(content) + 1)]
    if kind == "longer":
        return content + rng.randbytes(rng.randint(1, 100))
    if kind == "zeros":
        start = rng.randrange(len(content) + 1)
        length = len(content[start : start + 4096])
        return content[:start] + bytes(length) + content[start + length :]
    if kind == "other":
        return rng.randbytes(len(content))
    return damaged_bytes(content, rng, 1 if kind == "bit" else 8)


def _read(checkpoint: Path, damaged: Path, target: Path, whole: dict[str, bytes]) -> None:
    """Raises the refusal of the one or the other; AssertionError where the damage isn't seen."""
    refusals = [_refusal(lambda: verify(checkpoint))]
    assert refusals[0] is not None, f"the damage of {damaged} was not seen"
    assert str(damaged) in str(refusals[0]), f"{damaged} is not named: {refusals[0]}"
    exported: list[dict[str, bytes]] = []
    refusals.append(_refusal(lambda: exported.append(_exported(checkpoint, target))))
    assert exported in ([], [whole]), f"an export after the damage of {damaged} is another one"
    raise refusals[1] or refusals[0]


def _refusal(read: Callable[[], object]) -> ConfigError | None:
    try:
        read()
    except ConfigError as error:
        return error
    return None


def _exported(checkpoint: Path, target: Path) -> dict[str, bytes]:
    shutil.rmtree(target, ignore_errors=True)
    export_hf(checkpoint, target)
    return {file.name: file.read_bytes() for file in target.rglob("*") if file.is_file()}


CASES = {"configs": config_case, "rows": row_case, "checkpoints": checkpoint_case}
