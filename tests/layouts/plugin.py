"""`pytest -p tests.layouts.plugin --write-layouts`: docs/layouts.md from the results of tests/layouts/test_whole.py.

`--layout-results FILE` keeps the results of finished cases, and a later session with the same sources runs the missing
ones only: for a long run that was cut off. `make test-layouts` does not use it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.layouts import table
from tests.layouts.matrix import all_cases
from tests.layouts.prove import Bench, Proved
from tests.layouts.table import COMMAND, PAGE, render

ROOT = Path(__file__).resolve().parents[2]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("layouts")
    group.addoption("--write-layouts", action="store_true", help="write docs/layouts.md once every case has passed")
    group.addoption("--layout-results", type=Path, help="file that keeps finished cases for a later session")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Collector(config), "layouts-collector")


class Collector:
    """What the cases found; in a session of several workers, the one that distributes the work."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.kept: Path | None = config.getoption("--layout-results")
        self.sources = fingerprint()
        self.results = self._kept_results()

    def _kept_results(self) -> dict[str, Proved]:
        if self.kept is None or not self.kept.exists():
            return {}
        lines = [json.loads(line) for line in self.kept.read_text().splitlines()]
        return {name: _proved(found) for sources, name, found in lines if sources == self.sources}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = [i for i in items if "layouts" in i.keywords and i.callspec.params["case"].name in self.results]
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item not in done]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if hasattr(self.config, "workerinput") or report.when != "call" or report.failed:
            return
        for key, value in report.user_properties:
            if key == "layout":
                name, found = json.loads(str(value))
                self.results[name] = _proved(found)
                if self.kept is not None:
                    with open(self.kept, "a") as file:
                        file.write(json.dumps([self.sources, name, found]) + "\n")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.config.getoption("--write-layouts"):
            return
        missing = [case.name for case in all_cases() if case.name not in self.results]
        if missing:
            terminalreporter.write_line(f"{PAGE} not written: {len(missing)} cases missing, {missing[:5]}", red=True)
            return
        with tempfile.TemporaryDirectory() as folder:
            PAGE.write_text(render(self.results, Bench(Path(folder)).impossible(), run_line()))
        terminalreporter.write_line(f"wrote {PAGE}")


def _proved(found: dict[str, object]) -> Proved:
    return Proved(refused=tuple(found["refused"]), relative=found["relative"])  # type: ignore[arg-type]


def fingerprint() -> str:
    """Of the sources that a result depends on: not those that write it down."""
    digest = hashlib.sha256()
    folders = ("megadpo/**", "tests/helpers", "tests/model/weights", "tests/layouts")
    found = {path for folder in folders for path in ROOT.glob(f"{folder}/*.py")}
    for path in sorted(found - {Path(__file__).resolve(), Path(table.__file__).resolve()}):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run_line() -> str:
    """When, of which revision, and with which versions."""
    asked = ("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*")
    revision = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "no git"
    versions = [f"{name} {version(name)}" for name in ("torch", "megatron-core", "transformers")]
    machine = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    return f"{datetime.date.today()}, `{COMMAND}`, revision {revision}; {machine}, {', '.join(versions)}."
