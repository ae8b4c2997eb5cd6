"""A loss with an option, a format of rows and a logger, each in one file outside the package, train a model, are checked
and documented like ours. (A model family: tests/families/test_family.py.)"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from megadpo.commands import main
from megadpo.config import build_config, catalogue
from megadpo.config.variants import FORMATS, LOGGERS, LOSSES
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config, make_model, read_metrics, train

LOSS = '''
from dataclasses import dataclass

from megadpo.config.types import PositiveFloat
from megadpo.config.variants import LOSSES
from megadpo.objective.losses import Loss


@LOSSES.add("squared")
@dataclass(frozen=True, kw_only=True)
class Squared(Loss):
    """(beta (r_w - r_l) - a)^2, [P]; a `squared_aim`. Source: [a test](https://example.org)."""

    squared_aim: PositiveFloat = 1.0
    """Margin that squared aims at."""

    def pair_losses(self, scores, beta):
        return (beta * (scores.chosen_logratios - scores.rejected_logratios) - self.squared_aim) ** 2
'''
FORMAT = '''
from dataclasses import dataclass

from megadpo.config.problems import Problem
from megadpo.config.types import Text
from megadpo.config.variants import FORMATS
from megadpo.data.formats import RowFormat
from megadpo.data.formats.fields import pair_with_prompt


@FORMATS.add("GoodBad")
@dataclass(frozen=True, kw_only=True)
class GoodBad(RowFormat):
    good_key: Text = "good"
    """What the rows call the good answer."""

    def fields(self):
        return ("question", self.good_key, "bad")

    def read(self, row, place):
        if row[self.good_key] == "":
            return [Problem(str(place), "good ''", "an answer", "fill it in")]
        return pair_with_prompt(row, place, row["question"], row[self.good_key], row["bad"])
'''
LOGGER = '''
from dataclasses import dataclass

from megadpo.config.types import Text
from megadpo.config.variants import LOGGERS
from megadpo.train.loggers.base import Logger


@LOGGERS.add("diary")
@dataclass(frozen=True, kw_only=True)
class Diary(Logger):
    """Write the loss of each step to a text file."""

    key, package = "diary", "json"
    file: Text = "diary.txt"
    """Its name in logger.log_dir."""

    def open(self, run):
        return Page(run.log_dir / self.file)


class Page:
    def __init__(self, path):
        self.path = path

    def log(self, step, metrics):
        with self.path.open("a") as file:
            print(step, metrics["train/loss"], file=file)

    def close(self, exit_code):
        with self.path.open("a") as file:
            print("end", exit_code, file=file)
'''


@pytest.fixture
def plugins(tmp_path: Path) -> Iterator[list[str]]:
    paths = []
    for name, text in (("loss", LOSS), ("format", FORMAT), ("logger", LOGGER)):
        (tmp_path / f"my_{name}.py").write_text(text)
        paths.append(str(tmp_path / f"my_{name}.py"))
    yield paths
    for kind, name in ((LOSSES, "squared"), (FORMATS, "GoodBad"), (LOGGERS, "diary")):
        if name in kind:
            kind.remove(name)


@pytest.mark.distributed
def test_they_train(plugins: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(tmp_path, make_model(tmp_path / "model"), dpo={"max_num_steps": 2})
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    renamed = [{"question": row["prompt"], "better": row["chosen"], "bad": row["rejected"]} for row in rows]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    overrides = [
        f"plugins={plugins}",
        *("dpo.loss_type=squared", "dpo.squared_aim=3", "data.good_key=better", "data.val_data_paths=null"),
        *("logger.diary_enabled=true", "logger.diary.file=days.txt"),
    ]
    assert main(["check", str(config), *overrides]) == 0
    assert "no problem found" in capsys.readouterr().out
    assert run_distributed(train, 1, str(config), overrides, init_process_group=False) == [0]
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "logs")]
    assert losses[0] == pytest.approx(9.0) and losses[1] < losses[0]  # at the start every margin is 0
    diary = (tmp_path / "logs/days.txt").read_text().split("\n")
    assert [float(line.split()[1]) for line in diary[:2]] == losses and diary[2] == "end 0"
    page = catalogue.page()
    for key in ("squared_aim", "good_key", "diary_enabled", "file"):
        assert f"| `{key}` |" in page
    assert "GoodBad" in page and math.isfinite(losses[1])


def test_what_they_refuse_is_refused(plugins: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(tmp_path, make_model(tmp_path / "model"))
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "q", "good": "", "bad": "b"}) + "\n")
    assert main(["check", str(config), f"plugins={plugins}"]) == 2
    assert "train.jsonl:1: got \"good ''\"; expected an answer" in " ".join(capsys.readouterr().err.split())
    tree = {"plugins": plugins, "policy": {"model_name": "m"}, "data": {"train_data_path": "t", "prompt_key": "x"}}
    with pytest.raises(
        Exception, match="data.prompt_key: got 'x'.*data.dataset_name GoodBad; read by BinaryPreferenceDataset"
    ):
        build_config({**tree, "data": {**tree["data"], "dataset_name": "GoodBad"}})  # type: ignore[dict-item]
