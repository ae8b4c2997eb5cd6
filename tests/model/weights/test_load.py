"""Hugging Face folder -> parameters of megatron-core's model, for every family and layout, and every broken folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megadpo.config.grid import Grid
from megadpo.config.problems import ConfigError
from megadpo.families import read_architecture
from megadpo.model.weights import load_hf_weights
from megadpo.model.weights.hf_folder import HfWeights
from megadpo.model.weights.load import named_global_parameters
from tests.helpers.distributed import run_distributed
from tests.model.weights.hf_models import CASES, LAYERS, MOE_CASES, make_hf_folder, read_tensors, whole_in_hf_names
from tests.model.weights.model_worker import load_in_every_layout
from tests.model.weights.stub import Stub

LAYOUTS = [(1, 1), (2, 1), (2, 2)]  # (tensor, pipeline)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {case: make_hf_folder(root / case, case) for case in CASES}


@pytest.fixture(scope="module")
def loaded(folders):
    paths = {case: str(folder) for case, folder in folders.items()}
    return run_distributed(load_in_every_layout, 1, paths, LAYOUTS, init_process_group=False)[0]


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_every_layout_holds_the_folder_bit_for_bit(folders, loaded, case, tp, pp):
    stages = loaded[case, tp, pp]
    assert [len(ranks) for ranks in stages] == [tp] * pp
    got, want = whole_in_hf_names(stages), read_tensors(folders[case])
    if case == "llama_tied" and pp > 1:  # the last stage's own copy of the embedding
        assert torch.equal(got.pop("lm_head.weight"), want["model.embed_tokens.weight"])
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor.float()), name


def test_transformer_engines_names_of_the_norms(folders):
    names = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
    model = Stub({f"decoder.layers.0.{name}": torch.zeros(24) for name in names}, first_layer=2)
    load_hf_weights([model], read_architecture(folders["llama"]), folders["llama"], Grid(tensor=2))
    want = read_tensors(folders["llama"])
    layer = model.decoder.layers.get_submodule("0")
    assert torch.equal(layer.self_attention.linear_qkv.layer_norm_weight, want["model.layers.2.input_layernorm.weight"])
    assert torch.equal(layer.mlp.linear_fc1.layer_norm_weight, want["model.layers.2.post_attention_layernorm.weight"])


def test_casts_to_the_dtype_of_the_parameter(folders):
    model = Stub({"decoder.layers.0.mlp.linear_fc2.weight": torch.zeros(24, 20, dtype=torch.bfloat16)})
    load_hf_weights([model], read_architecture(folders["llama"]), folders["llama"], Grid(tensor=2, rank=1))
    want = read_tensors(folders["llama"])["model.layers.0.mlp.down_proj.weight"][:, 20:]
    got = model.get_parameter("decoder.layers.0.mlp.linear_fc2.weight")
    assert got.dtype == torch.bfloat16 and torch.equal(got, want.bfloat16())


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("case", MOE_CASES)
def test_experts_of_a_rank(tmp_path, case, stacked):
    """Expert rank 1 of 2 holds experts 2 and 3; each is cut over the expert-tensor ranks, not the tensor-parallel ones.
    Under both names: megatron-core's experts one by one, and Transformer Engine's in groups."""
    folder = make_hf_folder(tmp_path / "hf", case, stacked_experts=stacked)
    want = read_tensors(make_hf_folder(tmp_path / "apart", case))
    names = [name for name in want if name.startswith("model.layers.3.") and ".experts.3." in name]
    ups = sorted(name for name in names if "down" not in name and "w2" not in name)
    (down,) = set(names) - set(ups)
    ffn = want[down].shape[1]
    full = torch.cat([want[name][ffn // 2 :] for name in ups])  # gate, up; w1, w3
    layer = "decoder.layers.1.mlp.experts."
    model = Stub(
        {
            f"{layer}local_experts.1.linear_fc1.weight": torch.zeros(full.shape),
            f"{layer}local_experts.1.linear_fc2.weight": torch.zeros(24 if case != "qwen2_moe" else 32, ffn // 2),
            f"{layer}linear_fc1.weight1": torch.zeros(full.shape),
        },
        first_layer=2,
    )
    place = Grid(tensor=4, expert=2, expert_tensor=2, rank=3)
    load_hf_weights([model], read_architecture(folder), folder, place)
    assert torch.equal(model.get_parameter(f"{layer}local_experts.1.linear_fc1.weight"), full)
    assert torch.equal(model.get_parameter(f"{layer}linear_fc1.weight1"), full)
    assert torch.equal(model.get_parameter(f"{layer}local_experts.1.linear_fc2.weight"), want[down][:, ffn // 2 :])


def test_wrappers_are_looked_through():
    float16, ddp = torch.nn.Module(), torch.nn.Module()
    float16.module, ddp.module = Stub({"decoder.layers.0.x": torch.zeros(1)}, first_layer=3), float16
    assert [name for name, _ in named_global_parameters(ddp)] == ["decoder.layers.3.x"]


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_experts_are_numbered_over_the_whole_layer(part):
    """In sequence (local_experts) and in groups (linear_fc1.weight0)."""
    experts = "decoder.layers.0.mlp.experts."
    names = [f"local_experts.1.linear_fc2.{part}", f"linear_fc1.{part}0", f"linear_fc2.{part}1"]
    model = Stub({experts + name: torch.zeros(1) for name in names})
    wanted = [f"local_experts.5.linear_fc2.{part}", f"linear_fc1.{part}4", f"linear_fc2.{part}5"]
    found = [name for name, _ in named_global_parameters(model, first_expert=4)]
    assert found == [experts + name for name in wanted]


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("decoder.layers.0.mlp.router.weight", (2, 24), "no row for parameter decoder.layers.0.mlp.router.weight"),
        ("decoder.layers.0.mlp.linear_fc2.weight", (24, 40), r"has shape \(24, 40\); \(24, 20\) by the weight table"),
    ],
)
def test_a_model_that_is_not_the_tables_is_refused(folders, name, shape, message):
    model = Stub({name: torch.zeros(shape)})
    with pytest.raises(ValueError, match=message):
        load_hf_weights([model], read_architecture(folders["llama"]), folders["llama"], Grid(tensor=2))


def refusal(folder: Path, config_from: Path) -> list[str]:
    """What load_hf_weights says of a folder, one line a problem."""
    with pytest.raises(ConfigError) as caught:
        load_hf_weights([], read_architecture(config_from), folder, Grid())
    return [str(problem) for problem in caught.value.problems]


@pytest.fixture
def copy(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders["llama"], tmp_path / "model"))


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of model.safetensors. Dots in names are written as two underscores."""
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        key = name.replace("__", ".")
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_misshapen_unused_and_quantised_tensors_are_all_named(copy):
    rewrite(
        copy,
        model__norm__weight=None,
        lm_head__weight=torch.zeros(64, 25),
        model__layers__1__mlp__up_proj__weight=torch.zeros(40, 24, dtype=torch.float8_e4m3fn),
        lora_A__weight=torch.zeros(2),
    )
    lines = refusal(copy, copy)
    assert len(lines) == 4
    found = {word: next(line for line in lines if word in line) for word in ("norm", "lm_head", "up_proj", "lora_A")}
    assert "no such tensor" in found["norm"] and "expected model.norm.weight" in found["norm"]
    assert "got (64, 25); expected shape (64, 24)" in found["lm_head"]
    assert "F8_E4M3" in found["up_proj"] and "unquantised" in found["up_proj"]
    assert "nothing uses" in found["lora_A"] and "model.safetensors: lora_A.weight" in found["lora_A"]


