"""Gradient buffers and optimizers as the config asks for them, and machines that can't give them."""

from __future__ import annotations

import pytest
import torch

from megadpo.config.schema_megatron import DistributedDataParallelConfig, MegatronConfig, OptimizerConfig
from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
from megadpo.optimizer import machine_problems
from tests.helpers.distributed import run_distributed
from tests.model.weights.hf_models import make_hf_folder


def policy_of(folder, *, in_fp32=True, device="auto", **optimizer):
    megatron = MegatronConfig(
        optimizer=OptimizerConfig(**optimizer),
        distributed_data_parallel_config=DistributedDataParallelConfig(grad_reduce_in_fp32=in_fp32),
    )
    return PolicyConfig(model_name=folder, tokenizer=TokenizerConfig(name=folder), megatron_cfg=megatron, device=device)


def dtypes_of_buffers(folder):
    from megadpo.config.architecture import read_architecture
    from megadpo.model.build import build_model
    from megadpo.optimizer import wrap_for_training
    from megadpo.parallel import Layout, initialize, setup_device

    parallel = initialize(Layout(), setup_device("auto"))
    found = []
    for in_fp32 in (True, False):
        policy = policy_of(folder, in_fp32=in_fp32)
        [wrapped] = wrap_for_training(build_model(read_architecture(folder), policy, parallel, frozen=False), policy)
        found += [{(b.param_dtype, b.grad_dtype) for b in wrapped.buffers}]
        assert all(p.main_grad.dtype == b.grad_dtype for b in wrapped.buffers for p in b.params)
    return found


@pytest.mark.distributed
def test_bfloat16_gradients_are_summed_in_float32_where_asked(tmp_path):
    make_hf_folder(tmp_path, "llama")
    [found] = run_distributed(dtypes_of_buffers, 1, str(tmp_path), init_process_group=False)
    assert found == [{(torch.bfloat16, torch.float32)}, {(torch.bfloat16, torch.bfloat16)}]


def test_machines_without_cuda_or_transformer_engine_are_told_why(monkeypatch):
    aware = {"use_precision_aware_optimizer": True}
    offload = {**aware, "optimizer_cpu_offload": True, "optimizer_offload_fraction": 1.0}
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert machine_problems(policy_of("x"), cpu) == []
    for options in (aware, offload):
        [problem] = machine_problems(policy_of("x", **options), cpu)
        assert "without CUDA" in problem.expected and problem.where.endswith("use_precision_aware_optimizer")
    missing = "Transformer Engine is not installed"
    monkeypatch.setattr("megadpo.optimizer.build.transformer_engine_missing", lambda: missing)
    [problem] = machine_problems(policy_of("x", **aware), cuda)
    assert "Transformer Engine" in problem.expected
    assert machine_problems(policy_of("x", **offload), cuda) == []  # HybridDeviceOptimizer does without it
    monkeypatch.setattr("megadpo.optimizer.build.transformer_engine_missing", lambda: None)
    assert machine_problems(policy_of("x", **aware), cuda) == []
