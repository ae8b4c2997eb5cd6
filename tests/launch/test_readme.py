"""The first command of README.md's first real run, on a model and pairs that are there."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from tests.helpers.distributed import REPOSITORY
from tests.helpers.runs import make_model, make_pairs


def test_the_check_of_the_first_real_run(tmp_path: Path) -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = [line for line in text.splitlines() if "--check" in line and line.startswith("    python ")]
    model = make_model(tmp_path / "model", num_key_value_heads=4, num_hidden_layers=2, max_position_embeddings=8192)
    command = command.replace("/models/Llama-3.1-8B-Instruct", str(model))
    for name, count in (("pairs.jsonl", 200), ("held_out.jsonl", 10)):
        command = command.replace(f"={name}", f"={make_pairs(tmp_path / name, count)}")
    words = [sys.executable, *shlex.split(command)[1:], f"data.cache_dir={tmp_path / 'cache'}"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "no problem found" in done.stdout
