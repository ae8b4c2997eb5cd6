"""`megadpo import` and `megadpo export` as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

from megadpo.commands import main
from tests.model.weights.hf_models import make_hf_folder, read_tensors


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """In a folder that is not the repository."""
    command = [sys.executable, "-m", "megadpo", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_there_and_back_by_command(tmp_path):
    source = make_hf_folder(tmp_path / "source", "qwen3")
    there = run(tmp_path, "import", "source", "megatron", "--dtype", "bfloat16")
    assert there.returncode == 0, there.stderr
    assert (there.stdout, there.stderr) == ("wrote megatron\n", "")
    assert main(["export", str(tmp_path / "megatron"), str(tmp_path / "back")]) == 0
    got, want = read_tensors(tmp_path / "back"), read_tensors(source)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor.bfloat16()) for name, tensor in want.items())


def test_an_export_is_rounded_where_a_dtype_is_asked_for(tmp_path):
    source = make_hf_folder(tmp_path / "source", "qwen3")
    assert main(["import", str(source), str(tmp_path / "megatron")]) == 0
    assert main(["export", str(tmp_path / "megatron"), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    got, want = read_tensors(tmp_path / "half"), read_tensors(source)
    assert all(torch.equal(got[name], tensor.bfloat16()) for name, tensor in want.items())
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


def test_refusals_exit_with_2_and_name_the_problem(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    assert main(["import", empty, str(tmp_path / "megatron")]) == 2
    assert "  HF_FOLDER: got " in (said := capsys.readouterr().err) and "config.json" in said
    assert main(["export", empty, str(tmp_path / "hf")]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err


def test_what_is_for_adapters_only(tmp_path, capsys):
    source = make_hf_folder(tmp_path / "source", "qwen3")
    assert main(["import", str(source), str(tmp_path / "megatron")]) == 0
    for option, named in ((["--merge"], "--merge"), (["--base", str(source)], "--base")):
        assert main(["export", str(tmp_path / "megatron"), str(tmp_path / "hf"), *option]) == 2
        assert f"{named}: got" in capsys.readouterr().err


def test_an_export_is_uploaded_whole(tmp_path, capsys, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, **how):
            calls.append((name, how))
            return f"https://hub/{name}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            if repo_id == "me/closed":
                raise OSError("403 Forbidden: not yours\nsecond line")
            calls.append((repo_id, {path.name for path in Path(folder_path).iterdir()}))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    source = make_hf_folder(tmp_path / "source", "llama")
    megatron = str(tmp_path / "megatron")
    assert main(["import", str(source), megatron]) == 0
    out = str(tmp_path / "open")
    assert main(["export", megatron, out, "--push-to-hub", "me/model"]) == 0
    assert calls == [
        ("me/model", {"private": True, "exist_ok": True}),
        ("me/model", {path.name for path in source.iterdir()}),
    ]
    assert "uploaded to https://hub/me/model" in capsys.readouterr().out
    closed = str(tmp_path / "closed")
    assert main(["export", megatron, closed, "--push-to-hub", "me/closed"]) == 2
    said = capsys.readouterr()
    assert "403 Forbidden: not yours)" in said.err and f"hf upload me/closed {closed}" in said.err
    assert f"wrote {closed}" in said.out and (tmp_path / "closed/model.safetensors").is_file()
