"""README.md's first runs, on models and pairs that are there: the check, and what needs no data of one's own."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from megadpo.commands import main
from megadpo.config import load_config
from tests.helpers.distributed import REPOSITORY, run_distributed
from tests.helpers.runs import make_model, make_pairs, read_metrics, train_and_read

LINES = (REPOSITORY / "README.md").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()


def test_the_check_of_the_first_real_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = [line for line in LINES if line.startswith("    megadpo check ")]
    model = make_model(tmp_path / "model", num_key_value_heads=4, num_hidden_layers=2, max_position_embeddings=8192)
    command = command.replace("/models/Llama-3.1-8B-Instruct", str(model))
    for name, count in (("pairs.jsonl", 200), ("held_out.jsonl", 10)):
        command = command.replace(f"={name}", f"={make_pairs(tmp_path / name, count)}")
    monkeypatch.chdir(REPOSITORY)
    assert main([*shlex.split(command)[1:], f"data.cache_dir={tmp_path / 'cache'}"]) == 0
    assert "no problem found" in capsys.readouterr().out


def test_a_set_of_the_hub_takes_the_place_of_a_files_data() -> None:
    (words,) = [line.split("`")[1] for line in LINES if "`data.dataset_name=HelpSteer3" in line]
    data = load_config("dpo_megatron", shlex.split(words)).data
    assert data.train_data_path == "nvidia/HelpSteer3:preference@train" and data.val_data_paths is not None
    assert data.val_data_paths["default"] == "nvidia/HelpSteer3:preference@validation"


def test_a_config_of_ones_own(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    file = tmp_path / "my_run.yaml"
    file.write_text(text, encoding="utf-8")
    cfg = load_config(file)
    assert cfg.policy.tokenizer.name == cfg.policy.model_name == "Qwen/Qwen3-8B"
    assert cfg.data.val_data_paths == {"default": "held_out.jsonl"} and cfg.notes == ()
    assert cfg.checkpointing.checkpoint_dir != load_config("dpo_megatron").checkpointing.checkpoint_dir


def test_one_file_of_pairs() -> None:
    """The overrides of README.md and docs/data.md, and the file that docs/data.md has beside them, mean the same."""
    (words,) = [line for line in LINES if line.strip().startswith("'~data.val_data_paths' data.holdout")]
    given = load_config("dpo_megatron", ["data.train_data_path=pairs.jsonl", *shlex.split(words)])
    page = (REPOSITORY / "docs/data.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = [line for line in page.splitlines() if line.startswith("    megadpo train ")]
    overrides = [word for word in shlex.split(command)[3:] if "=" in word or word.startswith("~")]
    assert given == load_config("dpo_megatron", overrides)
    assert given.data.val_names == ["holdout"] and given.notes == ()


@pytest.mark.distributed
def test_the_first_run_on_twenty_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command, but for the hub's model and validation set, and on a CPU."""
    (command,) = [line for line in LINES if line.startswith("    megadpo train first_run data.")]
    rows = [json.loads(line) for line in (REPOSITORY / "configs/example_pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and all(row.keys() == {"prompt", "chosen", "rejected"} for row in rows)
    model = make_model(tmp_path / "model", num_hidden_layers=2, max_position_embeddings=4096)
    _, _, config, *overrides = shlex.split(command)
    overrides += [
        f"policy.model_name={model}",
        f"data.val_data_paths={{default: {REPOSITORY / 'configs/example_pairs.jsonl'}}}",
        *("dpo.max_num_steps=6", "dpo.val_global_batch_size=4", "dpo.val_at_start=false", "policy.device=cpu"),
        *(f"checkpointing.checkpoint_dir={tmp_path / 'results'}", f"logger.log_dir={tmp_path / 'logs'}"),
    ]
    monkeypatch.chdir(REPOSITORY)
    ((code, printed),) = run_distributed(train_and_read, 1, config, overrides, init_process_group=False)
    assert code == 0, printed
    assert read_metrics(tmp_path / "logs")[-1]["step"] == 6
    assert (tmp_path / "results/step_6").is_dir()
