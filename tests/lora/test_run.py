"""Runs with LoRA: the reference for nothing, resume, and PEFT's format in and out."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megadpo.config.problems import ConfigError
from megadpo.lora.export import export
from megadpo.model.weights.safe_files import read_metadata
from tests.config.nemo_rl.test_translate import MEGATRON_ON, NEMO
from tests.helpers.distributed import run_distributed
from tests.helpers.overrides import DIST, PP2, SP, TP2
from tests.helpers.runs import evaluate, make_config, make_model, make_pairs, read_metrics, train_and_read
from tests.train.test_logps import some_pairs, transformers_logps
from tests.train.test_resume import SAVING, bits, go

MEG = "policy.megatron_cfg"
MODULES = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
PEFT = {"enabled": True, "dim": 4, "alpha": 16, "target_modules": MODULES}


def lora_config(folder: Path, model: Path, peft: dict | None = None, **sections) -> Path:
    folder.mkdir(exist_ok=True)
    megatron = {"peft": {**PEFT, **(peft or {})}}
    return make_config(folder, model, policy={"megatron_cfg": megatron}, checkpointing=SAVING, **sections)


def logps(source: str, init_from: str | None, peft: dict, tensor: int, pipeline: int) -> list[torch.Tensor]:
    """Target for run_distributed: of some_pairs, on the last stage; [] elsewhere."""
    from megadpo.checkpoint import load_weights
    from megadpo.config.grid import Grid
    from megadpo.config.schema_megatron import MegatronConfig
    from megadpo.config.schema_peft import PeftConfig
    from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
    from megadpo.data.batches.pack import pack_pairs
    from megadpo.families import read_architecture
    from megadpo.lora.attach import attach
    from megadpo.lora.peft_folder import read_peft
    from megadpo.model.build import build_model
    from megadpo.model.source import resolve_source
    from megadpo.parallel import initialize, setup_device
    from megadpo.reference import ResidentReference

    parallel = initialize(Grid(tensor=tensor, pipeline=pipeline), setup_device("auto"))
    found = resolve_source(source, "policy.model_name")
    arch = read_architecture(found.hf_files)
    sizes = MegatronConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    policy = PolicyConfig(
        model_name=source, tokenizer=TokenizerConfig(name=source), precision="float32", megatron_cfg=sizes
    )
    model = build_model(arch, policy, parallel, frozen=True)
    load_weights(model, found, arch, parallel)
    if init_from is not None:
        config = PeftConfig(**{**peft, "target_modules": tuple(peft["target_modules"])})
        read_peft(init_from, "init_from", arch).load(attach(model, arch, config, parallel))
    pack = pack_pairs(some_pairs(), share_prompt=True, pad_to_multiple=8, pad_token_id=0)
    return ResidentReference(model, parallel).logps([pack])


def peft_logps(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel

    return transformers_logps(base, lambda model: PeftModel.from_pretrained(model, str(adapter)).eval())


def largest_error(ranks: list[list[torch.Tensor]], want: torch.Tensor) -> float:
    found = [float(((got.double() - want) / want).abs().max()) for rank in ranks for got in rank]
    assert found
    return max(found)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory) -> Path:
    """A folder with a run of four steps, in two parts, on one process."""
    folder = tmp_path_factory.mktemp("trained")
    config = lora_config(folder, model, dpo={"val_at_end": True, "val_batches": 0})
    go(config, 1, [], 2)
    go(config, 1, [], 4)
    return folder


@pytest.mark.distributed
def test_the_reference_is_the_model_without_its_adapters(trained):
    steps = read_metrics(trained / "logs")
    assert steps[0]["train/preference_loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert steps[0]["train/rewards/margins"] == 0.0
    assert abs(steps[-1]["train/rewards/margins"]) > 1e-4


@pytest.mark.distributed
@pytest.mark.parametrize("mode", ["resident", "cached"])
def test_other_ways_to_the_reference_give_the_same_numbers(mode, model, trained, tmp_path):
    go(lora_config(tmp_path, model), 1, [f"dpo.reference.mode={mode}"], 2)
    for mine, theirs in zip(read_metrics(tmp_path / "logs"), read_metrics(trained / "logs"), strict=False):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-6)


@pytest.mark.distributed
def test_a_resumed_run_has_the_same_bits(model, trained, tmp_path):
    config = lora_config(tmp_path / "whole", model)
    go(config, 1, [], 4)
    assert bits(trained, range(1, 5)) == bits(tmp_path / "whole", range(1, 5))
    stored = read_metadata(tmp_path / "whole/checkpoints/step_4/model").state_dict_metadata
    tensors = [key for key, one in stored.items() if isinstance(one, TensorStorageMetadata)]
    assert len(tensors) == 3 * 2 * len(MODULES) * 4  # A and B in 4 layers, and two moments of each
    assert all(".lora." in key for key in tensors)


@pytest.mark.distributed
def test_dropout_goes_on_with_the_same_numbers(model, tmp_path):
    overrides = [TP2, SP, DIST, "policy.precision=bfloat16"]
    configs = [lora_config(tmp_path / name, model, {"dropout": 0.3}) for name in ("whole", "parts")]
    go(configs[0], 2, overrides, 3)
    go(configs[1], 2, overrides, 2)
    go(configs[1], 2, overrides, 3)
    whole, parts = (bits(config.parent, range(1, 4)) for config in configs)
    assert parts == whole and len(whole) == 3


@pytest.mark.distributed
def test_a_run_goes_on_in_another_layout(model, trained, tmp_path):
    config = lora_config(tmp_path, model)
    go(config, 1, [], 2)
    go(config, 4, [TP2, SP, PP2], 4)
    for mine, theirs in zip(read_metrics(tmp_path / "logs"), read_metrics(trained / "logs"), strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
        assert mine["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-5)


def other_base(folder: Path, model: Path) -> Path:
    """`model` with one number changed."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def refused(config: Path, overrides: list[str], *words: str) -> None:
    [(code, printed)] = run_distributed(train_and_read, 1, str(config), overrides, init_process_group=False)
    assert code == 2 and all(word in printed for word in words), printed


