"""Run TRL's DPOTrainer for some steps and write what it did as JSON: `python trl_worker.py SPEC.json RESULT.json`.

Runs in an interpreter that has TRL (it need not have megadpo) and imports nothing of ours. SPEC.json holds the fields of
`Spec`; RESULT.json gets one object per optimizer step with unrounded figures, the times, and the versions.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What to run. Pairs are the first `steps * global_batch_pairs` rows of `data`, in file order, one pass."""

    data: str
    model: str
    """A Hugging Face folder with the tokenizer; policy and reference both start from it."""
    output_dir: str
    steps: int
    global_batch_pairs: int
    micro_batch_pairs: int
    threads: int = 2
    device: str = "cpu"
    """cpu or cuda."""
    dtype: str = "float32"
    """Of the weights. On cuda the computation is bfloat16 whatever this says: autocast, as TRL has it by default, unless
    `extra` has bf16 False."""
    beta: float = 0.1
    learning_rate: float = 1e-6
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    attention: str = "sdpa"
    precompute_reference: bool = False
    sort_within_global_batch: bool = False
    """Hand TRL each global batch's pairs longest first, so that a micro-batch holds pairs of like length."""
    parts: bool = False
    """Also time the parts of a step (reference forward, policy forward, backward, optimizer)."""
    float64: bool = False
    """Run in double precision, as a yardstick for both sides' rounding."""
    adapter: str = ""
    """A folder of PEFT's that training goes on from; a copy of it is the reference's. Empty: all weights are trained."""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of DPOConfig, e.g. {"gradient_checkpointing": true}."""


def load_rows(spec: Spec, tokenizer: Any) -> list[dict[str, str]]:
    """The pairs in the order in which TRL shall take them."""
    needed = spec.steps * spec.global_batch_pairs
    with open(spec.data, encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(needed), strict=False)]
    if len(rows) < needed:
        raise ValueError(f"{spec.data} has {len(rows)} pairs; {needed} are needed")
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    if not spec.sort_within_global_batch:
        return rows

    def padded_length(row: dict[str, str]) -> int:
        return max(len(tokenizer(row["prompt"] + row[answer])["input_ids"]) for answer in ("chosen", "rejected"))

    ordered = []
    for start in range(0, len(rows), spec.global_batch_pairs):
        ordered += sorted(rows[start : start + spec.global_batch_pairs], key=padded_length, reverse=True)
    return ordered


def dpo_arguments(spec: Spec) -> dict[str, Any]:
    """DPOConfig's arguments: TRL's defaults are bf16, gradient checkpointing, a falling rate and a shuffle."""
    dtype = "float64" if spec.float64 else spec.dtype
    cuda = spec.device == "cuda"
    arguments = {
        "output_dir": spec.output_dir,
        "model_init_kwargs": {"dtype": dtype, "attn_implementation": spec.attention},
        "use_cpu": not cuda,
        "bf16": cuda,
        "fp16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": spec.micro_batch_pairs,
        "gradient_accumulation_steps": spec.global_batch_pairs // spec.micro_batch_pairs,
        "max_steps": spec.steps,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "loss_type": ["sigmoid"],
        "beta": spec.beta,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch",
        "weight_decay": spec.weight_decay,
        "adam_beta1": spec.adam_beta1,
        "adam_beta2": spec.adam_beta2,
        "adam_epsilon": spec.adam_epsilon,
        "max_grad_norm": spec.max_grad_norm,
        "disable_dropout": True,
        "precompute_ref_log_probs": spec.precompute_reference,
        "dataloader_pin_memory": cuda,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 42,
    }
    if spec.adapter:
        del arguments["model_init_kwargs"]  # of a model that TRL loads itself
    return arguments | spec.extra


def make_trainer(spec: Spec) -> Any:
    """A DPOTrainer that keeps every micro-batch's loss, every step's log and times, all unrounded."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class RecordingTrainer(DPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.micro_losses: list[Any] = []
            self.step_records: list[dict[str, Any]] = []
            self.precompute_s = 0.0
            self.reference_times: list[float] = []
            super().__init__(*args, **kwargs)

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self.reference_times = [start]
            result = super()._precompute_ref_logps(*args, **kwargs)
            self.precompute_s += time.perf_counter() - start
            return result

        def compute_ref_log_probs(self, *args: Any, **kwargs: Any) -> Any:
            result = super().compute_ref_log_probs(*args, **kwargs)
            result[0].cpu()  # waits for a GPU
            self.reference_times.append(time.perf_counter())
            return result

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            self.micro_losses.append(loss.detach())  # a number only when the step is over: no wait for a GPU
            return loss

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log(logs, start_time)
            if not self.micro_losses:  # the summary at the end
                return
            losses = [loss.item() for loss in self.micro_losses]
            mean = sum(losses) / len(losses)
            record = {"loss": mean, "logged_loss": logs["loss"], "micro_losses": losses}
            names = ("rewards/", "logps/")
            record |= {key: value for key, value in logs.items() if key.startswith(names) or key == "grad_norm"}
            self.step_records.append(record)
            self.micro_losses = []

    tokenizer = AutoTokenizer.from_pretrained(spec.model, trust_remote_code=False)
    dataset = Dataset.from_list(load_rows(spec, tokenizer))
    return RecordingTrainer(
        model=with_adapter(spec) if spec.adapter else spec.model,
        args=DPOConfig(**dpo_arguments(spec)),
        train_dataset=dataset,
        processing_class=tokenizer,
    )


