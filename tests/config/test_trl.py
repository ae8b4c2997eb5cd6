"""TRL's lists of losses, and the files to inherit for losses that need other settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from megadpo.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def losses(cfg):
    return (
        cfg.dpo.loss_type,
        cfg.dpo.loss_options["loss_weights"],
        cfg.dpo.preference_loss_weight,
        cfg.dpo.sft_loss_weight,
    )


@pytest.mark.parametrize(
    ("dpo", "expected"),
    [
        ({"loss_type": ["sigmoid"]}, ("sigmoid", None, 1.0, 0.0)),
        ({"loss_type": ["sigmoid", "bco_pair"]}, ("weighted", {"sigmoid": 1.0, "bco_pair": 1.0}, 1.0, 0.0)),
        ({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
         ("weighted", {"sigmoid": 0.8, "bco_pair": 0.2}, 1.0, 1.0)),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.5]}, ("sigmoid", None, 1.0, 0.5)),
        ({"loss_type": ["hinge"], "loss_weights": [2.0]}, ("weighted", {"hinge": 2.0}, 1.0, 0.0)),
        ({"loss_type": ["hinge", "hinge"], "loss_weights": [0.5, 0.25]}, ("weighted", {"hinge": 0.75}, 1.0, 0.0)),
        ({"loss_type": ["sft"]}, ("sigmoid", None, 0.0, 1.0)),
        ({"loss_type": "weighted", "loss_weights": {"ipo": 2.0}}, ("weighted", {"ipo": 2.0}, 1.0, 0.0)),
    ],
)  # fmt: skip
def test_lists(dpo, expected, config):
    cfg = config(dpo=dpo)
    assert losses(cfg) == expected
    assert ("sft" in dpo["loss_type"]) == any("read as dpo.sft_loss_weight" in note for note in cfg.notes)


@pytest.mark.parametrize(
    ("dpo", "where"),
    [
        ({"loss_type": []}, "dpo.loss_type"),
        ({"loss_type": ["sigmoid", 3]}, "dpo.loss_type"),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "dpo.loss_weights"),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": ["a", 1]}, "dpo.loss_weights"),
        ({"loss_type": ["sigmoid", "aot"]}, "dpo.loss_weights"),
        ({"loss_type": ["sigmoid", "weighted"]}, "dpo.loss_weights"),
        ({"loss_type": "weighted"}, "dpo.loss_weights"),
        ({"loss_type": "sigmoid", "loss_weights": {"ipo": 1.0}}, "dpo.loss_weights"),
        ({"loss_type": ["sigmoid", "sft"], "sft_loss_weight": 0.5}, "dpo.sft_loss_weight"),
        ({"loss_type": ["sigmoid", "ipo"], "discopop_tau": 0.5}, "dpo.discopop_tau"),
        ({"loss_type": ["sigmoid", "exo_pair"]}, "dpo.label_smoothing"),
        ({"loss_type": ["sigmoid", "simpo"]}, "dpo.preference_average_log_probs"),
        ({"loss_type": ["cpo", "hinge"], "reference": {"mode": "none"}}, "dpo.reference.mode"),
        ({"loss_type": "sigmoid_norm", "preference_average_log_probs": True}, "dpo.preference_average_log_probs"),
        ({"ld_alpha": 1.5}, "dpo.ld_alpha"),
    ],
)
def test_lists_that_cannot_be(dpo, where, refusals):
    assert list(refusals(dpo=dpo)) == [where]


def test_losses_without_a_reference_may_stand_beside_those_with_one(config):
    assert config(dpo={"loss_type": ["sigmoid", "cpo"]}).dpo.loss.reads_reference
    alone = config(
        dpo={"loss_type": ["cpo", "orpo"], "reference": {"mode": "none"}, "preference_average_log_probs": True}
    )
    assert not alone.dpo.loss.reads_reference


@pytest.mark.parametrize("name", ["simpo", "orpo", "cpo"])
def test_a_refusal_has_the_line_to_paste(name, refusals, config):
    fixes = {one.fix for one in refusals(dpo__loss_type=name).values()}
    (line,) = fixes
    pasted = dict(one.split("=") for one in line.removeprefix("add ").split())
    values = {
        key.replace(".", "__"): value == "true" if value in ("true", "false") else value
        for key, value in pasted.items()
    }
    assert config(dpo__loss_type=name, **values).dpo.loss_type == name


@pytest.mark.parametrize("path", sorted((CONFIGS / "losses").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_file_to_inherit(path, tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(f"defaults: [{CONFIGS / 'dpo_megatron.yaml'}, {path}]\ndata: {{train_data_path: t.jsonl}}\n")
    cfg = load_config(run)
    assert cfg.dpo.loss_type == ("weighted" if path.stem == "mpo" else path.stem)


def test_weights_that_weigh_nothing_are_noted(config):
    notes = config(
        dpo={"ld_alpha": 0.5, "use_weighting": True, "preference_loss_weight": 0.0, "sft_loss_weight": 1.0}
    ).notes
    assert [note.partition(":")[0] for note in notes] == ["dpo.ld_alpha", "dpo.use_weighting"]
