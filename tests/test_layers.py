"""The rooms of megadpo and who may import whom. The picture is in docs/architecture.md; this holds it."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = ("launch", "tools", "benchmarks")

# room -> what it may import of ours: whole rooms, or single modules of one
MAY_IMPORT: dict[str, set[str]] = {
    "__main__": {"commands"},
    "commands": {
        *("config", "families", "files", "launcher", "data", "rollouts", "collect", "model", "lora", "plan"),
        *("parallel", "checkpoint", "train"),
    },
    "config": {"files"},
    "launcher": set(),
    "demo": set(),
    "files": set(),
    "messages": {"config", "files"},
    "families": {"config", "files"},
    "data": {"config", "files", "messages"},
    "rollouts": {"config", "files", "messages", "data"},
    "collect": {"config", "files", "messages", "rollouts"},
    "objective": {"config"},
    "parallel": {"config", "launcher"},
    "model": {"config", "families", "files", "parallel", "data.batches.pack"},
    "lora": {"config", "families", "parallel", "model"},
    "optimizer": {"config", "parallel", "model"},
    "reference": {"config", "files", "parallel", "model", "lora", "data.batches.pack", "data.batches.loader"},
    "checkpoint": {"config", "families", "files", "parallel", "model", "lora", "optimizer"},
    "train": {
        *("config", "families", "files", "data", "objective", "parallel"),
        *("model", "lora", "optimizer", "reference", "checkpoint", "launcher"),
    },
    "plan": {
        *("config", "families", "data", "parallel", "model", "lora", "optimizer", "checkpoint.size", "train.inputs"),
    },
}
USES_MEGATRON_CORE = {"parallel", "model", "lora", "optimizer", "reference", "checkpoint", "train", "plan"}
# A config is checked anywhere in under a second, so nothing heavy may come in with it.
TORCH_FREE = {"config", "families"}
TOO_HEAVY = {"torch", "transformers", "megatron", "numpy", "datasets", "huggingface_hub"}


def imports(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, also those inside functions: `from a.b import c` gives a.b.c."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def violations(repository: Path) -> list[str]:
    """Every import that breaks a rule, as "file:line: why"."""
    found = []
    for path in sorted((repository / "megadpo").rglob("*.py")):
        parts = path.relative_to(repository).with_suffix("").parts
        room = parts[1]
        for line, name in imports(path, ".".join(parts[:-1])):
            found += [f"{path.relative_to(repository)}:{line}: {why}" for why in broken_rules(room, name)]
    for path in sorted(file for folder in SCRIPTS for file in (repository / folder).rglob("*.py")):
        for line, name in imports(path, ""):
            found += [f"{path.relative_to(repository)}:{line}: {why}" for why in broken_megatron_rules("", name)]
    return found


def broken_rules(room: str, name: str) -> Iterator[str]:
    top = name.split(".")[0]
    if top in {"launch", "tools", "tests", "benchmarks"}:
        yield f"megadpo imports {name}, which is built on it"
    if room in TORCH_FREE and top in TOO_HEAVY:
        yield f"{room} imports {name}"
    if room == "__init__":
        yield f"megadpo/__init__.py imports {name}: every importer of megadpo.config would pay for it"
    elif top == "megadpo":
        allowed = MAY_IMPORT.get(room)
        if allowed is None:
            yield f"{room} is not a room of tests/test_layers.py"
        elif not any(within(name, f"megadpo.{other}") for other in {*allowed, room}):
            yield f"{room} may not import {name}"
    yield from broken_megatron_rules(room, name)


def broken_megatron_rules(room: str, name: str) -> Iterator[str]:
    if within(name, "megatron.training"):
        yield f"{name}: megatron.training is used nowhere"
    if within(name, "megatron.core.parallel_state") and room != "parallel":
        yield f"{name}: only megadpo.parallel knows megatron's parallel_state"
    if within(name, "megatron") and room and room not in USES_MEGATRON_CORE:
        yield f"{room} may not import {name}"


def test_every_import_keeps_to_its_layer():
    assert violations(REPOSITORY) == []


def test_the_rules_themselves_have_no_cycle():
    graph = {room: {name.split(".")[0] for name in allowed} for room, allowed in MAY_IMPORT.items()}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_modules_import_each_other_in_one_direction():
    files = {
        ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (REPOSITORY / "megadpo").rglob("*.py")
    }
    graph = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = [name for _, name in imports(path, package)]
        # `from megadpo.a import b` is the module megadpo.a.b, or a name in megadpo.a
        graph[module] = {next((m for m in (n, n.rpartition(".")[0]) if m in files), module) for n in names} - {module}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_checking_a_config_and_a_model_brings_in_nothing_heavy():
    code = (
        "import sys; import megadpo.config.load; from megadpo.config.variants import FAMILIES; "
        "import megadpo.families; assert 'llama' in FAMILIES; "
        f"print(sorted({TOO_HEAVY!r} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, text=True, capture_output=True, check=True)
    assert loaded.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("file", "line", "why"),
    [
        ("megadpo/config/a.py", "import torch", "config imports torch"),
        ("megadpo/families/a.py", "import torch", "families imports torch"),
        ("megadpo/config/a.py", "from megadpo.data.pairs import Pair", "config may not import megadpo.data.pairs.Pair"),
        ("megadpo/config/a.py", "from megatron.core import ModelParallelConfig", "config may not import megatron.core"),
        ("megadpo/data/a.py", "from ..model import gpt", "data may not import megadpo.model.gpt"),
        ("megadpo/data/a.py", "def f():\n    import megadpo.train.loop", "a.py:2: data may not import megadpo.train"),
        (
            "megadpo/model/a.py",
            "from megadpo.data.batches.loader import Loader",
            "model may not import megadpo.data.batches.loader",
        ),
        ("megadpo/model/a.py", "from megatron.core import parallel_state", "only megadpo.parallel knows"),
        ("megadpo/train/a.py", "import megatron.core.parallel_state as mpu", "only megadpo.parallel knows"),
        ("megadpo/train/a.py", "from megatron.training import get_args", "megatron.training is used nowhere"),
        ("megadpo/train/a.py", "from tests.helpers import distributed", "megadpo imports tests.helpers.distributed"),
        ("megadpo/attic/a.py", "import megadpo.config.load", "attic is not a room"),
        ("megadpo/__init__.py", "from megadpo.config import load", "would pay for it"),
        ("launch/a.py", "from megatron.training import get_args", "megatron.training is used nowhere"),
        ("tools/a.py", "import megatron.core.parallel_state", "only megadpo.parallel knows"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, line: str, why: str):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    found = violations(tmp_path)
    assert len(found) >= 1 and why in "\n".join(found) and found[0].startswith(file)


def test_what_is_allowed_is_not_reported(tmp_path: Path):
    for file, line in {
        "megadpo/model/a.py": "from megadpo.data.batches.pack import Segment\nfrom megatron.core.models.gpt import GPTModel\n",
        "megadpo/parallel/a.py": "from megatron.core import parallel_state\nfrom . import groups\n",
        "megadpo/config/a.py": "import json\nfrom megadpo.config.problems import Problem\n",
        "launch/train.py": "from megadpo.commands import main\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(line)
    assert violations(tmp_path) == []
