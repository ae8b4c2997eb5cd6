"""The spec of Transformer Engine's layers, with stand-ins for its modules: names, weights both ways, checkpoints."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import megatron.core
import pytest
import torch
from safetensors.torch import load_file

from megadpo.config.schema_megatron import MegatronConfig
from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
from tests.families.cases import make_case
from tests.helpers import te_stand_ins
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config, make_model, read_metrics, train
from tests.model.kernels.test_kernels import random_pairs
from tests.model.weights.hf_models import make_hf_folder

WRAPPERS = {
    "TELayerNormColumnParallelLinear": te_stand_ins.StandInColumn,  # its stand-in hands everything on to this one
    "TEColumnParallelLinear": te_stand_ins.StandInColumn,
    "TERowParallelLinear": te_stand_ins.StandInRow,
    "TEColumnParallelGroupedLinear": te_stand_ins.StandInGrouped,
    "TERowParallelGroupedLinear": te_stand_ins.StandInGrouped,
}
NEWER = {"name"}
"""Arguments that megatron-core 0.19's wrappers take and 0.16.1's don't."""
MEG = "policy.megatron_cfg"


@pytest.mark.parametrize("name", WRAPPERS)
def test_stand_ins_take_what_megatron_cores_wrappers_take(name):
    """By the source: without Transformer Engine the classes can't be imported. That the wrappers fit Transformer
    Engine itself, its wheel alone can show."""
    source = Path(megatron.core.__path__[0]) / "extensions" / "transformer_engine.py"
    [wrapper] = [n for n in ast.walk(ast.parse(source.read_text())) if isinstance(n, ast.ClassDef) and n.name == name]
    [init] = [n for n in wrapper.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    theirs = [argument.arg for argument in (*init.args.args, *init.args.kwonlyargs)]
    ours = inspect.signature(WRAPPERS[name].__init__).parameters
    assert theirs == [argument for argument in ours if argument in theirs or argument not in NEWER]


def both_implementations(folder, sizes, share_prompt):
    """Parameter gradients by Hugging Face table entry, and logps, of the local layers and of the stand-ins. sizes: by the
    names of Grid."""
    from megadpo.config.grid import Grid
    from megadpo.data.batches.pack import pack_pairs
    from megadpo.families import read_architecture, weight_table
    from megadpo.model.build import build_model
    from megadpo.model.weights.load import load_hf_weights, named_global_parameters
    from megadpo.parallel import initialize, setup_device
    from megadpo.train.setup import seed_everything

    parallel = initialize(Grid(**sizes), setup_device("auto"))
    grid = parallel.grid
    seed_everything(1, parallel)
    arch = read_architecture(folder)
    table = weight_table(arch)
    first_expert = table.num_experts // grid.expert * grid.ep_rank
    megatron = MegatronConfig(
        tensor_model_parallel_size=grid.tensor,
        sequence_parallel=grid.tensor > 1,
        expert_model_parallel_size=grid.expert,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
    )
    policy = PolicyConfig(
        model_name=folder, tokenizer=TokenizerConfig(name=folder), precision="float32", megatron_cfg=megatron
    )
    batch = pack_pairs(random_pairs(), share_prompt=share_prompt, pad_to_multiple=8, pad_token_id=0)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for stand_in in (False, True):
            if stand_in:
                te_stand_ins.use_stand_ins(patch)
            [model] = build_model(arch, policy, parallel, frozen=False)
            load_hf_weights([model], arch, folder, grid)
            if model.balance is not None:
                model.balance.start(num_tokens=batch.num_tokens, num_pairs=batch.num_pairs)
            logps = model(batch)
            (logps * torch.arange(1.0, logps.numel() + 1)).sum().backward()
            gradients = {table.by_name[n].names[0]: p.grad for n, p in named_global_parameters(model, first_expert)}
            results.append((logps.detach(), gradients))
    return results


def assert_same(results):
    for (want, want_gradients), (got, got_gradients) in results:
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        assert set(got_gradients) == set(want_gradients)
        for name, gradient in want_gradients.items():
            torch.testing.assert_close(got_gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_5"])
def test_hugging_face_weights_give_the_same_model(case, tmp_path):
    (make_case if case == "qwen3_5" else make_hf_folder)(tmp_path, case)
    assert_same(run_distributed(both_implementations, 1, str(tmp_path), {}, True, init_process_group=False))


@pytest.mark.distributed
def test_the_same_under_tensor_and_sequence_parallelism(tmp_path):
    make_hf_folder(tmp_path, "qwen2")
    sizes = {"tensor": 2}
    assert_same(run_distributed(both_implementations, 2, str(tmp_path), sizes, False, init_process_group=False))


@pytest.mark.distributed
def test_each_rank_has_its_own_experts_and_their_biases(tmp_path):
    make_case(tmp_path, "gpt_oss")
    sizes = {"expert": 2}
    assert_same(run_distributed(both_implementations, 2, str(tmp_path), sizes, True, init_process_group=False))


def train_with(implementation, config, overrides):
    with pytest.MonkeyPatch.context() as patch:
        if implementation == "stand_ins":
            te_stand_ins.use_stand_ins(patch)
        return train(config, overrides)


@pytest.mark.distributed
@pytest.mark.parametrize(("first", "then"), [("local", "stand_ins"), ("stand_ins", "local")])
def test_a_run_goes_on_with_the_other_layers(first, then, tmp_path):
    """Two steps with one, the third with the other, from its checkpoint: the losses of a run that never changed. And
    what the first exports is in the names and values of a Hugging Face folder."""
    from megadpo.model.weights.convert import export_hf

    model = make_model(tmp_path / "model", "qwen3")
    base = [f"{MEG}.bias_activation_fusion=false", f"{MEG}.apply_rope_fusion=false", "checkpointing.save_period=2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    config = make_config(whole, model)
    assert run_distributed(train_with, 1, "local", str(config), base, init_process_group=False) == [0]
    config = make_config(cut, model, checkpointing={"enabled": True})
    for implementation, steps in ((first, 2), (then, 3)):
        options = [*base, f"dpo.max_num_steps={steps}"]
        assert run_distributed(train_with, 1, implementation, str(config), options, init_process_group=False) == [0]
    for mine, theirs in zip(read_metrics(cut / "logs"), read_metrics(whole / "logs"), strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-6)
        assert mine["train/grad_norm"] == pytest.approx(theirs["train/grad_norm"], rel=1e-5)
    exported = tmp_path / "exported"
    export_hf(cut / "checkpoints" / "step_2", exported)
    source, result = load_file(model / "model.safetensors"), load_file(exported / "model.safetensors")
    assert {name: tensor.shape for name, tensor in result.items()} == {n: t.shape for n, t in source.items()}
    assert any(not torch.equal(result[name], source[name]) for name in source), "trained for two steps"


def convert_there_and_back(folder, checkpoint):
    """A Hugging Face folder into stand-ins, and their checkpoint as training writes it."""
    from megatron.core import dist_checkpointing

    from megadpo.checkpoint.save import sharded_weights
    from megadpo.config.grid import Grid
    from megadpo.families import read_architecture
    from megadpo.model.build import build_model
    from megadpo.model.weights.convert import copy_hf_files, write_info
    from megadpo.model.weights.load import load_hf_weights
    from megadpo.parallel import initialize, setup_device
    from megadpo.train.setup import seed_everything

    parallel = initialize(Grid(), setup_device("auto"))
    seed_everything(1, parallel)
    arch = read_architecture(folder)
    policy = PolicyConfig(
        model_name=folder,
        tokenizer=TokenizerConfig(name=folder),
        precision="float32",
        megatron_cfg=MegatronConfig(bias_activation_fusion=False, apply_rope_fusion=False),
    )
    with pytest.MonkeyPatch.context() as patch:
        te_stand_ins.use_stand_ins(patch)
        model = build_model(arch, policy, parallel, frozen=True)
        load_hf_weights(model, arch, folder, parallel.grid)
        target = Path(checkpoint)
        (target / "model").mkdir(parents=True)
        dist_checkpointing.save({"weights": sharded_weights(model)}, str(target / "model"))
        copy_hf_files(folder, target / "hf")
        write_info(target, torch.float32, step=0)


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["llama", "qwen2", "qwen3"])
def test_there_and_back_is_exact(case, tmp_path):
    from megadpo.model.weights.convert import export_hf

    source = tmp_path / "source"
    make_hf_folder(source, case)
    run_distributed(convert_there_and_back, 1, str(source), str(tmp_path / "mid"), init_process_group=False)
    export_hf(tmp_path / "mid", tmp_path / "back")
    want, got = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert set(got) == set(want)
    assert all(torch.equal(got[name], tensor.float()) for name, tensor in want.items())


def test_fused_weight_gradients_are_a_matter_of_each_module():
    from megadpo.model.layers.transformer_engine import with_fused_weight_gradient

    @dataclasses.dataclass
    class Options:
        gradient_accumulation_fusion: bool = False

    class Linear:
        def __init__(self, size, *, config, bias):
            self.fuses, self.size, self.bias = config.gradient_accumulation_fusion, size, bias

    shared = Options()
    fused = with_fused_weight_gradient(Linear)
    module = fused(3, config=shared, bias=False)
    assert isinstance(fused, type) and issubclass(fused, Linear)  # megatron-core builds classes, and asks what they are
    assert (module.fuses, module.size, module.bias) == (True, 3, False) and not shared.gradient_accumulation_fusion