def with_adapter(spec: Spec) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=spec.dtype, attn_implementation=spec.attention)
    return PeftModel.from_pretrained(model, spec.adapter, is_trainable=True)


def time_steps(trainer: Any) -> list[tuple[float, float]]:
    """Adds a callback; the list it returns gets (wall clock, CPU time of all threads), in seconds, when training begins
    and after every step and its log."""
    from transformers import TrainerCallback

    times: list[tuple[float, float]] = []

    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times.append(now())

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if len(times) == state.global_step:  # the summary at the end is one log too many
                times.append(now())

    trainer.add_callback(Clock())
    return times


def time_parts(trainer: Any) -> dict[str, float]:
    """Wraps the parts of a step; the dict it returns fills with seconds. On CPU every call is synchronous."""
    from transformers import TrainerCallback

    parts: dict[str, float] = defaultdict(float)

    def timed(owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = original(*args, **kwargs)
            parts[name] += time.perf_counter() - start
            return result

        setattr(owner, method, wrapper)

    class WithOptimizer(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            timed(trainer.optimizer, "step", "optimizer_s")

    trainer.add_callback(WithOptimizer())
    timed(trainer, "compute_loss", "compute_loss_s")
    timed(trainer.accelerator, "backward", "backward_s")
    timed(trainer, "_clip_grad_norm", "clip_s")
    if trainer.ref_model is not None:
        timed(trainer.ref_model, "forward", "reference_forward_s")
        timed(trainer.ref_model.model, "forward", "reference_backbone_s")
    timed(trainer.model.model, "forward", "policy_backbone_s")
    return parts


def count_tokens(trainer: Any) -> list[dict[str, int]]:
    """For every pair in order: the tokens of prompt, chosen and rejected."""
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    dataset = trainer.train_dataset
    lengths = [[len(ids) for ids in dataset[column]] for column in columns]
    return [dict(zip(columns, row, strict=True)) for row in zip(*lengths, strict=True)]


def precompute_step_times(spec: Spec, times: list[float]) -> list[float]:
    """Seconds that the reference pass made beforehand took for each step's pairs; `times`: when it began, and when each
    micro-batch of it ended. Empty without one."""
    if not spec.precompute_reference:
        return []
    calls = spec.global_batch_pairs // spec.micro_batch_pairs
    if len(times) != 1 + spec.steps * calls:
        raise ValueError(f"{len(times) - 1} reference passes of micro-batches; {spec.steps * calls} expected")
    return [times[(step + 1) * calls] - times[step * calls] for step in range(spec.steps)]


def token_digest(trainer: Any) -> str:
    """sha256 over every pair's ids, so that a stored run can be matched to the tokens it saw."""
    import hashlib

    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    dataset = trainer.train_dataset
    rows = [[list(map(int, ids)) for ids in row] for row in zip(*(dataset[c] for c in columns), strict=True)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def peak_memory_bytes() -> int:
    """VmHWM of this process: the most memory it ever held at once."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kib = next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]
    return int(kib) * 1024


def gpu_memory() -> dict[str, int]:
    """Most bytes that torch's allocator ever had in use, and had taken from the GPU; empty without one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {
        "gpu_peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "gpu_peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("trl", "peft", "transformers", "torch", "accelerate", "datasets", "tokenizers", "numpy")
    from importlib.util import find_spec

    return {"python": sys.version.split()[0]} | {name: version(name) for name in names if find_spec(name)}


def run(spec: Spec) -> dict[str, Any]:
    import torch

    torch.set_num_threads(spec.threads)
    trainer = make_trainer(spec)
    times = time_steps(trainer)
    parts = time_parts(trainer) if spec.parts else None
    loaded_bytes = peak_memory_bytes()
    trainer.train()
    steps = [
        record | {"step": number, "step_time_s": end[0] - start[0], "cpu_time_s": end[1] - start[1]}
        for number, (record, start, end) in enumerate(
            zip(trainer.step_records, times[:-1], times[1:], strict=True), start=1
        )
    ]
    return {
        "spec": dataclasses.asdict(spec),
        "dpo_config": {key: value for key, value in dpo_arguments(spec).items() if key != "output_dir"},
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "steps": steps,
        "pair_tokens": count_tokens(trainer),
        "token_sha256": token_digest(trainer),
        "precompute_s": trainer.precompute_s,
        "precompute_step_times_s": precompute_step_times(spec, trainer.reference_times),
        "parts": parts,
        "peak_bytes": peak_memory_bytes(),
        "peak_bytes_before_training": loaded_bytes,
        **gpu_memory(),
    }


def main() -> int:
    spec_path, result_path = sys.argv[1:]
    spec = Spec(**json.loads(Path(spec_path).read_text(encoding="utf-8")))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    result = run(spec)
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
