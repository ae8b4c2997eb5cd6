"""One run of either side of benchmarks/gpu.py, in a process of its own, under a time limit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import sides
from benchmarks.trl_worker import Spec

LOG_CHARACTERS = 6000
OUT_OF_MEMORY = "out of memory"
TIMED_OUT = "timed out"
FIRST_STEP = ("logps/chosen", "logps/rejected", "grad_norm")
"""What is compared of step 1."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one run."""

    name: str
    seconds: float
    """The whole process: start, loading and all."""
    step_times_s: list[float]
    losses: list[float]
    peak_allocated_bytes: int | None
    """Most bytes in tensors at once, by torch's allocator; on a CPU the process's peak (VmHWM)."""
    peak_reserved_bytes: int | None
    """Most bytes taken from the GPU, what the allocator couldn't use included."""
    error: str | None
    """Why it did not finish: 'out of memory', 'timed out', or the log's last words."""
    log: str
    first_step: dict[str, float] = dataclasses.field(default_factory=dict)
    """FIRST_STEP's figures, before any update."""

    def pairs_per_s(self, warmup_steps: int, pairs_per_step: int) -> float | None:
        """Over the steps after the warm-up; None where there are none."""
        timed = self.step_times_s[warmup_steps:]
        return len(timed) * pairs_per_step / sum(timed) if timed and self.error is None else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class OurSettings:
    """How megadpo runs beside what `Spec` says."""

    pack_tokens: int
    longest_tokens: int
    """Of any prompt + answer."""
    share_prompt: bool = True
    lean: bool = False
    """bfloat16 moments and no second copy of what bfloat16 weights hold (Transformer Engine's FusedAdam)."""
    overrides: tuple[str, ...] = ()


def our_config(spec: Spec, settings: OurSettings, log_dir: Path) -> dict[str, Any]:
    """The run in megadpo's words."""
    optimizer: dict[str, Any] = {"use_distributed_optimizer": settings.lean}
    if settings.lean:
        moments = {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16"}
        optimizer |= {"use_precision_aware_optimizer": True, **moments}
    return sides.config_of(
        spec,
        log_dir,
        policy={
            "max_total_sequence_length": settings.longest_tokens,
            "precision": "bfloat16" if spec.device == "cuda" else "float32",
            "device": spec.device,
            "sequence_packing": {
                "enabled": True,
                "share_prompt": settings.share_prompt,
                "train_mb_tokens": settings.pack_tokens,
            },
        },
        megatron={},
        optimizer=optimizer,
    )


def run_ours(name: str, spec: Spec, settings: OurSettings, timeout_s: float) -> Outcome:
    """Our side by its own log. A reference pass made beforehand is added to the steps' times."""
    with tempfile.TemporaryDirectory(prefix="megadpo-ours-") as path:
        folder = Path(path)
        config = folder / "config.yaml"
        config.write_text(json.dumps(our_config(spec, settings, folder / "logs"), indent=1), encoding="utf-8")
        worker = str(sides.REPOSITORY / "benchmarks" / "gpu_worker.py")
        command = [sys.executable, worker, str(folder / "result.json"), str(config), *settings.overrides]
        command.append(
            f"checkpointing.checkpoint_dir={folder / 'run'}"
        )  # where a cached reference is kept: none is there
        seconds, log, error = _run(command, spec.threads, timeout_s)
        metrics = folder / "logs" / "metrics.jsonl"
        records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        content = json.loads((folder / "result.json").read_text()) if (folder / "result.json").exists() else {}
        before = content.get("precompute_s", 0.0) / max(1, len(records))
        times = [record["timing/train/step_time_s"] + before for record in records]
        losses = [record["train/loss"] for record in records]
        first = {what: records[0][f"train/{what}"] for what in FIRST_STEP} if records else {}
        return _outcome(name, seconds, times, losses, first, folder / "result.json", error, log)


def run_trl(name: str, spec: Spec, python: str, timeout_s: float) -> Outcome:
    """TRL's side, in the interpreter `python`. A reference pass made beforehand is added to the steps' times."""
    with tempfile.TemporaryDirectory(prefix="megadpo-trl-") as path:
        spec = dataclasses.replace(spec, output_dir=str(Path(path) / "out"))
        result, seconds, log, error = _work("trl_worker.py", spec, python, Path(path), timeout_s)
        content = json.loads(result.read_text()) if result.exists() else {"steps": []}
        before = content.get("precompute_step_times_s") or [0.0] * len(content["steps"])
        times = [step["step_time_s"] + more for step, more in zip(content["steps"], before, strict=True)]
        losses = [step["loss"] for step in content["steps"]]
        first = {what: content["steps"][0][what] for what in FIRST_STEP} if losses else {}
        return _outcome(name, seconds, times, losses, first, result, error, log)


def run_float64(spec: Spec, timeout_s: float) -> Outcome:
    """Step 1 in float64, by transformers, in this interpreter."""
    with tempfile.TemporaryDirectory(prefix="megadpo-float64-") as path:
        result, seconds, log, error = _work("gpu_float64.py", spec, sys.executable, Path(path), timeout_s)
        first = json.loads(result.read_text())["first_step"] if result.exists() else {}
        return _outcome("float64", seconds, [], [], first, result, error, log)


def _work(script: str, spec: Spec, python: str, folder: Path, timeout_s: float) -> tuple[Path, float, str, str | None]:
    """Run a worker on a spec: its result's path, seconds, output, error."""
    (folder / "spec.json").write_text(json.dumps(dataclasses.asdict(spec)), encoding="utf-8")
    worker = str(sides.REPOSITORY / "benchmarks" / script)
    command = [python, worker, str(folder / "spec.json"), str(folder / "result.json")]
    return (folder / "result.json", *_run(command, spec.threads, timeout_s))


def _outcome(
    name: str,
    seconds: float,
    times: list[float],
    losses: list[float],
    first: dict[str, float],
    result: Path,
    error: str | None,
    log: str,
) -> Outcome:
    memory = json.loads(result.read_text()) if result.exists() else {}
    allocated = memory.get("gpu_peak_allocated_bytes", memory.get("peak_bytes"))
    reserved = memory.get("gpu_peak_reserved_bytes")
    return Outcome(name, seconds, times, losses, allocated, reserved, error, log[-LOG_CHARACTERS:], first)


def _run(command: Sequence[str], threads: int, timeout_s: float) -> tuple[float, str, str | None]:
    """Seconds, output, and the error if there was one. Whatever the command started ends with it."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        env = sides.environment(threads)
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=sides.REPOSITORY, start_new_session=True
        )
        error = None
        try:
            if process.wait(timeout=timeout_s) != 0:
                error = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            error = TIMED_OUT
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        log = output.read().decode(errors="replace")
    if error is not None and error != TIMED_OUT:
        words = [line.strip() for line in log.splitlines() if any(map(str.isalpha, line))]
        memory = "OutOfMemoryError" in log or "CUDA out of memory" in log
        error = OUT_OF_MEMORY if memory else f"{error}: {words[-1][:300] if words else ''}"
    return time.monotonic() - started, log, error
