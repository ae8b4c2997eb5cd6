"""Run the same DPO steps on both sides, TRL's and ours, each in its own process, and read back what each step did.

`Spec` (trl_worker.py) says what to run. `run_trl` hands it to TRL, `run_ours` writes it as a config for launch/train.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
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

import psutil

from benchmarks.trl_worker import Spec

REPOSITORY = Path(__file__).resolve().parents[1]
MEMORY_POLL_S = 0.5  # the kernel keeps the peak, so a rare look is enough
LINE_POLL_S = 0.1  # a look costs CPU time, and TRL's side is not looked at
LOG_TAIL_CHARACTERS = 4000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Ranks of our side, and how pairs are packed."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    packing: bool = True
    share_prompt: bool = True
    sequence_parallel: bool = False
    pack_tokens: int | None = None
    """train_mb_tokens; None: the longest pair."""
    recompute: bool = False

    @property
    def world_size(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel

    def __str__(self) -> str:
        sizes = {"TP": self.tensor_parallel, "PP": self.pipeline_parallel, "DP": self.data_parallel}
        name = " x ".join(f"{key}{size}" for key, size in sizes.items() if size > 1) or "one process"
        name += ", sequence parallel" if self.sequence_parallel else ""
        name += f", packs of {self.pack_tokens}" if self.pack_tokens else ""
        name += ", layers recomputed" if self.recompute else ""
        return name + ("" if self.share_prompt else ", prompts repeated") + ("" if self.packing else ", not packed")


@dataclasses.dataclass(frozen=True)
class Side:
    """One side's run."""

    steps: list[dict[str, float]]
    """By step: loss, grad_norm, logps/*, rewards/*, pairs, step_time_s and arrival_s (see `_Watch`)."""
    rank_peak_bytes: list[int]
    """VmHWM of each training process: the most memory it ever held at once."""
    launcher_peak_bytes: int
    """The same for torchrun's own process; 0 where there is none."""
    others_share: float
    """Part of the machine's CPU time that went to anything but this run, 0..1."""
    details: dict[str, Any]


class RunFailed(RuntimeError):
    """A side ended with another code than 0; the message ends with its last output."""


class _Watch:
    """Runs a command to its end while noting the peak memory of its processes, and when each line of a file arrived."""

    def __init__(self, command: Sequence[str], env: dict[str, str], log: Path, lines_of: Path | None) -> None:
        self.peaks: dict[int, int] = {}
        self.arrivals_s: list[float] = []
        self._lines_of = lines_of
        machine, own, started = _machine_cpu_s(), _own_cpu_s(), time.perf_counter()
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=env, cwd=REPOSITORY, start_new_session=True
            )
            try:
                while process.poll() is None:
                    self._note_memory(process.pid)
                    deadline = time.perf_counter() + MEMORY_POLL_S
                    while time.perf_counter() < deadline and process.poll() is None:
                        self._note_lines()
                        time.sleep(LINE_POLL_S)
            finally:
                _end(process)
        self._note_lines()
        self.pid = process.pid
        others_s = (_machine_cpu_s() - machine) - (_own_cpu_s() - own)
        self.others_share = max(0.0, others_s / (time.perf_counter() - started) / (os.cpu_count() or 1))
        if process.returncode != 0:
            tail = log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL_CHARACTERS:]
            raise RunFailed(f"exit code {process.returncode} from {' '.join(command)}\n{tail}")

    def _note_memory(self, pid: int) -> None:
        try:
            parent = psutil.Process(pid)
            for process in [parent, *parent.children(recursive=True)]:
                peak = _peak_bytes(process.pid)
                self.peaks[process.pid] = max(peak, self.peaks.get(process.pid, 0))
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return  # it ended between two looks

    def _note_lines(self) -> None:
        if self._lines_of is None or not self._lines_of.exists():
            return
        complete = self._lines_of.read_bytes().count(b"\n")
        self.arrivals_s += [time.perf_counter()] * (complete - len(self.arrivals_s))


def _end(process: subprocess.Popen[bytes]) -> None:
    """After a normal end nothing is left; after an interrupt the whole tree is."""
    if process.poll() is None:
        parent = psutil.Process(process.pid)
        for member in [*parent.children(recursive=True), parent]:
            member.kill()
        process.wait()


def _machine_cpu_s() -> float:
    """CPU seconds that all cores together have worked since boot, for anybody."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _own_cpu_s() -> float:
    """CPU seconds of this process and of its children that have ended, theirs included."""
    return sum(os.times()[:4])


def _peak_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0  # a zombie has none


def environment(threads: int, extra: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment with `threads` for OpenMP, without what a torchrun around us may have set."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    ours = {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return inherited | ours | {"HF_HUB_OFFLINE": "1"} | (extra or {})


def run_trl(spec: Spec, python: str, env: dict[str, str] | None = None) -> Side:
    """TRL's side, in the interpreter `python`. Raises RunFailed."""
    with tempfile.TemporaryDirectory(prefix="megadpo-trl-") as name:
        folder = Path(name)
        spec = dataclasses.replace(spec, output_dir=str(folder / "out"))
        (folder / "spec.json").write_text(json.dumps(dataclasses.asdict(spec)), encoding="utf-8")
        command = [python, str(REPOSITORY / "benchmarks" / "trl_worker.py"), str(folder / "spec.json")]
        command.append(str(folder / "result.json"))
        watch = _Watch(command, environment(spec.threads, env), folder / "log.txt", None)
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    steps = [step | {"pairs": spec.global_batch_pairs} for step in result.pop("steps")]
    result["spec"]["output_dir"] = ""
    peak = max(result["peak_bytes"], watch.peaks[watch.pid])
    return Side(steps, [peak], 0, watch.others_share, result)


