"""Variants come from files that nobody lists: a loss from outside is checked, read, documented and refused like ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megadpo.config import ConfigError, as_dict, build_config, catalogue
from megadpo.config.variants import LOSSES, Variants

PLUGIN = '''
from dataclasses import dataclass

from megadpo.config.problems import Problem
from megadpo.config.types import PositiveFloat
from megadpo.config.variants import LOSSES
from megadpo.objective.losses import Loss


@LOSSES.add("cubed")
@dataclass(frozen=True, kw_only=True)
class Cubed(Loss):
    """(beta (r_w - r_l) - a)^3, [P]."""

    cubed_aim: PositiveFloat = 2.0
    """What the margin is compared with."""

    def of_pairs(self, scores, beta):
        return (beta * (scores.chosen_logratios - scores.rejected_logratios) - self.cubed_aim) ** 3

    def problems(self, known):
        yield from super().problems(known)
        if self.cubed_aim > known.cfg.dpo.reference_policy_kl_penalty * 100:
            yield Problem("dpo.cubed_aim", self.cubed_aim, "at most 100 x beta", "lower it")
'''


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "cubed.py"
    path.write_text(PLUGIN)
    yield str(path)
    if "cubed" in LOSSES:
        LOSSES.remove("cubed")


def tree(plugin: str, **dpo: object) -> dict[str, object]:
    policy = {"model_name": "m", "tokenizer": {}}
    return {"plugins": [plugin], "policy": policy, "dpo": dpo, "data": {"train_data_path": "t.jsonl"}}


def test_a_loss_from_a_file_outside_is_read_and_documented(plugin: str) -> None:
    cfg = build_config(tree(plugin, loss_type="cubed", cubed_aim=3))
    assert cfg.dpo.loss.cubed_aim == 3.0
    assert as_dict(cfg)["dpo"]["cubed_aim"] == 3.0
    assert "| `cubed_aim` | a number > 0 | 2.0 | What the margin is compared with. |" in catalogue.page()
    assert build_config(as_dict(cfg)) == cfg


@pytest.mark.parametrize(
    ("dpo", "where", "words"),
    [
        ({"loss_type": "cubed", "cubed_aim": 9}, "dpo.cubed_aim", "at most 100 x beta"),
        ({"loss_type": "cubed", "cubed_aim": "x"}, "dpo.cubed_aim", "a number > 0"),
        ({"loss_type": "cubd"}, "dpo.loss_type", "did you mean cubed"),
        ({"cubed_aim": 3}, "dpo.cubed_aim", "read by cubed"),
        ({"cubed_am": 3}, "dpo.cubed_am", "did you mean dpo.cubed_aim"),
    ],
)
def test_it_refuses_like_ours(plugin: str, dpo: dict[str, object], where: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(tree(plugin, **dpo))
    (problem,) = caught.value.problems
    assert problem.where == where and words in str(problem)


def test_a_rule_that_reads_an_unreadable_value_says_nothing(plugin: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(tree(plugin, loss_type="cubed", cubed_aim=9, reference_policy_kl_penalty="x"))
    assert [problem.where for problem in caught.value.problems] == ["dpo.reference_policy_kl_penalty"]


@pytest.mark.parametrize(
    ("name", "words"), [("no/such.py", "FileNotFoundError"), ("no_such_module", "No module named")]
)
def test_a_plugin_that_cannot_be_imported_is_named(name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(tree(name))
    (problem,) = caught.value.problems
    assert problem.where == "plugins" and words in str(problem)


def test_a_name_belongs_to_one_variant() -> None:
    kind: Variants[object] = Variants("thing", "megadpo.config.types")
    kind.add("one")(object())
    with pytest.raises(ValueError, match="'one' already"):
        kind.add("one")(object())
