"""Servers that don't sample: what is said, when, and by whom. One of them is real: transformers serve."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megadpo.collect.sampling import answer_digest, not_sampling
from megadpo.commands import main
from tests.collect.policy_server import Fault, PolicyServer
from tests.collect.runs import read, run, write_prompts
from tests.helpers.distributed import REPOSITORY
from tests.helpers.runs import make_model

SAID = "the server doesn't seem to sample"
BY_LENGTH = "tests.collect.reward_functions:by_length"


def test_a_server_that_does_not_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It lists no models either, as transformers serve with a folder."""
    write_prompts(tmp_path / "prompts.jsonl", 4)
    options = {"policy_model_name": "tiny", "responses_create_params.temperature": 0.8, "reward_function": BY_LENGTH}
    with PolicyServer(samples=False, lists_models=False) as server:
        assert run(tmp_path, server, **options) == 0
    printed = capsys.readouterr().out
    assert f"{SAID}: all answers to 4 of 4 prompts are the same, at temperature 0.8" in printed
    assert "transformers serve: samples only where the model's generation_config.json says do_sample: true" in printed
    assert main(["pairs", str(tmp_path / "rollouts.jsonl"), "-o", str(tmp_path / "pairs.jsonl")]) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert "4 of 4 groups have one answer several times: the server doesn't seem to have sampled" in printed


def test_said_after_a_resumed_collection_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_prompts(tmp_path / "prompts.jsonl", 3)
    with PolicyServer(samples=False) as server:
        server.faults["prompt 1", 0] = [Fault(500)]
        assert run(tmp_path, server, max_attempts=1, reward_function=BY_LENGTH) == 1
        capsys.readouterr()
        assert run(tmp_path, server, max_attempts=1, reward_function=BY_LENGTH) == 0
    assert f"{SAID}: all answers to 3 of 3 prompts are the same, and no temperature was sent" in capsys.readouterr().out


def test_nothing_is_said_of_a_server_that_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_prompts(tmp_path / "prompts.jsonl", 4)
    with PolicyServer() as server:
        assert run(tmp_path, server) == 0
    assert "sample" not in capsys.readouterr().out


A, B = b"a", b"b"
CASES = {
    # (prompt, answer, temperature) of each rollout; whether something is said
    "all the same": ([(p, A, 0.7) for p in range(3) for _ in range(4)], True),
    "nine of ten": ([(p, B if p == 0 and n else A, 1.0) for p in range(10) for n in range(4)], True),
    "eight of ten": ([(p, B if p < 2 and n else A, 1.0) for p in range(10) for n in range(4)], False),
    "temperature 0": ([(p, A, 0.0) for p in range(3) for _ in range(4)], False),
    "one answer each": ([(p, A, 0.7) for p in range(9)], False),
    "one prompt": ([(0, A, 0.7) for _ in range(9)], False),
    "nothing": ([], False),
}


@pytest.mark.parametrize("name", CASES)
def test_when_it_is_said(name: str) -> None:
    answers, said = CASES[name]
    assert bool(not_sampling(answers)) == said


def test_ids_do_not_make_answers_differ() -> None:
    call = {"type": "function_call", "call_id": "c1", "id": "x", "name": "f", "arguments": "{}", "status": "completed"}
    other = {**call, "call_id": "c2", "id": "y"}
    assert answer_digest([call]) == answer_digest([other]) != answer_digest([{**call, "arguments": '{"a": 1}'}])


@contextmanager
def transformers_serve(model: Path) -> Iterator[str]:
    """Its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["transformers.cli.transformers", "serve", str(model), "--device", "cpu", "--dtype", "float32"]
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(model.parent / "hub"), "OMP_NUM_THREADS": "1"}
    log = model.parent / "serve.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-c", code, *command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 180
        while True:
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("openai", "fastapi", "uvicorn")),
    reason='needs pip install "transformers[serving]"',
)
@pytest.mark.parametrize("do_sample", [False, True])
def test_transformers_serve(do_sample: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(tmp_path / "model")
    (model / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**config, "do_sample": do_sample}))
    write_prompts(tmp_path / "prompts.jsonl", 3)
    options = {
        "policy_model_name": model, "num_repeats_add_seed": None, "responses_create_params.temperature": 1.0,
        "reward_function": BY_LENGTH,
    }  # fmt: skip
    with transformers_serve(model) as url:
        code = run(
            tmp_path, url, **options, **{"responses_create_params.max_output_tokens": 8}, num_samples_in_parallel=1
        )
    assert code == 0
    rows = read(tmp_path / "rollouts.jsonl")
    assert len(rows) == 9
    texts = {(row["_ng_task_index"], json.dumps(row["response"]["output"][-1]["content"])) for row in rows}
    assert len(texts) == 3 if not do_sample else len(texts) > 6
    assert (SAID in capsys.readouterr().out) != do_sample
