"""`megadpo check`: what it says of a run that nobody has started."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadpo.commands import main
from tests.helpers.runs import make_config, make_model


@pytest.fixture
def without_weights(tmp_path: Path) -> Path:
    """A model's folder as the hub's cache has it before the weights are downloaded."""
    folder = make_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    return folder


def test_a_hub_model_is_checked_without_a_download_of_its_weights(
    without_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, allow_patterns: asked.extend(allow_patterns) or without_weights,
    )
    config = make_config(tmp_path, without_weights)
    hub = ["policy.model_name=some/model", "policy.tokenizer.name=some/model"]
    assert main(["check", str(config), *hub]) == 0
    assert "*.json" in asked and "*.safetensors" not in asked
    assert "the hub's weights are not downloaded here" in capsys.readouterr().out
    assert main(["check", str(config)]) == 2  # a local folder is to have them
    assert str(without_weights) in capsys.readouterr().err


def test_a_warm_up_that_outlasts_the_run_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(tmp_path, make_model(tmp_path / "model"), dpo={"max_num_steps": None})
    warmup = "policy.megatron_cfg.scheduler.lr_warmup_iters"
    for steps, noted in ((4, False), (5, True)):
        assert main(["check", str(config), f"{warmup}={steps}"]) == 0
        printed = capsys.readouterr().out
        assert (f"{warmup}: {steps}: the run ends after 5 steps" in printed) == noted, printed
