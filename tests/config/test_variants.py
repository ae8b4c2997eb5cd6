"""Variants come from files that nobody lists: a loss from outside is checked, read, documented and refused like ours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest

from megadpo.config import ConfigError, as_dict, build_config, catalogue
from megadpo.config.known import Known
from megadpo.config.problems import Problem
from megadpo.config.reader import Reader, dotted_paths
from megadpo.config.types import PositiveInt
from megadpo.config.variants import LOSSES, OneOf, OptionsOf, SwitchedVariants, Variants

PLUGIN = '''
from dataclasses import dataclass

from megadpo.config.problems import Problem
from megadpo.config.types import PositiveFloat
from megadpo.config.variants import LOSSES
from megadpo.objective.losses import Loss


@LOSSES.add("cubed")
@dataclass(frozen=True, kw_only=True)
class Cubed(Loss):
    """(beta (r_w - r_l) - a)^3, [P]. Source: nobody, https://example.org/cubed."""

    cubed_aim: PositiveFloat = 2.0
    """What the margin is compared with."""

    def pair_losses(self, scores, beta):
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
    assert "| `cubed_aim` | a number > 0 | 2.0 | What the margin is compared with. Read by cubed. |" in catalogue.page()
    table = catalogue.with_losses(f"{catalogue.LOSSES_BEGIN}{catalogue.LOSSES_END}")
    row = "| `cubed` | (beta (r_w - r_l) - a)^3. | `cubed_aim` | nobody, [example.org/cubed](https://example.org/cubed). |"
    assert row in table
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


@dataclass(frozen=True, kw_only=True)
class AnswerKeys:
    chosen_key: str = "chosen"
    """What the rows call the chosen answer."""


@dataclass(frozen=True, kw_only=True)
class AllKeys(AnswerKeys):
    prompt_key: str = "prompt"
    """And the prompt."""


class Fixed:
    """A format without options."""


FORMATS: Variants[Any] = Variants("format", "megadpo.config.types", field="data.dataset_name", options="keys")
for name, format_ in {"all": AllKeys, "answers": AnswerKeys, "fixed": Fixed()}.items():
    FORMATS.add(name)(format_)


@dataclass(frozen=True, kw_only=True)
class Data:
    dataset_name: Annotated[str | None, OneOf(FORMATS)] = None
    keys: Annotated[Mapping[str, Any], OptionsOf(FORMATS)] = field(default_factory=FORMATS.defaults)


@dataclass(frozen=True, kw_only=True)
class Board:
    """Draw curves on a board.

    A second line, for those who want to know more.
    """

    width: PositiveInt = 80
    """In characters."""

    def problems(self, known: Known) -> Iterator[Problem]:
        if self.width % 2:
            yield Problem("logger.board.width", self.width, "even", "add one")


LOGGERS: SwitchedVariants[Any] = SwitchedVariants("logger", "megadpo.config.types", section="logger", options="loggers")
LOGGERS.add("board")(Board)


@dataclass(frozen=True, kw_only=True)
class Logger:
    log_dir: str = "logs"
    """Folder."""
    loggers: Annotated[Mapping[str, Any], OptionsOf(LOGGERS)] = field(default_factory=LOGGERS.defaults)


@dataclass(frozen=True, kw_only=True)
class Root:
    data: Data = field(default_factory=Data)
    logger: Logger = field(default_factory=Logger)


def read(tree: dict[str, Any]) -> tuple[Any, list[Problem]]:
    reader = Reader(frozenset(dotted_paths(Root)))
    return reader.section(Root, tree, ""), reader.problems


@pytest.mark.parametrize(
    ("data", "unread"),
    [
        ({"dataset_name": "all", "prompt_key": "q", "chosen_key": "a"}, {}),
        ({"dataset_name": "answers", "prompt_key": "q", "chosen_key": "a"}, {"data.prompt_key": ["all"]}),
        ({"dataset_name": "fixed", "chosen_key": "a"}, {"data.chosen_key": ["all", "answers"]}),
        ({"prompt_key": "q", "chosen_key": "a"}, {}),  # none is chosen: any of them may be used
    ],
)
def test_options_that_several_variants_share(data: dict[str, Any], unread: dict[str, list[str]]) -> None:
    cfg, refused = read({"data": data})
    assert refused == []
    assert {where: readers for where, _, readers in FORMATS.unread(cfg)} == unread
    problems = list(FORMATS.problems(Known(cfg=cfg)))
    assert [problem.where for problem in problems] == list(unread)
    assert all(f"read by {', '.join(unread[problem.where])}" in problem.expected for problem in problems)


def test_variants_that_are_switched_on() -> None:
    cfg, refused = read({"logger": {"board_enabled": True, "board": {"width": 3}}})
    assert refused == [] and LOGGERS.enabled(cfg.logger.loggers) == [Board(width=3)]
    assert [problem.where for problem in LOGGERS.problems(Known(cfg=cfg))] == ["logger.board.width"]
    assert as_dict(cfg)["logger"] == {"log_dir": "logs", "board_enabled": True, "board": {"width": 3}}
    off, _ = read({"logger": {"board": {"width": 3}}})
    assert LOGGERS.enabled(off.logger.loggers) == [] and list(LOGGERS.problems(Known(cfg=off))) == []
    _, problems = read({"logger": {"bord_enabled": True, "board": {"width": 0, "with": 9}}})
    assert [one.where for one in problems] == ["logger.board.width", "logger.board.with", "logger.bord_enabled"]
    assert "logger.board_enabled" in problems[2].fix
    assert LOGGERS.keys()["board_enabled"].meaning == "Draw curves on a board."


def test_an_option_is_declared_once() -> None:
    kind: Variants[Any] = Variants("thing", "megadpo.config.types")
    kind.add("one")(AnswerKeys)
    kind.add("two")(dataclass(type("Other", (), {"__annotations__": {"chosen_key": str}, "chosen_key": "x"})))
    with pytest.raises(ValueError, match="'chosen_key'"):
        kind.keys()


def test_a_name_belongs_to_one_variant() -> None:
    kind: Variants[object] = Variants("thing", "megadpo.config.types")
    kind.add("one")(object())
    with pytest.raises(ValueError, match="'one' already"):
        kind.add("one")(object())


def test_names_do_not_follow_the_order_of_imports() -> None:
    code = (
        "import sys; [__import__(name) for name in sys.argv[1:]]\n"
        "from megadpo.config.variants import ATTENTION_KERNELS, FORMATS\n"
        "print(ATTENTION_KERNELS.names(), FORMATS.names())"
    )
    first = ("megadpo.model.kernels.varlen", "megadpo.data.formats.tulu3")
    printed = [
        subprocess.run([sys.executable, "-c", code, *modules], text=True, capture_output=True, check=True).stdout
        for modules in ((), first)
    ]
    assert printed[0] == printed[1] != ""
