"""What the search over layouts takes for activations, against what is counted on stages that are really built."""

from __future__ import annotations

import pytest

from megadpo.config.grid import Grid
from megadpo.config.load import load_config
from megadpo.plan.activations import Estimate
from megadpo.plan.inputs import architectures
from megadpo.plan.packs import Pack, all_pairs, full_pack
from megadpo.plan.trace import trace_stage
from tests.plan.cases import LLAMA_30M, MIXTRAL, write_case

MEG = "policy.megatron_cfg"


@pytest.mark.parametrize(("tp", "ep", "recompute"), [(1, 1, "none"), (1, 4, "none"), (2, 2, "none"), (1, 2, "full")])
def test_the_search_estimates_experts_as_they_are_counted(tmp_path, tp, ep, recompute):
    """Saved bytes within 8%, the peak within 15%."""
    model = {**LLAMA_30M, **MIXTRAL, "num_local_experts": 8, "hidden_size": 512, "intermediate_size": 688}
    path = write_case(tmp_path / "case", model, device="auto", sequence_packing={"train_mb_tokens": 2048})
    sizes = {"tensor_model_parallel_size": tp, "expert_model_parallel_size": ep}
    overrides = [f"{MEG}.{name}={size}" for name, size in sizes.items()]
    overrides += [f"{MEG}.sequence_parallel=true"] if tp > 1 else []
    overrides += [f"{MEG}.activation_checkpointing=true"] if recompute == "full" else []
    cfg = load_config(path, overrides)
    arch, _ = architectures(cfg)
    lengths = full_pack(cfg, all_pairs((300, 106, 106), 1))
    (counted,) = trace_stage(cfg, arch, None, lengths, grid=Grid.of(cfg, 4), device_type="cuda").chunks
    foretold = Estimate(cfg, arch, Pack.of(cfg, lengths)).chunk(arch.layers, last=True)
    assert foretold.saved == pytest.approx(counted.saved, rel=0.08)
    assert foretold.backward_peak == pytest.approx(max(counted.forward_peak, counted.backward_peak), rel=0.15)


@pytest.mark.parametrize(("tp", "precision"), [(2, "bfloat16"), (1, "float32")])
def test_the_search_estimates_linear_attention_as_it_is_counted(tmp_path, tp, precision):
    """Saved bytes within 8%, the peak within 15%."""
    heads = {"head_dim": 64, "linear_num_key_heads": 8, "linear_num_value_heads": 16}
    model = {**LLAMA_30M, **heads, "architectures": ["Qwen3_5ForCausalLM"]}
    path = write_case(tmp_path / "case", model, device="auto", sequence_packing={"train_mb_tokens": 2048})
    sizes = [f"{MEG}.tensor_model_parallel_size={tp}", f"{MEG}.sequence_parallel={str(tp > 1).lower()}"]
    cfg = load_config(path, [f"policy.precision={precision}", *sizes])
    arch, _ = architectures(cfg)
    lengths = full_pack(cfg, all_pairs((300, 106, 106), 1))
    (counted,) = trace_stage(cfg, arch, None, lengths, grid=Grid.of(cfg, tp), device_type="cuda").chunks
    foretold = Estimate(cfg, arch, Pack.of(cfg, lengths)).chunk(arch.layers, last=True)
    assert foretold.saved == pytest.approx(counted.saved, rel=0.08)
    assert foretold.backward_peak == pytest.approx(max(counted.forward_peak, counted.backward_peak), rel=0.15)


@pytest.mark.parametrize(("recompute", "cp"), [("none", 1), ("full", 1), ("core_attn", 1), ("none", 2)])
def test_the_search_estimates_activations_as_they_are_counted(tmp_path, recompute, cp):
    """Saved bytes within 3%, the peak of one micro-batch within 15%, where it is only used to choose what to build."""
    overrides = [f"{MEG}.pipeline_model_parallel_size=2", f"{MEG}.activation_checkpointing={recompute != 'none'}"]
    overrides += [f"{MEG}.context_parallel_size={cp}"]
    if recompute == "core_attn":
        overrides += [f"{MEG}.recompute_granularity=selective", f"{MEG}.recompute_modules=[core_attn]"]
    path = write_case(tmp_path / "case", LLAMA_30M, device="auto", sequence_packing={"train_mb_tokens": 2048})
    cfg = load_config(path, [override.replace("True", "true").replace("False", "false") for override in overrides])
    arch, _ = architectures(cfg)
    lengths = full_pack(cfg, all_pairs((300, 106, 106), 1))
    for stage in (0, 1):
        (counted,) = trace_stage(
            cfg, arch, None, lengths, grid=Grid.of(cfg, 2 * cp).stage(stage), device_type="cuda"
        ).chunks
        foretold = Estimate(cfg, arch, Pack.of(cfg, lengths)).chunk(arch.layers[:4], last=stage == 1)
        assert foretold.saved == pytest.approx(counted.saved, rel=0.03)
        assert foretold.backward_peak == pytest.approx(max(counted.forward_peak, counted.backward_peak), rel=0.15)
