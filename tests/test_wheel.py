"""The wheel: it holds what a checkout has beside the package, and trains where there is no checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.helpers.distributed import REPOSITORY

SOURCES = ("setup.py", "pyproject.toml", "README.md", "megadpo", "configs", "launch")
DEMO_DATA = """
from pathlib import Path
from megadpo.demo.sums import question, split_sums, worked_answer, write_preferences
from megadpo.demo.tiny_model import make_model

training, held_out = split_sums(held_out=20, seed=1)
write_preferences(Path("demo_run/data/preferences.jsonl"), training)
write_preferences(Path("demo_run/data/held_out.jsonl"), held_out)
make_model(Path("demo_run/sft/model"), [question(a, b) + worked_answer(a, b) for a, b in training], seed=1)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        ".",
    ]
    subprocess.run(command, cwd=source, check=True)
    (built,) = out.glob("*.whl")
    return built


def test_it_holds_everything_once(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (points,) = [name for name in names if name.endswith("entry_points.txt")]
        assert "megadpo = megadpo.commands:main" in archive.read(points).decode()
    for folder in ("configs", "launch"):
        files = [path for path in (REPOSITORY / folder).rglob("*.*") if "__pycache__" not in path.parts]
        beside = {f"megadpo/{path.relative_to(REPOSITORY)}" for path in files}
        assert {name for name in names if name.startswith(f"megadpo/{folder}/")} == beside
    files = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "megadpo").rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    assert files <= set(names), files - set(names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"megadpo"}


@pytest.mark.slow
@pytest.mark.distributed
def test_it_trains_the_demo_where_there_is_no_checkout(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv/bin/python"
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True)
    assert (tmp_path / "venv/bin/megadpo").read_text().count(str(python)) == 1  # it imports what is installed here
    (site / "everything_else.pth").write_text(sysconfig.get_path("purelib") + "\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PATH": f"{tmp_path}/venv/bin:{env['PATH']}"}

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    where = run(str(python), "-c", "import megadpo; print(megadpo.__file__)")
    assert where.startswith(str(site))
    run(str(python), "-c", DEMO_DATA)
    ranks = ["--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
    short = ["dpo.max_num_steps=3", "policy.megatron_cfg.scheduler.lr_warmup_iters=1", "dpo.val_at_start=false"]
    run("megadpo", "train", "demo", *ranks, *short)
    run("megadpo", "export", "demo_run/dpo/checkpoints", "trained")
    assert (tmp_path / "trained/model.safetensors").is_file()
