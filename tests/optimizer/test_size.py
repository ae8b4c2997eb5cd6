"""Bytes that an optimizer keeps of each weight."""

from __future__ import annotations

from megadpo.config.load import load_config
from megadpo.optimizer.size import optimizer_bytes_per_element
from tests.plan.cases import LLAMA_30M, write_case

MEG = "policy.megatron_cfg"


def test_the_precision_aware_optimizer_keeps_less(tmp_path):
    """Of a bfloat16 weight the two bytes that are missing, and moments as wide as the config says; else 12 bytes."""
    path = write_case(tmp_path / "case", LLAMA_30M, device="auto")
    aware = [f"{MEG}.optimizer.use_precision_aware_optimizer=true", "checkpointing.enabled=false"]
    narrow = [f"{MEG}.optimizer.exp_avg_dtype=bfloat16", f"{MEG}.optimizer.exp_avg_sq_dtype=bfloat16"]
    for overrides, width in (([], 12), (aware, 10), ([*aware, *narrow], 6)):
        assert optimizer_bytes_per_element(load_config(path, overrides).policy.megatron_cfg, bf16=True) == width
