"""Floating-point operations by formula against torch's count of the real model's matrix products."""

from __future__ import annotations

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from megadpo.config.grid import Grid
from megadpo.config.load import load_config
from megadpo.plan.flops import forward_flops, stage_flops
from megadpo.plan.inputs import architectures
from megadpo.plan.packs import Pack, all_pairs, full_pack
from megadpo.plan.trace import trace_stage
from tests.plan.cases import LLAMA_30M, MIXTRAL, QWEN2_MOE, QWEN3, write_case

MEG = "policy.megatron_cfg"
FULL = [f"{MEG}.activation_checkpointing=true"]
SELECTIVE = [*FULL, f"{MEG}.recompute_granularity=selective"]
CASES = {
    "dense": (LLAMA_30M, []),
    "head_dim": (QWEN3, []),
    "full": (LLAMA_30M, FULL),
    "block": (LLAMA_30M, [*FULL, f"{MEG}.recompute_method=block", f"{MEG}.recompute_num_layers=3"]),
    "core_attn": (LLAMA_30M, SELECTIVE),
    "mlp": (LLAMA_30M, [*SELECTIVE, f"{MEG}.recompute_modules=[mlp]"]),
    "experts": (MIXTRAL, []),
    "shared_expert": (QWEN2_MOE, []),
    "moe": (QWEN2_MOE, [*SELECTIVE, f"{MEG}.recompute_modules=[moe]"]),
    "shared_experts": (QWEN2_MOE, [*SELECTIVE, f"{MEG}.recompute_modules=[shared_experts]"]),
}


@pytest.mark.parametrize("name", CASES)
def test_matrix_products_are_those_that_torch_counts(name, tmp_path):
    """A reference's pass, a forward and a backward of one pack; attention runs as an outline, without products."""
    model, overrides = CASES[name]
    path = write_case(tmp_path / "case", model, device="auto", sequence_packing={"train_mb_tokens": 2048})
    cfg = load_config(path, ["policy.precision=float32", "policy.logprob_kernel=torch", *overrides])
    arch, reference = architectures(cfg)
    lengths = full_pack(cfg, all_pairs((300, 106, 106), 1))
    with FlopCounterMode(display=False) as counter:
        trace_stage(cfg, arch, None, lengths, grid=Grid(), device_type="cuda")
    pack = Pack.of(cfg, lengths)
    (stage,) = stage_flops(cfg, arch, reference, pack)
    forward = forward_flops(arch, pack, arch.layers, head=True)
    attention = 4 * forward.attention + {"core_attn": 1, "full": 1, "block": 3 / 8}.get(name, 0) * forward.attention
    assert counter.get_total_flops() == stage.needed + stage.repeated - attention


def test_flops_of_a_step_by_hand(tmp_path):
    """8 pairs, each 512 tokens: forward 2 FLOPs a weight, backward twice that, the reference once more: four times."""
    cfg = load_config(write_case(tmp_path / "case", LLAMA_30M))
    arch, reference = architectures(cfg)
    pack = Pack.of(cfg, np.array([[300, 106, 106]] * 8))
    weights = 8 * 512 * (2 * 512 + 2 * 256 + 3 * 1376)
    attention = 4 * 512 * 8 * (300 * 301 // 2 + 2 * (106 * 300 + 106 * 107 // 2))
    by_hand = 4 * 8 * (2 * 512 * weights + attention + 2 * 212 * 512 * 8192)
    assert [stage.needed for stage in stage_flops(cfg, arch, reference, pack)] == [by_hand]
    assert [stage.needed for stage in stage_flops(cfg, arch, None, pack)] == [by_hand * 3 / 4]


def test_stages_have_their_layers_flops_and_the_last_one_the_heads(tmp_path):
    overrides = [f"{MEG}.pipeline_model_parallel_size=3", f"{MEG}.num_layers_in_first_pipeline_stage=2"]
    cfg = load_config(write_case(tmp_path / "case", LLAMA_30M), overrides)
    arch, _ = architectures(cfg)
    pack = Pack.of(cfg, np.array([[300, 106, 106]]))
    first, inner, last = (stage.needed for stage in stage_flops(cfg, arch, None, pack))
    assert first / inner == 2 / 3 and last - inner == 3 * 2 * 212 * 512 * 8192
