"""Latent attention under recomputation. tests/families/test_equal.py holds it to transformers, in every layout."""

from __future__ import annotations

import pytest
import torch

from megadpo.data.batches.pack import pack_pairs
from tests.families.cases import make_case
from tests.helpers.distributed import run_distributed
from tests.model.kernels.test_kernels import random_pairs

RECOMPUTED = [{}, {"recompute_granularity": "full"}, {"recompute_modules": ("core_attn", "layernorm", "mlp", "moe")}]


def gradients(folder):
    """By RECOMPUTED: each parameter's, and how often the kernel ran."""
    from megadpo.config.grid import Grid
    from megadpo.config.schema_megatron import MegatronConfig
    from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
    from megadpo.families import read_architecture
    from megadpo.model.build import build_model
    from megadpo.model.kernels.cpu import CpuKernel
    from megadpo.model.weights.load import load_hf_weights
    from megadpo.parallel import initialize, setup_device
    from megadpo.train.setup import seed_everything

    parallel, found = initialize(Grid(), setup_device("auto")), []
    seed_everything(1, parallel)
    arch, attend, calls = read_architecture(folder), CpuKernel.attend, []
    for said in RECOMPUTED:
        megatron = {"activation_checkpointing": True, "recompute_granularity": "selective", **said} if said else {}
        policy = PolicyConfig(
            model_name=folder,
            tokenizer=TokenizerConfig(name=folder),
            precision="float32",
            megatron_cfg=MegatronConfig(moe_router_load_balancing_type="none", **megatron),
        )
        (model,) = build_model(arch, policy, parallel, frozen=False)
        load_hf_weights([model], arch, folder, parallel.grid)
        batch = pack_pairs(random_pairs(vocab=64), share_prompt=True, pad_to_multiple=8, pad_token_id=0)
        calls.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CpuKernel, "attend", lambda *rest, **asked: calls.append(1) or attend(*rest, **asked))
            model(batch).sum().backward()
        found.append((len(calls), {name: one.grad for name, one in model.named_parameters() if one.requires_grad}))
    return found


@pytest.mark.distributed
def test_gradients_are_the_same_under_recomputation(tmp_path):
    folder = make_case(tmp_path / "model", "deepseek_v3")
    (found,) = run_distributed(gradients, 1, str(folder), init_process_group=False)
    (layers, want), *others = found
    assert layers == 4
    for calls, got in others:
        assert calls == 2 * layers and got.keys() == want.keys()
        for name, gradient in want.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-6, atol=1e-7, msg=name)
