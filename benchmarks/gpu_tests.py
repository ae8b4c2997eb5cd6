"""The tests marked gpu, several at a time, each result written as it comes: `python benchmarks/gpu_tests.py --out tests.json`.

A call with the same file runs what has not passed yet, with the same code. When --minutes are up pytest is interrupted, so
that it prints its summary, and killed 20 s later. Tests of one xdist_group share their fixtures. Exit code 0 where all
have passed or were skipped; 1 where one failed; 3 where some are left and none failed.

This file is pytest's plugin as well: it notes results in the file $MEGADPO_GPU_TESTS, a JSON object a line.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # run as a script, the path starts in benchmarks/

from benchmarks import gpu_code  # noqa: E402

NOTES = "MEGADPO_GPU_TESTS"
GRACE_S = 20.0
"""From the interrupt to the kill."""
TEXT = 2000
"""Characters kept of what a test printed and of why it failed."""


def _note(**content: Any) -> None:
    with open(os.environ[NOTES], "a", encoding="utf-8") as lines:
        lines.write(json.dumps(content) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the marked ones that have not passed before."""
    passed = set(json.loads(os.environ.get(NOTES + "_PASSED", "[]")))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if getattr(config, "workerinput", {"workerid": "gw0"})["workerid"] == "gw0":
        groups = {item.nodeid: mark.args[0] for item in marked if (mark := item.get_closest_marker("xdist_group"))}
        _note(collected=[item.nodeid for item in marked], groups=groups)
    items[:] = [item for item in marked if item.nodeid not in passed]


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the workers' results come to the one that started them
        config.pluginmanager.register(_Controller())


class _Controller:
    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        """By groups, as --dist loadgroup is meant to: xdist 3.8's own finds none under pytest 9.2."""
        from xdist.scheduler import LoadScopeScheduling

        class ByGroup(LoadScopeScheduling):  # type: ignore[misc]
            def _split_scope(self, nodeid: str) -> str:
                with open(os.environ[NOTES], encoding="utf-8") as lines:
                    return str(json.loads(next(lines))["groups"].get(nodeid, nodeid))

        return ByGroup(config, log)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            failed = str(report.longrepr)[-TEXT:] if report.failed else ""
            one = {"id": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
            _note(**one, said=report.capstdout[-TEXT:], failed=failed)


def earlier(path: Path, machine: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What passed before, by test, where gpu_code.continues."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not gpu_code.continues(content["machine"], machine):
        return {}
    return {one["id"]: one for one in content["tests"] if one["outcome"] == "passed"}


def result(machine: dict[str, Any], before: dict[str, dict[str, Any]], notes: Path) -> dict[str, Any]:
    """For the JSON file: all that is known by now. A test that failed anywhere, in setup or teardown too, has failed."""
    lines = [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()] if notes.exists() else []
    tests, collected = dict(before), list(before)
    for one in lines:
        if "collected" in one:
            collected = one["collected"]
        elif tests.get(one["id"], {}).get("outcome") != "failed":
            tests[one["id"]] = one
    left = [name for name in collected if name not in tests]
    return {"machine": machine, "command": sys.argv, "tests": list(tests.values()), "left": left}


def command(paths: list[str], workers: int) -> list[str]:
    """pytest's, as far as its plugins are there."""
    found = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu_tests", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        found += ["-n", str(workers), "--dist", "loadscope"]
    if not importlib.util.find_spec("pytest_timeout"):
        found += ["-o", "addopts=--import-mode=importlib"]  # --strict-config refuses the `timeout` of pyproject.toml
    return [*found, *paths]


def run(paths: list[str], path: Path, machine: dict[str, Any], limit_s: float, workers: int) -> dict[str, Any]:
    """Run what has not passed yet, and keep `path` up to date."""
    before = earlier(path, machine)
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes.jsonl"
        env = os.environ | {NOTES: str(notes), NOTES + "_PASSED": json.dumps(list(before))}
        env["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
        started, interrupted = time.monotonic(), False
        process = subprocess.Popen(command(paths, workers), cwd=REPOSITORY, env=env, start_new_session=True)
        try:
            while process.poll() is None:
                passed_s = time.monotonic() - started
                if passed_s > limit_s and not interrupted:
                    interrupted = True
                    process.send_signal(signal.SIGINT)
                if passed_s > limit_s + GRACE_S:
                    break
                time.sleep(0.5)
                save(path, result(machine, before, notes))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and whatever the tests have started
            process.wait()
        content = result(machine, before, notes)
    save(path, content)
    return content


def save(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file; what passed in it is not run again")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--workers", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)))
    parser.add_argument("paths", nargs="*", help="default: every file of tests/ that marks a test gpu")
    options = parser.parse_args(arguments)
    marked = [path for path in sorted((REPOSITORY / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    paths = options.paths or [str(path.relative_to(REPOSITORY)) for path in marked]
    asked = "import json; from benchmarks import gpu_machine; print(json.dumps(gpu_machine.machine()))"
    done = subprocess.run(
        [sys.executable, "-c", asked], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )  # in a process of its own, which leaves nothing on the GPU
    limit_s = 60 * options.minutes - GRACE_S
    content = run(paths, options.out, json.loads(done.stdout), limit_s, options.workers)
    outcomes = [one["outcome"] for one in content["tests"]]
    counts = {name: outcomes.count(name) for name in ("passed", "failed", "skipped")}
    print(f"{counts}, {len(content['left'])} left{': call this again' if content['left'] else ''}")
    return 1 if counts["failed"] or not outcomes else 3 if content["left"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
