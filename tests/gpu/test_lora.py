"""Adapters beside Transformer Engine's layers on a GPU: log-probabilities, and gradients of A and B, are those of the local
layers within bfloat16's rounding (test_layers.py derives the bounds; two computations that round, not one, are compared)."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.models import make_gpu_model
from tests.gpu.test_layers import LENGTHS, WEIGHTS
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import VOCAB
from tests.model.kernels.test_kernels import random_pairs

pytestmark = pytest.mark.gpu


def measured(folder, implementation, targets):
    """Logps, gradients by name and the implementation that ran, on the CPU in float64."""
    from megadpo.config.grid import Grid
    from megadpo.config.schema_megatron import MegatronConfig
    from megadpo.config.schema_peft import PeftConfig
    from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
    from megadpo.data.batches.pack import pack_pairs
    from megadpo.families import read_architecture
    from megadpo.lora.attach import adapters_of, attach, init_adapters
    from megadpo.model.build import build_model
    from megadpo.model.weights.load import load_hf_weights
    from megadpo.optimizer.build import wrap_for_training
    from megadpo.parallel import initialize, setup_device
    from megadpo.train.setup import seed_everything

    parallel = initialize(Grid(), setup_device("auto"))
    seed_everything(1, parallel)
    arch = read_architecture(folder)
    peft = PeftConfig(enabled=True, dim=16, target_modules=targets, lora_B_init_method="xavier")
    policy = PolicyConfig(
        model_name=folder,
        tokenizer=TokenizerConfig(name=folder),
        megatron_cfg=MegatronConfig(transformer_impl=implementation, peft=peft),
    )
    chunks = build_model(arch, policy, parallel, frozen=False)
    load_hf_weights(chunks, arch, folder, parallel.grid)
    init_adapters(attach(chunks, arch, peft, parallel), peft, seed=0)
    [wrapped] = wrap_for_training(chunks, policy)
    batch = pack_pairs(random_pairs(LENGTHS, VOCAB), share_prompt=True, pad_to_multiple=8, pad_token_id=0)
    wrapped.zero_grad_buffer()
    logps = wrapped(batch.to(parallel.device))
    (logps * torch.tensor(WEIGHTS, device=logps.device)).sum().backward()
    wrapped.finish_grad_sync()
    gradients = {
        f"{module}.{name}": parameter.main_grad.detach().double().cpu()
        for _, adapter in adapters_of(chunks[0])
        for module in [adapter.target.modules[0]]
        for name, parameter in adapter.named_parameters()
    }
    return logps.detach().double().cpu(), gradients, chunks[0].config.transformer_impl


@pytest.mark.parametrize("targets", [(), ("all-linear",)], ids=["fused", "apart"])
@pytest.mark.parametrize("case", ["llama", "qwen3"])
def test_transformer_engine_beside_the_local_layers(case, targets, tmp_path):
    pytest.importorskip("transformer_engine.pytorch")
    folder = str(make_gpu_model(tmp_path / "model", case))
    sides = [
        run_distributed(measured, 1, folder, name, targets, init_process_group=False, timeout_s=240)[0]
        for name in ("local", "transformer_engine")
    ]
    (want, want_gradients, _), (got, got_gradients, implementation) = sides
    assert implementation == "transformer_engine"
    tokens = torch.tensor([n for _, *answers in LENGTHS for n in answers], dtype=torch.float64)
    assert float(((got - want).square() / tokens).mean().sqrt()) < 0.02
    assert got_gradients.keys() == want_gradients.keys()
    for name, gradient in want_gradients.items():
        assert float((got_gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)) < 8e-2, name
