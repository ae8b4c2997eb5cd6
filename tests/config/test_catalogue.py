"""Every key is on docs/config.md and in `megadpo keys`, with what it means; every loss on docs/losses.md."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from megadpo.commands import main
from megadpo.config.catalogue import LOSSES_BEGIN, LOSSES_END, page, sections, with_kernels, with_losses
from megadpo.config.load import load_config
from megadpo.config.nemo_rl.translate import nemo_keys
from megadpo.config.reader import dotted_paths
from megadpo.config.schema import Config
from megadpo.config.variants import LOSSES, variant_options

DOCS = Path(__file__).parents[2] / "docs"
AGAIN = "write it again: megadpo keys --write docs"


def test_the_page_is_that_of_the_schema() -> None:
    written = (DOCS / "config.md").read_text(encoding="utf-8")
    assert written == page(), AGAIN


def test_the_table_of_losses_is_that_of_the_register() -> None:
    written = (DOCS / "losses.md").read_text(encoding="utf-8")
    assert written == with_losses(written), AGAIN
    for name in get_args(variant_options(LOSSES["sigmoid"])["f_divergence_type"].annotation):
        assert f"| `{name}` |" in written


def test_the_table_of_kernels_is_that_of_their_declarations() -> None:
    written = (DOCS / "families.md").read_text(encoding="utf-8")
    assert written == with_kernels(written), AGAIN
    (softcap,) = (line for line in written.splitlines() if line.startswith("| a soft-cap"))
    assert softcap.count("refused") == 4


def test_every_loss_has_a_formula_and_a_source() -> None:
    rows = [line.split(" | ") for line in with_losses(f"{LOSSES_BEGIN}{LOSSES_END}").splitlines()[3:-1]]
    assert [row[0] for row in rows] == [f"| `{name}`" for name in LOSSES.names()]
    assert all(len(row) == 4 and row[1] and "](https://" in row[3] for row in rows)


def test_every_key_is_there_once_with_a_meaning() -> None:
    keys = [key for section in sections() for key in section.keys]
    above = {section.path for section in sections()}
    assert sorted(key.path for key in keys) == sorted(set(dotted_paths(Config)) - above)
    assert [key.path for key in keys if not key.meaning] == []


def test_a_key_of_nemo_rl_is_on_the_page_with_its_reason() -> None:
    written = page()
    for key in nemo_keys().values():
        (line,) = [line for line in written.splitlines() if line.startswith(f"| `{key.path}` |")]
        assert key.why in line


def test_defaults_are_those_of_a_config_that_leaves_everything_out(tmp_path: Path) -> None:
    least = {"policy.model_name": "a", "data.train_data_path": "b"}
    shown = {key.path: key.default for section in sections() for key in section.keys}
    shown = {path: default for path, default in shown.items() if default not in ("derived", "required")}
    assert len(shown) > 80
    written = {}
    for name, values in (("least", least), ("all", {**shown, **least})):
        file = tmp_path / f"{name}.yaml"
        file.write_text(f"policy: {{model_name: {least['policy.model_name']}}}")
        written[name] = load_config(file, [f"{path}={value}" for path, value in values.items()])
    assert written["all"] == written["least"]


def test_readers_are_those_of_a_variants_option() -> None:
    """TensorBoard's section has a log_dir of its own, which is another key than that of the section with all loggers."""
    meanings = {key.path: key.meaning for section in sections() for key in section.keys}
    assert "Read by" not in meanings["logger.log_dir"]
    assert "Read by adam." in meanings["policy.megatron_cfg.optimizer.adam_beta1"]


def test_keys_are_found_by_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "adam_beta1"]) == 0
    shown = capsys.readouterr().out
    assert "policy.megatron_cfg.optimizer.adam_beta1: a number >= 0 and < 1; default 0.9" in shown
    assert shown.count("default") == 1
    assert main(["keys", "no_such_word"]) == 1
    assert "no key has no_such_word" in capsys.readouterr().err
