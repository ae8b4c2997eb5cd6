"""Where a plan's lengths and models are from."""

from __future__ import annotations

import json

from megadpo.commands import main
from megadpo.config import load_config
from megadpo.plan.inputs import architectures
from tests.helpers.runs import make_config, make_model
from tests.plan.cases import SMALL


def test_lengths_come_from_data_where_it_is_read(tmp_path, capsys):
    path = make_config(tmp_path, make_model(tmp_path / "model"))
    assert main(["plan", str(path), "--world-size", "1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert "train.jsonl, 40 pairs" in plan["lengths"] and plan["pairs_per_step"] == 8
    assert 8 * 3 < plan["tokens_per_step"] < 8 * 100
    # a Megatron folder keeps the tokenizer in hf/
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "model").rename(tmp_path / "checkpoint/hf")
    (tmp_path / "checkpoint/megadpo.json").write_text("{}")
    assert main(["plan", str(path), f"policy.model_name={tmp_path / 'checkpoint'}", "--world-size", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == plan


def test_data_that_cannot_be_read_may_be_stated(tmp_path, capsys):
    path = make_config(tmp_path, make_model(tmp_path / "model"))
    (tmp_path / "model/tokenizer.json").unlink()
    assert main(["plan", str(path), "--world-size", "1"]) == 2
    assert "or give the lengths with --lengths PROMPT,CHOSEN,REJECTED" in " ".join(capsys.readouterr().err.split())
    assert main(["plan", str(path), "--world-size", "1", "--lengths", "10,20,30"]) == 0


def test_a_hub_name_is_fetched_without_weights(monkeypatch, tmp_path):
    import huggingface_hub

    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    config = make_config(tmp_path, tmp_path)
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or tmp_path,
    )
    policy, reference = architectures(load_config(config, ["policy.model_name=some/model"]))
    assert policy == reference and policy.hidden_size == SMALL["hidden_size"]
    ((name, patterns),) = asked
    assert name == "some/model" and "*.json" in patterns and "*.safetensors" not in patterns