def test_buffers_of_old_transformers_are_passed_over(copy):
    rewrite(copy, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4))
    load_hf_weights([], read_architecture(copy), copy, Grid())


def test_a_router_under_its_other_name(tmp_path):
    """As transformers 5 calls it in memory; under both names one is too many."""
    folder = make_hf_folder(tmp_path / "hf", "mixtral")
    tensors = load_file(folder / "model.safetensors")
    routers = {
        n: n.replace("block_sparse_moe.gate", "mlp.gate") for n in tensors if n.endswith("block_sparse_moe.gate.weight")
    }
    assert len(routers) == LAYERS
    other = {routers.get(name, name): tensor for name, tensor in tensors.items()}
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})
    model = Stub({"decoder.layers.0.mlp.router.weight": torch.zeros(4, 24)}, first_layer=1)
    load_hf_weights([model], read_architecture(folder), folder, Grid())
    want = tensors["model.layers.1.block_sparse_moe.gate.weight"]
    assert torch.equal(model.get_parameter("decoder.layers.0.mlp.router.weight"), want)
    both = tensors | {name: tensor.clone() for name, tensor in other.items()}
    save_file(both, folder / "model.safetensors", metadata={"format": "pt"})
    lines = refusal(folder, folder)
    assert len(lines) == LAYERS and all("nothing uses" in line and "mlp.gate.weight" in line for line in lines)


