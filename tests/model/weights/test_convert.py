"""Hugging Face -> Megatron checkpoint -> Hugging Face: every tensor the same bits, every other file the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from megadpo.config.problems import ConfigError
from megadpo.families import read_architecture, weight_table
from megadpo.model.manifest import write_manifest
from megadpo.model.weights import copy_hf_files, export_hf, import_hf, is_megatron_folder, write_info
from megadpo.model.weights.convert import MODEL_FOLDER
from megadpo.model.weights.dist_folder import DistFolder
from tests.helpers.distributed import run_distributed
from tests.model.weights.hf_models import (
    CASES,
    MOE_CASES,
    SIDE_FILES,
    edit_config,
    make_hf_folder,
    read_tensors,
    whole_in_hf_names,
)
from tests.model.weights.model_worker import in_a_world_of_two

ALL_CASES = (*CASES, *MOE_CASES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {case: make_hf_folder(root / case, case) for case in ALL_CASES}


@pytest.fixture(scope="module")
def imported(folders, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("megatron")
    for case, folder in folders.items():
        import_hf(folder, root / case)
    return {case: root / case for case in folders}


def assert_same_tensors(got: Path, want: Path) -> None:
    tensors, expected = read_tensors(got), read_tensors(want)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


def assert_same_files(got: Path, want: Path) -> None:
    """All but weights, byte for byte."""

    def files(folder: Path) -> dict[str, bytes]:
        found = (path for path in folder.rglob("*") if path.is_file() and "safetensors" not in path.name)
        return {str(path.relative_to(folder)): path.read_bytes() for path in found}

    assert files(got) == files(want)
    assert files(got).keys() > SIDE_FILES.keys() | {"config.json"}


@pytest.mark.parametrize("case", ALL_CASES)
def test_round_trip(folders, imported, tmp_path, case):
    (tmp_path / ".hf.0123456789ab.partial" / "half").mkdir(parents=True)  # of an export that was killed
    export_hf(imported[case], tmp_path / "hf")
    assert_same_tensors(tmp_path / "hf", folders[case])
    assert_same_files(tmp_path / "hf", folders[case])
    assert ("lm_head.weight" in read_tensors(tmp_path / "hf")) == (case != "llama_tied")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]  # nothing of the writing stays behind


@pytest.mark.parametrize("case", ALL_CASES)
def test_the_export_opens_with_transformers_and_computes_the_same(folders, imported, tmp_path, case):
    from transformers import AutoModelForCausalLM

    export_hf(imported[case], tmp_path / "hf", max_file_bytes=20_000)
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        got, want = (
            AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager")(tokens).logits
            for folder in (tmp_path / "hf", folders[case])
        )
    assert torch.equal(got, want)


@pytest.mark.parametrize("case", MOE_CASES)
def test_experts_stacked_as_transformers_keeps_them_in_memory(folders, tmp_path, case):
    """They come out apart, as on the hub, and the same bits."""
    source = make_hf_folder(tmp_path / "source", case, stacked_experts=True)
    assert any(name.endswith("mlp.experts.gate_up_proj") for name in read_tensors(source))
    import_hf(source, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "hf")
    assert_same_tensors(tmp_path / "hf", folders[case])


def test_stacked_experts_of_another_count_are_refused(tmp_path):
    source = make_hf_folder(tmp_path / "source", "qwen3_moe", stacked_experts=True)
    edit_config(source, num_local_experts=3)
    lines = refusal(import_hf, source, tmp_path / "megatron")
    assert any("mlp.experts.down_proj" in line and "nothing uses" in line for line in lines)
    assert any("no such tensor" in line and "mlp.experts.2.down_proj" in line for line in lines)


def test_sharded_in_and_out(tmp_path):
    source = make_hf_folder(tmp_path / "source", "qwen3", max_shard_size="20KB")
    import_hf(source, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "hf", max_file_bytes=17_000)
    assert_same_tensors(tmp_path / "hf", source)
    assert_same_files(tmp_path / "hf", source)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    sizes = {name: t.numel() * t.itemsize for name, t in read_tensors(source).items()}
    assert index["metadata"]["total_size"] == sum(sizes.values()) and index["weight_map"].keys() == sizes.keys()
    for file in set(index["weight_map"].values()):
        held = [size for name, size in sizes.items() if index["weight_map"][name] == file]
        assert sum(held) <= 17_000 and (tmp_path / "hf" / file).stat().st_size >= sum(held)


@pytest.fixture(scope="module")
def world_of_two(folders, imported, tmp_path_factory) -> tuple[dict[str, Path], list[dict[str, torch.Tensor]]]:
    """Checkpoints that two ranks saved (tp 2 of qwen2, pp 2 of llama_tied), and qwen3's import loaded with tp 2."""
    root = tmp_path_factory.mktemp("saved")
    saves = [(str(folders[case]), str(root / case), tp, pp) for case, tp, pp in [("qwen2", 2, 1), ("llama_tied", 1, 2)]]
    loaded = run_distributed(in_a_world_of_two, 2, saves, str(imported["qwen3"]), init_process_group=False)
    return {case: root / case for case in ("qwen2", "llama_tied")}, loaded


@pytest.mark.distributed
def test_the_trainer_loads_the_import_in_another_layout(folders, world_of_two):
    got, want = whole_in_hf_names([world_of_two[1]]), read_tensors(folders["qwen3"])
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["qwen2", "llama_tied"])
def test_export_of_a_checkpoint_that_training_saved(folders, world_of_two, tmp_path, case):
    step = Path(shutil.copytree(world_of_two[0][case], tmp_path / "step"))
    copy_hf_files(folders[case], step / "hf")
    write_info(step, torch.float32, step=7)
    export_hf(step, tmp_path / "hf")
    assert_same_tensors(tmp_path / "hf", folders[case])
    assert_same_files(tmp_path / "hf", folders[case])


