"""What stands in for code that looks into values or needs a GPU."""

from __future__ import annotations

import pytest

from megadpo.config.grid import Grid
from megadpo.config.load import load_config
from megadpo.plan.inputs import architectures
from megadpo.plan.packs import all_pairs, full_pack
from megadpo.plan.trace import trace_stage
from tests.plan.cases import MIXTRAL, write_case

MEG = "policy.megatron_cfg"


def test_uneven_experts_take_memory_in_proportion(tmp_path):
    """Twice the tokens at this rank's experts: what every layer keeps of them doubles, and nothing else grows."""
    path = write_case(tmp_path / "case", MIXTRAL, device="auto", sequence_packing={"train_mb_tokens": 2048})
    cfg = load_config(path, [f"{MEG}.expert_model_parallel_size=4"])
    arch, _ = architectures(cfg)
    lengths = full_pack(cfg, all_pairs((300, 106, 106), 1))
    saved = [
        trace_stage(cfg, arch, None, lengths, grid=Grid.of(cfg, 4), device_type="cuda", expert_load=load)
        .chunks[0]
        .saved
        for load in (1.0, 2.0)
    ]
    rows = 2048 * 2  # as many come to one expert of four as go out: each token's two choices, from four ranks
    each = 72 + 3 * 200  # the row itself, both sides of SwiGLU and their product's input
    assert saved[1] - saved[0] == pytest.approx(4 * rows * each * 2, rel=0.1)
