"""What comes from the environment is used, and written nowhere; and interpolations end."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from megadpo.config import ConfigError, load_config, save_resolved
from megadpo.config.interpolation import hidden_words
from megadpo.config.load import as_written

SMALL = "data: {train_data_path: t.jsonl}\n"
SECRET = "hf_0123456789secret"


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("A_SECRET", SECRET)
    monkeypatch.setenv("A_NUMBER", "7")


def test_a_variable_is_resolved_and_never_written(write, tmp_path, environment):
    path = write(
        "c.yaml",
        SMALL
        + "policy: {model_name: '${oc.env:A_SECRET}', precision: '${oc.env:NO_SUCH,float32}'}\n"
        "dpo: {seed: '${oc.decode:${oc.env:A_NUMBER}}', reference: {model_name: \"a'b/${oc.env:A_SECRET}/\\\\${x}\"}}\n"
        "logger: {log_dir: '${policy.model_name}-logs', wandb: {project: '${oc.env:NO_SUCH,null}'}}\n"
        "policy2: &unused null\n".replace("policy2: &unused null\n", ""),
    )
    cfg = load_config(path, ["checkpointing.checkpoint_dir=x/${oc.env:A_SECRET}"])
    assert cfg.policy.model_name == cfg.policy.tokenizer.name == SECRET, "resolved, and where it is taken over"
    assert (cfg.dpo.seed, cfg.logger.log_dir) == (7, f"{SECRET}-logs")
    assert cfg.dpo.reference.model_name == f"a'b/{SECRET}/${{x}}"

    save_resolved(cfg, tmp_path / "resolved.yaml", {"note": "n"})
    text = (tmp_path / "resolved.yaml").read_text()
    assert SECRET not in text and SECRET not in repr(cfg.environment.keys())
    written = yaml.safe_load(text)
    assert written == yaml.safe_load(yaml.safe_dump(as_written(cfg)))
    assert written["policy"]["model_name"] == written["policy"]["tokenizer"]["name"] == "${oc.env:A_SECRET}"
    assert written["policy"]["precision"] == "${oc.env:NO_SUCH, 'float32'}"
    assert written["checkpointing"]["checkpoint_dir"] == "x/${oc.env:A_SECRET}"
    assert written["logger"]["log_dir"] == "${oc.env:A_SECRET}-logs"
    assert written["logger"]["wandb"]["project"] == "${oc.env:NO_SUCH, null}"
    assert load_config(tmp_path / "resolved.yaml") == cfg, "in the same environment the same config"


def test_words_of_a_report(write, environment):
    cfg = load_config(write("c.yaml", SMALL + "policy: {model_name: '${oc.env:A_SECRET}'}\n"))
    assert hidden_words(f"| base | {SECRET} |", cfg.environment) == "| base | ${oc.env:A_SECRET} |"
    assert SECRET not in repr(dataclasses.replace(cfg, policy=None))


@pytest.mark.timeout(40)
def test_interpolations_that_grow_without_end(write, monkeypatch):
    monkeypatch.setattr("megadpo.config.bounded.MOST_SECONDS", 1.0)
    lines = [f"a{n}: '${{a{n + 1}}}${{a{n + 1}}}'" for n in range(40)] + [f"a40: {'x' * 100}"]
    with pytest.raises(ConfigError, match="interpolations that end"):
        load_config(write("c.yaml", SMALL + "policy: {model_name: '${a0}'}\n" + "\n".join(lines) + "\n"))
    with pytest.raises(ConfigError, match="not two numbers"):
        load_config(write("c.yaml", SMALL + "policy: {model_name: '${mul:x,99999999999}'}\n"))