def test_layers_under_their_own_keys(folders, imported, tmp_path):
    """What megatron-core writes with `non_homogeneous_layers`: decoder.layers.0.mlp... without a layer dimension."""
    step = Path(shutil.copytree(imported["llama"], tmp_path / "step"))
    table = weight_table(read_architecture(folders["llama"]))
    stored = DistFolder(step / MODEL_FOLDER)
    state = {
        e.names[-1]: stored.read(region) for e, region in zip(table.entries, stored.find(table.entries), strict=True)
    }
    shutil.rmtree(step / MODEL_FOLDER)
    dcp.save(state, checkpoint_id=step / MODEL_FOLDER, no_dist=True)
    write_manifest(step)
    export_hf(step, tmp_path / "hf")
    assert_same_tensors(tmp_path / "hf", folders["llama"])


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_another_dtype_is_said_in_the_config(folders, tmp_path, key):
    source = Path(shutil.copytree(folders["qwen2"], tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype")
    (source / "config.json").write_text(json.dumps({**config, key: "float32"}))
    import_hf(source, tmp_path / "megatron", torch.bfloat16)
    info = json.loads((tmp_path / "megatron" / "megadpo.json").read_text())
    assert info == {"format": 1, "dtype": "bfloat16", "step": 0, "manifest": True}
    assert_same_files(tmp_path / "megatron" / "hf", source)
    export_hf(tmp_path / "megatron", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == {**config, key: "bfloat16"}
    for name, tensor in read_tensors(source).items():
        assert torch.equal(read_tensors(tmp_path / "hf")[name], tensor.bfloat16())


def test_weights_of_several_dtypes(folders, tmp_path):
    from safetensors.torch import save_file

    source = Path(shutil.copytree(folders["mistral"], tmp_path / "source"))
    tensors = {n: t.float() if "norm" in n else t for n, t in read_tensors(source).items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    import_hf(source, tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "hf")
    assert_same_tensors(tmp_path / "hf", source)
    assert_same_files(tmp_path / "hf", source)


def test_weights_of_other_formats_are_not_copied(tmp_path):
    kept = {"a.json", "nested/b.txt", "pytorch_model.txt"}
    left = {"m.bin", "m.safetensors", "m.safetensors.index.json", "pytorch_model.bin.index.json", "original/c.00.pth",
            "x.gguf", ".cache/y.json", ".gitattributes"}  # fmt: skip
    for name in kept | left:
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_text(name)
    copy_hf_files(tmp_path / "from", tmp_path / "to")
    assert {str(p.relative_to(tmp_path / "to")) for p in (tmp_path / "to").rglob("*") if p.is_file()} == kept


def refusal(function, *arguments) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    return [str(problem) for problem in caught.value.problems]


def test_a_target_with_something_in_it_is_left_alone(folders, imported, tmp_path):
    (tmp_path / "kept").write_text("mine")
    for line in (*refusal(import_hf, folders["llama"], tmp_path), *refusal(export_hf, imported["llama"], tmp_path)):
        assert str(tmp_path) in line and "something there already" in line
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    (tmp_path / "empty").mkdir()
    export_hf(imported["llama"], tmp_path / "empty")  # an empty folder is as good as none
    assert (tmp_path / "empty" / "config.json").exists()


def test_a_target_that_cannot_be_written(folders, tmp_path):
    (tmp_path / "file").write_text("")
    (line,) = refusal(import_hf, folders["llama"], tmp_path / "file" / "megatron")
    assert "a place that can be written" in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_nothing(folders, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megadpo.model.weights.convert.load_shard", full)
    with pytest.raises(OSError, match="No space left"):
        import_hf(folders["llama"], tmp_path / "megatron")
    assert list(tmp_path.iterdir()) == []


def test_an_import_that_was_broken_later_is_refused_with_the_reason(imported, tmp_path):
    """One of a version that wrote no manifest, too."""
    broken = Path(shutil.copytree(imported["llama"], tmp_path / "megatron"))
    (broken / "manifest.json").unlink()
    info = json.loads((broken / "megadpo.json").read_text())
    (broken / "megadpo.json").write_text(json.dumps({**info, "manifest": False}))
    (broken / "model" / "__2_0.distcp").unlink()
    (line,) = refusal(export_hf, broken, tmp_path / "hf")
    assert "__2_0.distcp" in line and ".distcp files" in line
    file = broken / "model" / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:300])
    (line,) = refusal(export_hf, broken, tmp_path / "hf")
    assert "decoder.layers." in line
    (broken / "model" / ".metadata").unlink()
    (line,) = refusal(export_hf, broken, tmp_path / "hf")
    assert ".metadata" in line
    (broken / "megadpo.json").unlink()
    assert not is_megatron_folder(broken)
    (line,) = refusal(export_hf, broken, tmp_path / "hf")
    assert "no megadpo.json" in line
    assert not (tmp_path / "hf").exists()


def test_a_checkpoint_of_another_architecture_names_every_difference(imported, tmp_path):
    broken = Path(shutil.copytree(imported["llama"], tmp_path / "megatron"))
    edit_config(broken / "hf", intermediate_size=48, num_hidden_layers=5)
    write_manifest(broken)
    lines = refusal(export_hf, broken, tmp_path / "hf")
    assert sum("got (80, 24); expected shape (96, 24)" in line for line in lines) == 4
    assert sum("no such tensor" in line and "decoder.layers.4." in line for line in lines) == 6