def our_config(spec: Spec, layout: Layout, log_dir: Path, longest: tuple[int, int]) -> dict[str, Any]:
    """`spec` in megadpo's config. `longest`: as make_llama.longest gives it; a longer pair is refused."""
    packing: dict[str, Any] = {"enabled": layout.packing, "share_prompt": layout.share_prompt}
    if layout.packing:
        longest_sequence, longest_pair = longest
        packing["train_mb_tokens"] = layout.pack_tokens or (
            longest_pair if layout.share_prompt else 2 * longest_sequence
        )
    return config_of(
        spec,
        log_dir,
        policy={
            "train_micro_batch_size": spec.micro_batch_pairs,
            "max_total_sequence_length": longest[0],
            "precision": "float32",
            "device": "cpu",
            "sequence_packing": packing,
        },
        megatron={
            "tensor_model_parallel_size": layout.tensor_parallel,
            "pipeline_model_parallel_size": layout.pipeline_parallel,
            "sequence_parallel": layout.sequence_parallel,
            "activation_checkpointing": layout.recompute,
        },
        optimizer={"use_distributed_optimizer": layout.data_parallel > 1},
    )


def config_of(
    spec: Spec, log_dir: Path, *, policy: dict[str, Any], megatron: dict[str, Any], optimizer: dict[str, Any]
) -> dict[str, Any]:
    """`spec` in megadpo's config, with what a benchmark adds to three of its sections."""
    adamw = {
        "lr": spec.learning_rate,
        "weight_decay": spec.weight_decay,
        "adam_beta1": spec.adam_beta1,
        "adam_beta2": spec.adam_beta2,
        "adam_eps": spec.adam_epsilon,
    }
    constant = {"lr_decay_style": "constant", "lr_warmup_iters": 0}
    return {
        "policy": {
            "model_name": spec.model,
            "train_global_batch_size": spec.global_batch_pairs,
            "max_grad_norm": spec.max_grad_norm,
            **policy,
            "megatron_cfg": {**megatron, "optimizer": adamw | optimizer, "scheduler": constant},
        },
        "dpo": {
            "max_num_epochs": 1,
            "max_num_steps": spec.steps,
            "val_period": 0,
            "val_at_start": False,
            "reference_policy_kl_penalty": spec.beta,
        },
        "data": {"train_data_path": spec.data, "shuffle": False, "on_too_long": "refuse"},
        "checkpointing": {"enabled": False},
        "logger": {"log_dir": str(log_dir)},
    }


def run_ours(
    spec: Spec,
    layout: Layout,
    *,
    longest: tuple[int, int],
    overrides: Sequence[str] = (),
    env: dict[str, str] | None = None,
    keep: Path | None = None,
) -> Side:
    """Our side: `python launch/train.py`, under torchrun where there are several ranks, `spec.threads` over all ranks.

    overrides: key=value for the command line. keep: a folder for config and metrics. Raises RunFailed.
    """
    with tempfile.TemporaryDirectory(prefix="megadpo-ours-") as name:
        folder = keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "config.yaml"
        # JSON is YAML
        config.write_text(json.dumps(our_config(spec, layout, folder / "logs", longest), indent=2))
        command = [sys.executable, "launch/train.py", str(config), *overrides]
        if layout.world_size > 1:
            # by address: a machine's own name needn't resolve
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
            command[1:1] = [*torchrun, f"--nproc-per-node={layout.world_size}"]
        threads = max(1, spec.threads // layout.world_size)
        metrics = folder / "logs" / "metrics.jsonl"
        watch = _Watch(command, environment(threads, env), folder / "log.txt", metrics)
        records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        log = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    steps = [our_step(record) for record in records]
    for before, step, now in zip([None, *watch.arrivals_s], steps, watch.arrivals_s, strict=False):
        step["arrival_s"] = step["step_time_s"] if before is None else now - before
    launcher = watch.peaks.pop(watch.pid) if layout.world_size > 1 else 0
    ranks = sorted(watch.peaks.values(), reverse=True)
    details = {"layout": str(layout), "command": command, "log": log[-LOG_TAIL_CHARACTERS:]}
    return Side(steps, ranks, launcher, watch.others_share, details)


def our_step(record: dict[str, Any]) -> dict[str, float]:
    """What is compared of a line of metrics.jsonl."""
    names = ("loss", "grad_norm", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected")
    step = {name: record[f"train/{name}"] for name in (*names, "rewards/margins", "rewards/accuracies")}
    return step | {
        "step": record["step"],
        "pairs": record["train/num_pairs"],
        "tokens": record["train/num_tokens"],
        "step_time_s": record["timing/train/step_time_s"],
    }


def end_tidily_when_terminated() -> None:
    """SIGTERM, as `timeout` and CI send it, unwinds like Ctrl-C, so that the process of a side doesn't outlive us."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def default_data() -> Path:
    """hh_train.jsonl in the folder $MEGADPO_DATA, else in shared/data beside the repository."""
    return Path(os.environ.get("MEGADPO_DATA") or REPOSITORY.parent / "shared" / "data") / "hh_train.jsonl"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
