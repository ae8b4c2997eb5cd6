"""The command: what it refuses, what it prints."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from megadpo.commands import main
from megadpo.config.load import load_config
from megadpo.plan.memory import GPUS, Assumptions, memory_limit, parse_assumptions
from megadpo.plan.parameters import Parameter
from megadpo.plan.plan import optimizer_temporaries
from tests.plan.cases import LLAMA_30M, write_case

MEG = "policy.megatron_cfg"
AWARE = "use_precision_aware_optimizer=true"


@pytest.fixture
def small(tmp_path):
    return write_case(tmp_path / "case", LLAMA_30M, device="auto", sequence_packing={"train_mb_tokens": 2048})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--world-size", "0"], ["--world-size"]),
        (["--assume", "magic=1", "--assume", "expert_load=0.5"], ["magic=1", "--assume expert_load"]),
        (["--assume", "reserve_gib=much"], ["--assume reserve_gib: got 'much'"]),
        (["--picture", "a.jpeg"], ["--picture"]),
        (["--lengths", "5,5"], ["--lengths"]),
        (["--lengths", "4000,50,50"], ["--lengths", "at most 1024"]),
        ([f"{MEG}.tensor_model_parallel_size=3"], ["a divisor of the model's 8 attention heads", "3 x 1"]),
        (["policy.train_global_batch_size=1"], ["at least 2 pairs"]),
        (["policy.attention_kernel=cpu"], ["policy.attention_kernel"]),
        (["policy.model_name=nobody/nothing"], ["policy.model_name", "name its folder"]),
        (["policy.sequence_packing.train_mb_tokens=1024", "--lengths", "900,90,90"], ["train_mb_tokens"]),
        (["policy.device=cpu", "--gpu", "h100"], ["policy.device"]),
        ([f"{MEG}.expert_model_parallel_size=2"], ["has no experts"]),
        ([f"{MEG}.context_parallel_size=3"], ["1 x 1 x 3"]),
        (["policy.freeze=[model.nothing]"], ["policy.freeze", "model.nothing"]),
        (
            [f"{MEG}.fp8_cfg.enabled=true", f"{MEG}.transformer_impl=transformer_engine"],
            ["fp8_cfg.enabled", "plan in bfloat16"],
        ),
        (
            [
                f"{MEG}.optimizer.use_precision_aware_optimizer=true",
                f"{MEG}.optimizer.optimizer_cpu_offload=true",
                f"{MEG}.optimizer.optimizer_offload_fraction=0.5",
            ],
            ["optimizer_cpu_offload", "the planner does not support it"],
        ),
    ],
)
def test_what_would_fail_is_refused_with_the_fix(small, capsys, arguments, told):
    world = [] if "--world-size" in arguments else ["--world-size", "2"]
    assert main(["plan", small, *world, *arguments]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in told) and "fix: " in message


def test_too_little_memory_is_refused_after_it_was_shown(small, capsys):
    assert main(["plan", small, "--world-size", "1", "--assume", "reserve_gib=74"]) == 2
    shown = capsys.readouterr()
    assert "peak" in shown.out and "activation_checkpointing: true" in shown.err and "pipeline stage 0" in shown.err


def test_a_plan_is_made_beside_a_gpu_too(small, monkeypatch, capsys):
    """A plan's groups talk to nobody, so it must not ask for those that training has on GPUs only."""
    from megadpo.parallel.cpu import enable_cpu

    enable_cpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["plan", str(small), "--world-size", "2", f"{MEG}.optimizer.use_distributed_optimizer=true"]) == 0
    assert "GiB" in capsys.readouterr().out


def test_the_limit_is_what_reserve_and_slack_leave():
    assumed = parse_assumptions(["reserve_gib=1.5", "allocator_slack=0.25"])
    assert assumed == Assumptions(reserve_gib=1.5, allocator_slack=0.25)
    assert memory_limit(GPUS["h100"], assumed) == (80e9 - 1.5 * 2**30) / 1.25


def test_a_plan_says_what_a_step_and_a_checkpoint_take(small, capsys, tmp_path):
    """31.6M parameters in bfloat16: 2 bytes of weights, 12 of the optimizer. Two stages and 8 pairs of 512 tokens."""
    arguments = [small, "--world-size", "2", "--lengths", "300,106,106", f"{MEG}.pipeline_model_parallel_size=2"]
    assert main(["plan", *arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    parameters = sum(stage["parameters"] for stage in plan["stages"])
    assert plan["checkpoint_bytes"] == {"weights": 2 * parameters, "with_optimizer": 14 * parameters}
    assert plan["slots"] == {"busy": 2, "idle": 1, "bubble": 1 / 3} and plan["tokens_per_step"] == 8 * 512
    assert main(["plan", *arguments, "--picture", str(tmp_path / "layout.png")]) == 0
    shown = capsys.readouterr().out
    assert "1 of 3 slots" in shown and "GiB weights only" in shown and "stage 1  4 layers" in shown
    assert (tmp_path / "layout.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("overrides", "bytes_an_element"),
    [
        ([], 4),
        (["adam_impl=transformer_engine"], 0),
        ([AWARE], 0),
        ([AWARE, "exp_avg_dtype=bfloat16"], 4 + 2),
        ([AWARE, "exp_avg_dtype=bfloat16", "exp_avg_sq_dtype=bfloat16"], 8 + 2),
    ],
)
def test_what_the_optimizers_step_takes_for_a_moment(overrides, bytes_an_element, tmp_path):
    """Of one parameter, 100M elements of it on this rank: torch's AdamW, and FusedAdam a slice at a time."""
    path = write_case(tmp_path / "case", LLAMA_30M, device="auto")
    cfg = load_config(path, [f"{MEG}.optimizer.{one}" for one in overrides])
    job = SimpleNamespace(cfg=cfg, bf16=True, gpu="h100")
    whole = Parameter(200_000_000, shared_embedding=False, expert=False, trainable=True)
    assert optimizer_temporaries(job, (100_000_000, 0), [[whole]]) == bytes_an_element * 100_000_000
    if "exp_avg_sq_dtype=bfloat16" in overrides:
        small = [Parameter(1_000_000, shared_embedding=False, expert=False, trainable=True)] * 200
        assert optimizer_temporaries(job, (100_000_000, 0), [small]) == 500_000_000 + 2_000_000