@pytest.mark.distributed
def test_a_run_goes_on_with_its_base_and_its_adapters_only(model, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    steps = "dpo.max_num_steps=6"
    overrides = [f"checkpointing.checkpoint_dir={tmp_path}/run/checkpoints", f"logger.log_dir={tmp_path}/logs", steps]
    other = other_base(tmp_path / "other", model)
    config = trained / "config.yaml"
    refused(
        config, [*overrides, f"policy.model_name={other}"], "policy.model_name: got", "with the weights that it had"
    )
    refused(config, [*overrides, f"{MEG}.peft.dim=2"], f"{MEG}.peft: got")
    step = trained / "checkpoints/step_4"
    refused(config, [f"policy.model_name={step}", "checkpointing.enabled=false"], "a whole model to train")


@pytest.mark.distributed
def test_adapters_that_one_pipeline_stage_has(model, tmp_path):
    """Trained, resumed and evaluated as on one process."""
    peft, every_pair = {"target_modules": ["layers.0.self_attn.q_proj"]}, {"val_at_end": True, "val_batches": 0}
    config, one = (lora_config(tmp_path / name, model, peft, dpo=every_pair) for name in ("run", "one"))
    go(config, 2, [PP2], 2)
    go(config, 2, [PP2], 3)
    go(one, 1, [], 3)
    for mine, theirs in zip(read_metrics(tmp_path / "run/logs"), read_metrics(tmp_path / "one/logs"), strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-5)
    found = [f"policy.model_name={tmp_path}/run/checkpoints/step_3", f"logger.log_dir={tmp_path}/found", PP2]
    assert run_distributed(evaluate, 2, str(config), found, init_process_group=False) == [0, 0]
    margins = "validation-held_out/rewards/margins"
    evaluated = json.loads((tmp_path / "found/evaluation.json").read_text())
    assert evaluated[margins] == pytest.approx(read_metrics(tmp_path / "run/logs")[-1][margins], abs=1e-6)


@pytest.mark.distributed
def test_evaluating_checkpoints_of_a_run(trained, tmp_path):
    """Each of its own adapters, against the base; the last one's numbers are the run's own validation."""
    named = ["--checkpoint", str(trained / "checkpoints"), f"logger.log_dir={tmp_path}", TP2, SP]
    assert run_distributed(evaluate, 2, str(trained / "config.yaml"), named, init_process_group=False) == [0, 0]
    margins = {
        step: json.loads((tmp_path / f"step_{step}/evaluation.json").read_text())["validation-held_out/rewards/margins"]
        for step in (2, 4)
    }
    assert margins[4] == pytest.approx(
        read_metrics(trained / "logs")[-1]["validation-held_out/rewards/margins"], rel=1e-3
    )
    assert abs(margins[4] - margins[2]) > 1e-3 * abs(margins[4])


@pytest.mark.distributed
def test_nemo_rls_file_with_the_overrides_of_its_own_lora_test(tmp_path):
    model = make_model(tmp_path / "model", "qwen3", hidden_size=32, max_position_embeddings=1024)
    names = {name: make_pairs(tmp_path / f"{name}.jsonl", 12) for name in ("t", "v")}
    theirs = [f"{MEG}.peft.enabled=true", f"{MEG}.peft.dim=32", "logger.monitor_gpus=true", "dpo.max_num_steps=3",
              "policy.train_global_batch_size=4", "dpo.val_period=2"]  # fmt: skip
    ours = [f"policy.model_name={model}", f"policy.tokenizer.name={model}", f"logger.log_dir={tmp_path}/logs",
            f"data.train_data_path={names['t']}", f"data.val_data_paths={names['v']}", "policy.device=cpu",
            "cluster.gpus_per_node=2", f"checkpointing.checkpoint_dir={tmp_path}/checkpoints"]  # fmt: skip
    overrides = [*MEGATRON_ON, *theirs, *ours]
    ranks = run_distributed(train_and_read, 2, str(NEMO), overrides, init_process_group=False)
    assert [code for code, _ in ranks] == [0, 0], ranks
    records = read_metrics(tmp_path / "logs")
    assert [record["step"] for record in records] == [0, 1, 2, 3]  # 0: validation at the start
    assert records[1]["train/preference_loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "overrides",
    [
        [f"{MEG}.peft={{enabled: true, dim: 2, target_modules: ['*.layers.3.*.linear_fc2']}}", PP2, DIST],
        [f"{MEG}.peft={{enabled: true, dim: 2, lora_dtype: float32}}", "policy.precision=bfloat16", TP2, DIST],
    ],
    ids=["a stage without adapters", "float32 beside bfloat16"],
)
def test_stages_and_dtypes_of_their_own(overrides, model, tmp_path):
    config = make_config(tmp_path, model)
    go(config, 2, overrides, 3)
    assert all(step["train/grad_norm"] > 0 for step in read_metrics(tmp_path / "logs"))


@pytest.mark.distributed
def test_peft_opens_the_export_and_a_merged_model_is_the_same(model, trained, tmp_path):
    step = trained / "checkpoints/step_4"
    export(step, tmp_path / "adapter")
    export(step, tmp_path / "merged", merge=True)
    want = peft_logps(model, tmp_path / "adapter")
    base = transformers_logps(model)
    assert float(((want - base) / base).abs().max()) > 1e-3  # it was trained
    assert largest_error([[transformers_logps(tmp_path / "merged")]], want) < 1e-5
    assert largest_error(run_distributed(logps, 1, str(step), None, PEFT, 1, 1, init_process_group=False), want) < 1e-5
    start = (str(model), str(tmp_path / "adapter"), PEFT, 2, 2)
    assert largest_error(run_distributed(logps, 4, *start, init_process_group=False), want) < 1e-5
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 16, sorted(MODULES))
    assert config["base_model_name_or_path"] == str(model)
    assert "LoRA adapters of rank 4, scale 4, on q_proj" in (tmp_path / "adapter/README.md").read_text()
    assert (tmp_path / "adapter/tokenizer.json").exists() and not (tmp_path / "adapter/config.json").exists()


@pytest.mark.distributed
def test_what_an_export_needs_of_the_base(model, trained, tmp_path):
    step = trained / "checkpoints/step_4"
    quantised = shutil.copytree(model, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ConfigError, match="quantization_config"):
        export(step, tmp_path / "merged", merge=True, base=str(quantised))
    other = other_base(tmp_path / "other", model)
    with pytest.raises(ConfigError, match="with the weights that it had"):
        export(step, tmp_path / "merged", merge=True, base=str(other))
    assert not (tmp_path / "merged").exists()
    moved = shutil.copytree(model, tmp_path / "moved")
    export(step, tmp_path / "merged", merge=True, base=str(moved), dtype=torch.bfloat16)
    got, want = load_file(tmp_path / "merged/model.safetensors"), load_file(model / "model.safetensors")
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    changed = {name for name, tensor in want.items() if not torch.equal(got[name], tensor.bfloat16())}
    assert {name.split(".")[-2] for name in changed} == set(MODULES)
