"""Optimizer state in other places: the same run as with torch's AdamW on the device."""

from __future__ import annotations

import pytest

from tests.helpers.distributed import run_distributed
from tests.helpers.overrides import DIST, MEG
from tests.helpers.runs import make_config, make_model, read_metrics, train

OPT = f"{MEG}.optimizer"
AWARE = f"{OPT}.use_precision_aware_optimizer=true"
OFFLOAD = [AWARE, f"{OPT}.optimizer_cpu_offload=true"]


def metrics_of(tmp_path, model, name, overrides):
    folder = tmp_path / name
    folder.mkdir()
    config = make_config(folder, model, checkpointing={"enabled": False})
    assert run_distributed(train, 1, str(config), [DIST, *overrides], init_process_group=False) == [0]
    return read_metrics(folder / "logs")


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.parametrize(
    "options",
    [[AWARE], *([*OFFLOAD, f"{OPT}.optimizer_offload_fraction={share}"] for share in (0.5, 1.0))],
    ids=["precision_aware", "half_offloaded", "all_offloaded"],
)
def test_on_a_gpu(options, tmp_path):
    if options == [AWARE]:
        pytest.importorskip("transformer_engine.pytorch")
    model = make_model(tmp_path / "model")
    want, got = metrics_of(tmp_path, model, "plain", []), metrics_of(tmp_path, model, "moved", options)
    for mine, theirs in zip(got, want, strict=True):
        for name in ("train/loss", "train/grad_norm", "train/logps/chosen"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5)


@pytest.mark.distributed
def test_a_machine_without_cuda_says_why_before_it_starts(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    config = make_config(tmp_path, make_model(tmp_path / "model"))
    codes = run_distributed(train, 1, str(config), [DIST, AWARE], init_process_group=False)
    assert codes == [2] and not (tmp_path / "logs").exists()
