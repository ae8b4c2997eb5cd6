"""One case of the matrix: refused by the config check with a reason, or equal to one process."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megadpo.config.problems import ConfigError, Problem
from megadpo.train.check import checked_config
from tests.helpers.equal_runs import Outcome, assert_equal_runs, run
from tests.helpers.runs import make_config
from tests.layouts.impossible import IMPOSSIBLE
from tests.layouts.matrix import MOST_PROCESSES, Case, as_overrides
from tests.layouts.models import MODELS, Model


@dataclass(frozen=True)
class Proved:
    """What became of a case."""

    refused: tuple[str, ...] = ()
    """The check's reasons; empty where it ran."""
    relative: float | None = None
    """Largest relative difference to one process; None where it did not run."""


NOT_RUN = Proved()
"""It takes more processes than tests start."""


class Bench:
    """Model folders, configs and runs of one process, each made when it is first needed and shared by all cases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._references: dict[tuple[str, ...], Outcome] = {}
        self._problems: dict[tuple[str | int, ...], list[Problem]] = {}

    def model(self, model: Model) -> Path:
        folder = self.folder / model.name / "model"
        return folder if folder.exists() else model.make(folder)

    def config(self, model: Model) -> Path:
        """What every case of the model overrides, for the check alone."""
        folder = self.folder / model.name
        if (folder / "config.yaml").exists():
            return folder / "config.yaml"
        return make_config(folder, self.model(model), policy={"megatron_cfg": model.megatron})

    def problems(self, model: Model, overrides: Sequence[str], world_size: int) -> list[Problem]:
        """The check's, by the code behind `launch/train.py --check --world-size`."""
        key = (model.name, *overrides, world_size)
        if key not in self._problems:
            try:
                checked_config(str(self.config(model)), overrides, world_size)
                self._problems[key] = []
            except ConfigError as error:
                self._problems[key] = error.problems
        return self._problems[key]

    def impossible(self) -> list[list[Problem]]:
        """The check's answers to IMPOSSIBLE, in its order."""
        models = {model.name: model for model in MODELS}
        return [self.problems(models[i.model], as_overrides(i.values), i.world_size) for i in IMPOSSIBLE]

    def run(self, name: str, model: Model, world_size: int, overrides: Sequence[str]) -> Outcome:
        folder = self.folder / model.name / "runs" / name
        outcome = run(folder, self.model(model), world_size, overrides, policy={"megatron_cfg": model.megatron})
        shutil.rmtree(folder)
        return outcome

    def one_process(self, model: Model, overrides: Sequence[str]) -> Outcome:
        key = (model.name, *overrides)
        if key not in self._references:
            self._references[key] = self.run(f"one process {len(self._references)}", model, 1, overrides)
        return self._references[key]

    def prove(self, case: Case) -> Proved:
        """Raises AssertionError where the case is neither refused for one of its options nor equal to one process."""
        problems = self.problems(case.model, case.overrides, case.world_size)
        if problems:
            strange = [str(problem) for problem in problems if not case.may_be_named(problem.where)]
            assert not strange, f"{case.name} is refused for something else: {strange}"
            return Proved(refused=tuple(map(str, problems)))
        if case.world_size > MOST_PROCESSES:
            return NOT_RUN
        got = self.run(case.name, case.model, case.world_size, case.overrides)
        want = self.one_process(case.model, case.altering)
        same_tokens = case.computes_the_same_tokens
        return Proved(relative=assert_equal_runs(got, want, same_tokens=same_tokens).relative)
