"""`megadpo check`, and what every start checks: for how many ranks, and what it says of a run that nobody has started."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from megadpo.commands import main, train
from megadpo.config.load import Purpose
from megadpo.config.problems import ConfigError
from megadpo.train.check import asked_world_size, checked_config
from tests.helpers.runs import make_config, make_model


@pytest.mark.parametrize(
    ("arguments", "ranks"),
    [
        ([], None),
        (["--rdzv-backend", "c10d"], None),
        (["--world-size", "16"], 16),
        (["--nproc-per-node", "8"], 8),
        (["--nnodes=4"], 4),
        (["--nnodes", "4", "--nproc-per-node", "8"], 32),
        (["--nnodes", "4", "--nproc-per-node", "8", "--world-size", "32"], 32),
        (["--nnodes", "1:4", "--nproc-per-node", "auto", "--world-size", "32"], 32),
    ],
)
def test_the_number_is_that_of_the_ranks_which_would_be_started(arguments: list[str], ranks: int | None) -> None:
    assert asked_world_size(train.parse(["demo", "--check", *arguments])) == ranks


@pytest.mark.parametrize(
    ("arguments", "where", "expected"),
    [
        (["--nproc-per-node", "8", "--world-size", "16"], ["--world-size"], "8, which is --nnodes 1 x --nproc-per-node 8"),
        (["--nnodes", "1:4", "--nproc-per-node", "auto"], ["--nnodes", "--nproc-per-node"], "a number, to check for"),
        (["--nnodes", "0"], ["--nnodes"], "a number, to check for"),
    ],
)  # fmt: skip
def test_two_numbers_or_none_are_refused(arguments: list[str], where: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        asked_world_size(train.parse(["demo", "--check", *arguments]))
    assert [(one.where, one.expected) for one in refusal.value.problems] == [(name, expected) for name in where]


@pytest.mark.parametrize("command", [["check"], ["train", "--check"]])
def test_a_check_is_for_the_ranks_of_torchruns_options(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int | None] = []
    module = importlib.import_module(f"megadpo.commands.{command[0]}")
    monkeypatch.setattr(module, "check", lambda path, overrides, world_size: asked.append(world_size) or 0)
    assert main([*command, "demo", "--nproc-per-node", "8"]) == 0 and asked == [8]


@pytest.mark.parametrize(
    ("purpose", "options", "ignored"),
    [
        ("evaluate", [], True),
        ("evaluate", ["dpo.reference.model_name={model}"], False),
        ("train", [], False),
    ],
)
def test_an_adapter_that_an_evaluation_would_ignore_is_refused(
    purpose: Purpose, options: list[str], ignored: bool, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model")
    overrides = [f"dpo.reference.adapter={tmp_path}", *(one.format(model=model) for one in options)]
    with pytest.raises(ConfigError) as refusal:  # the folder has no adapter
        checked_config(str(make_config(tmp_path, model)), overrides, 1, purpose)
    assert any("has no reference to add it to" in one.expected for one in refusal.value.problems) == ignored


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
