"""A Llama-shaped family is one file of at most 60 lines: the one that docs/add-a-family.md shows, from outside the package, is
checked, planned, trained and exported like ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megadpo.commands import main
from megadpo.config import ConfigError
from megadpo.config.variants import FAMILIES, import_plugins
from megadpo.families import parse_architecture, weight_table
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config, make_model, read_metrics, train
from tests.model.weights.hf_models import read_tensors

PAGE = Path(__file__).parents[2] / "docs" / "add-a-family.md"
PLUGIN = PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
"""The file that the page shows."""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("plugin") / "tiny_llama.py"
    path.write_text(PLUGIN)
    import_plugins([str(path)])
    yield str(path)
    FAMILIES.remove("tiny_llama")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a TinyLlama computes, as a Llama."""
    return make_model(tmp_path_factory.mktemp("llama") / "model", "llama", rms_norm_eps=1e-3, num_hidden_layers=2)


@pytest.fixture(scope="module")
def tiny(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(llama, tmp_path_factory.mktemp("tiny") / "model"))
    config = json.loads((folder / "config.json").read_text())
    del config["rms_norm_eps"], config["max_position_embeddings"]
    config |= {"architectures": ["TinyLlamaForCausalLM"], "model_type": "tiny_llama"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(renamed(read_tensors(folder)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("mlp.down_proj", "mlp.out_proj"): tensor for name, tensor in tensors.items()}


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name, tensor in want.items() if not torch.equal(got[name], tensor)] == []


def test_it_is_read_and_refused_like_ours(plugin: str, tiny: Path) -> None:
    assert len(PLUGIN.splitlines()) <= 60
    raw = json.loads((tiny / "config.json").read_text())
    arch = parse_architecture(raw)
    assert (arch.family, arch.hf_class) == ("tiny_llama", "TinyLlamaForCausalLM")
    assert (arch.norms.eps, arch.max_position_embeddings) == (1e-3, 128)
    assert "model.layers.1.mlp.out_proj.weight" in weight_table(arch).hf_shapes
    with pytest.raises(ConfigError) as caught:
        parse_architecture({**raw, "window": 7, "attention_bias": True})
    assert [one.where for one in caught.value.problems] == ["config.json: window", "config.json: attention_bias"]
    with pytest.raises(ConfigError, match="TinyLlamaForCausalLM"):  # among the classes that there are
        parse_architecture({**raw, "architectures": ["BertModel"]})


def test_it_is_checked_and_planned(plugin: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(make_config(tmp_path, tiny))
    assert main(["check", config, f"plugins=[{plugin}]"]) == 0
    assert "no problem found" in capsys.readouterr().out
    lengths = ["--world-size", "2", "--lengths", "30,10,10"]
    assert main(["plan", config, f"plugins=[{plugin}]", "policy.device=cpu", *lengths]) == 0
    assert "TinyLlamaForCausalLM, 2 layers, on 2 ranks" in capsys.readouterr().out


def test_there_and_back_bit_for_bit(plugin: str, tiny: Path, tmp_path: Path) -> None:
    megatron, back = str(tmp_path / "megatron"), tmp_path / "back"
    assert main(["import", str(tiny), megatron, "--plugin", plugin]) == 0
    assert main(["export", megatron, str(back), "--plugin", plugin]) == 0
    assert_same(read_tensors(back), read_tensors(tiny))
    assert (back / "config.json").read_bytes() == (tiny / "config.json").read_bytes()


@pytest.mark.distributed
def test_it_trains_to_the_bits_of_the_llama_that_it_is(plugin: str, llama: Path, tiny: Path, tmp_path: Path) -> None:
    exported, metrics = {}, {}
    for name, model, overrides in (("llama", llama, []), ("tiny", tiny, [f"plugins=[{plugin}]"])):
        folder = tmp_path / name
        folder.mkdir()
        config = make_config(folder, model, pairs=16, dpo={"max_num_steps": 2}, checkpointing={"enabled": True})
        assert run_distributed(train, 1, str(config), overrides, init_process_group=False) == [0]
        metrics[name] = [(row["train/loss"], row["train/grad_norm"]) for row in read_metrics(folder / "logs")]
        step = folder / "checkpoints" / "step_2"
        assert main(["export", str(step), str(folder / "hf"), "--plugin", plugin]) == 0
        exported[name] = read_tensors(folder / "hf")
    assert len(metrics["tiny"]) == 2 and metrics["tiny"] == metrics["llama"]
    assert_same(exported["tiny"], renamed(exported["llama"]))