def test_a_tied_model_saved_with_its_head(folders, tmp_path):
    folder = Path(shutil.copytree(folders["llama_tied"], tmp_path / "model"))
    head = read_tensors(folder)["model.embed_tokens.weight"].clone()
    rewrite(folder, lm_head__weight=head)
    load_hf_weights([], read_architecture(folder), folder, Grid())
    head[63, 23] += 1  # transformers takes it for a head of its own
    for other in (head, head[:63]):
        rewrite(folder, lm_head__weight=other)
        [line] = refusal(folder, folder)
        assert "lm_head.weight" in line and "tie_word_embeddings" in line
    # An untied model's head is a weight like any other.
    assert any("lm_head" in line for line in refusal(folders["llama_tied"], folders["llama"]))


def test_a_file_that_was_cut_short(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (line,) = refusal(copy, copy)
    assert str(file) in line and "expected a whole safetensors file" in line


def test_only_pickled_weights(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    (line,) = refusal(copy, copy)
    assert "pytorch_model.bin" in line and "save_pretrained" in line


def test_no_weights_at_all(copy):
    (copy / "model.safetensors").unlink()
    (line,) = refusal(copy, copy)
    assert "no weight files" in line and "model.safetensors.index.json" in line


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = make_hf_folder(tmp_path_factory.mktemp("sharded") / "model", "llama", max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > LAYERS
    return folder


def test_sharded_files(sharded):
    model = Stub({"decoder.layers.0.mlp.linear_fc1.weight": torch.zeros(80, 24)})
    load_hf_weights([model], read_architecture(sharded), sharded, Grid())
    want = read_tensors(sharded)
    parts = [want[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(model.get_parameter("decoder.layers.0.mlp.linear_fc1.weight"), torch.cat(parts))


def test_sharded_files_missing_or_wrongly_indexed(sharded, tmp_path):
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    gone, cut, *_ = sorted(folder.glob("model-*.safetensors"))
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:50])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.layers.3.mlp.up_proj.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    lines = refusal(folder, folder)
    assert [word for word in (gone.name, cut.name) if not any(word in line for line in lines)] == []
    assert any("no such tensor" in line and "lm_head.weight" in line for line in lines) and len(lines) == 3


OUTSIDE = ['{"weight_map": {"a": "/etc/passwd"}}', '{"weight_map": {"a": "x/../../b.safetensors"}}']


@pytest.mark.parametrize("text", ["{", '{"metadata": {}}', '{"weight_map": ["a"]}', *OUTSIDE])
def test_a_broken_index(sharded, tmp_path, text):
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    (folder / "model.safetensors.index.json").write_text(text)
    (line,) = refusal(folder, folder)
    assert "index.json" in line and "weight_map" in line and ("is not in this folder" in line) == (text in OUTSIDE)


def test_headers_alone_answer_the_check(folders):
    weights = HfWeights.open(folders["mistral"])
    assert weights.dtype(["lm_head.weight"]) == torch.bfloat16
    assert weights.tensors["lm_head.weight"].shape == (64, 24)
