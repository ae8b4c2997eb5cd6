"""Where a plan's lengths and models are from."""

from __future__ import annotations

import json

from megadpo.commands import main
from megadpo.plan.inputs import model_folder
from tests.plan.cases import SMALL


def test_lengths_come_from_data_where_it_is_read(tmp_path, capsys):
    from tests.helpers.runs import make_config, make_model

    path = make_config(tmp_path, make_model(tmp_path / "model"))
    assert main(["plan", str(path), "--world-size", "1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert "train.jsonl, 40 pairs" in plan["lengths"] and plan["pairs_per_step"] == 8
    assert 8 * 3 < plan["tokens_per_step"] < 8 * 100


def test_a_hub_name_is_fetched_without_weights(monkeypatch, tmp_path):
    import huggingface_hub

    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda name, file: asked.append((name, file)) or tmp_path / "config.json"
    )
    assert model_folder("some/model", "policy.model_name") == tmp_path
    assert asked == [("some/model", "config.json")]
