"""Delta nets in checkpoints of other layouts and under recomputation. tests/families/test_equal.py holds them to
transformers, in every layout."""

from __future__ import annotations

import pytest
import torch

from megadpo.data.batches.pack import pack_pairs
from megadpo.model.weights.convert import copy_hf_files, export_hf, import_hf, write_info
from tests.families.cases import make_case
from tests.helpers.distributed import run_distributed
from tests.model.kernels.test_kernels import random_pairs
from tests.model.weights.hf_models import read_tensors


def built(folder, layout, **megatron):
    """This rank's chunk of a model without weights, its architecture and its place."""
    from megadpo.config.grid import Grid
    from megadpo.config.schema_megatron import MegatronConfig
    from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
    from megadpo.families import read_architecture
    from megadpo.model.build import build_model
    from megadpo.parallel import initialize, setup_device
    from megadpo.train.setup import seed_everything

    parallel = initialize(Grid(**layout), setup_device("auto"))
    seed_everything(1, parallel)
    megatron |= {"tensor_model_parallel_size": parallel.grid.tensor, "sequence_parallel": parallel.grid.tensor > 1}
    policy = PolicyConfig(
        model_name=folder,
        tokenizer=TokenizerConfig(name=folder),
        precision="float32",
        megatron_cfg=MegatronConfig(moe_router_load_balancing_type="none", **megatron),
    )
    arch = read_architecture(folder)
    return build_model(arch, policy, parallel, frozen=False), arch, parallel


def loaded_and_saved(folder, checkpoint, again):
    """The parameters that differ when read from the checkpoint and from the folder; all are written to `again`."""
    from megatron.core import dist_checkpointing

    from megadpo.checkpoint.load import load_weights
    from megadpo.checkpoint.save import sharded_weights
    from megadpo.model.source import resolve_source
    from megadpo.model.weights.load import load_hf_weights

    chunks, arch, parallel = built(folder, {"tensor": 2})
    load_hf_weights(chunks, arch, folder, parallel.grid)
    want = {name: one.detach().clone() for name, one in chunks[0].named_parameters()}
    for one in chunks[0].parameters():
        one.data.fill_(-1.0)
    load_weights(chunks, resolve_source(checkpoint, "policy.model_name"), arch, parallel)
    dist_checkpointing.save({"weights": sharded_weights(chunks)}, again)
    return [name for name, one in chunks[0].named_parameters() if not torch.equal(one, want[name])]


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["qwen3_5", "qwen3_next"])
def test_a_checkpoint_is_read_and_written_in_another_layout(case, tmp_path):
    folder, checkpoint, again = make_case(tmp_path / "hf", case), tmp_path / "megatron", tmp_path / "again"
    import_hf(folder, checkpoint)
    (again / "model").mkdir(parents=True)
    places = str(folder), str(checkpoint), str(again / "model")
    assert run_distributed(loaded_and_saved, 2, *places, init_process_group=False) == [[], []]
    copy_hf_files(folder, again / "hf")
    write_info(again, torch.float32, step=0)
    export_hf(again, tmp_path / "back")
    got, want = read_tensors(tmp_path / "back"), read_tensors(folder)
    assert got.keys() == want.keys() and all(torch.equal(got[name], one) for name, one in want.items())


def gradients(folder, megatron):
    from megadpo.model.weights.load import load_hf_weights

    chunks, arch, parallel = built(folder, {}, **megatron)
    load_hf_weights(chunks, arch, folder, parallel.grid)
    batch = pack_pairs(random_pairs(vocab=64), share_prompt=True, pad_to_multiple=8, pad_token_id=0)
    chunks[0](batch).sum().backward()
    return {name: one.grad for name, one in chunks[0].named_parameters()}


@pytest.mark.distributed
def test_gradients_are_the_same_under_recomputation(tmp_path):
    folder = str(make_case(tmp_path / "model", "qwen3_5"))
    full = {"activation_checkpointing": True, "recompute_granularity": "full"}
    selective = {**full, "recompute_granularity": "selective", "recompute_modules": ("core_attn", "layernorm", "mlp")}
    want, *others = (
        run_distributed(gradients, 1, folder, megatron, init_process_group=False)[0]
        for megatron in ({}, full, selective)
    )
    for got in others:
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-6, atol=1e-7, msg=name)
