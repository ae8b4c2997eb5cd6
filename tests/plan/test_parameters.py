"""Bytes of an optimizer and of a checkpoint. Static bytes of real ranks: test_measured.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megadpo.config.load import load_config
from megadpo.plan.inputs import architectures
from megadpo.plan.parameters import Parameter, checkpoint_bytes, optimizer_bytes_per_element
from megadpo.plan.plan import optimizer_temporaries
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config, make_model, train
from tests.plan.cases import LLAMA_30M, write_case

MEG = "policy.megatron_cfg"
AWARE = "use_precision_aware_optimizer=true"
DIST = f"{MEG}.optimizer.use_distributed_optimizer=true"


def test_the_precision_aware_optimizer_keeps_less(tmp_path):
    """Of a bfloat16 weight the two bytes that are missing, and moments as wide as the config says; else 12 bytes."""
    path = write_case(tmp_path / "case", LLAMA_30M, device="auto")
    aware = [f"{MEG}.optimizer.use_precision_aware_optimizer=true", "checkpointing.enabled=false"]
    narrow = [f"{MEG}.optimizer.exp_avg_dtype=bfloat16", f"{MEG}.optimizer.exp_avg_sq_dtype=bfloat16"]
    for overrides, width in (([], 12), (aware, 10), ([*aware, *narrow], 6)):
        assert optimizer_bytes_per_element(load_config(path, overrides).policy.megatron_cfg, bf16=True) == width


@pytest.mark.parametrize(
    ("overrides", "bytes_an_element"),
    [
        ([], 4),
        (["adam_impl=transformer_engine"], 0),
        ([AWARE], 0),
        ([AWARE, "exp_avg_dtype=bfloat16"], 4 + 2),
        ([AWARE, "exp_avg_dtype=bfloat16", "exp_avg_sq_dtype=bfloat16"], 8 + 2),
    ],
)
def test_what_the_optimizers_step_takes_for_a_moment(overrides, bytes_an_element, tmp_path):
    """Of one parameter, 100M elements of it on this rank: torch's AdamW, and FusedAdam a slice at a time."""
    path = write_case(tmp_path / "case", LLAMA_30M, device="auto")
    cfg = load_config(path, [f"{MEG}.optimizer.{one}" for one in overrides])
    job = SimpleNamespace(cfg=cfg, bf16=True, gpu="h100")
    whole = Parameter(200_000_000, shared_embedding=False, expert=False, trainable=True)
    assert optimizer_temporaries(job, (100_000_000, 0), [[whole]]) == bytes_an_element * 100_000_000
    if "exp_avg_sq_dtype=bfloat16" in overrides:
        small = [Parameter(1_000_000, shared_embedding=False, expert=False, trainable=True)] * 200
        assert optimizer_temporaries(job, (100_000_000, 0), [small]) == 500_000_000 + 2_000_000


@pytest.mark.distributed
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [DIST],
        ["policy.precision=bfloat16", DIST],
        ["policy.precision=bfloat16", "policy.freeze=['model.layers.{0..1}.*']"],
    ],
)
def test_a_real_checkpoint_is_as_large_as_planned(tmp_path, overrides):
    """Its files, within 2%: headers, schedule and metadata come on top."""
    model = make_model(tmp_path / "model", hidden_size=256, intermediate_size=512)
    path = make_config(tmp_path, model, dpo={"max_num_steps": 1}, checkpointing={"enabled": True, "save_period": 1})
    overrides = [*overrides, "policy.device=cpu"]
    assert run_distributed(train, 1, str(path), overrides, init_process_group=False) == [0]
    (step,) = (tmp_path / "checkpoints").glob("step_*")
    written = sum(file.stat().st_size for file in (step / "model").rglob("*.distcp"))
    cfg = load_config(str(path), overrides)
    planned = checkpoint_bytes(architectures(cfg)[0], cfg)
    assert planned.with_optimizer == pytest.approx(written, rel=0.02)
    exported = (model / "model.safetensors").stat().st_size
    width = {"bfloat16": 0.5, "float32": 1.0}[cfg.policy.precision]
    assert planned.weights == pytest.approx(exported * width, rel=0.02)
