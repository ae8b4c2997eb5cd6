"""Starting collections in tests: in this process, or as a user does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megadpo.collect.command import collect
from tests.collect.policy_server import PolicyServer
from tests.helpers.distributed import REPOSITORY

REWARD = "tests.collect.reward_functions:by_seed"


def write_prompts(path: Path, number: int, **fields: Any) -> Path:
    rows = [{"responses_create_params": {"input": f"prompt {index}"}, "expected": "prompt"} for index in range(number)]
    path.write_text("".join(json.dumps({**row, **fields}) + "\n" for row in rows))
    return path


def arguments(folder: Path, server: PolicyServer | str, **options: Any) -> list[str]:
    """`key=value` for a run in `folder` over prompts.jsonl with 3 seeded answers each; `None` leaves an option out."""
    url = server if isinstance(server, str) else server.url
    given: dict[str, Any] = {
        "input_jsonl_fpath": folder / "prompts.jsonl",
        "output_jsonl_fpath": folder / "rollouts.jsonl",
        "policy_base_url": f"{url}/v1",
        "num_repeats": 3,
        "num_repeats_add_seed": "true",
        "num_samples_in_parallel": 4,
        "retry_wait_s": 0.01,
        "reward_function": REWARD,
    }
    return [f"+{name}={value}" for name, value in (given | options).items() if value is not None]


def run(folder: Path, server: PolicyServer | str, **options: Any) -> int:
    return collect(arguments(folder, server, **options))


def start(folder: Path, server: PolicyServer | str, **options: Any) -> subprocess.Popen[str]:
    """The tool as a process of its own."""
    command = [sys.executable, "-m", "megadpo", "collect", *arguments(folder, server, **options)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "NO_PROXY": "127.0.0.1"}
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def journaled(folder: Path) -> set[tuple[int, int]]:
    """(task, rollout) of what is whole in the journal."""
    path = folder / "rollouts.jsonl.journal"
    content = path.read_bytes() if path.exists() else b""
    lines = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
    rows = [json.loads(line) for line in lines]
    return {(row["_ng_task_index"], row["_ng_rollout_index"]) for row in rows if "reward" in row}
