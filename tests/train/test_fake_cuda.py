"""The whole step with `policy.device: cuda`, on a pretend GPU (tests/helpers/fake_cuda.py): every tensor is where the
operation that takes it wants it, and the host waits for the GPU where docs/gpu.md says, and nowhere else."""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
import zlib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version

from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config, make_model

# The only waits of a step, all after its last micro-batch, and of an evaluation.
METRICS = ["metrics.py:means"]
NORM = ["clip_grads.py:get_grad_norm_fp32"]
PACKS = 2  # micro-batches of a step, at least: no wait is between them

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2, "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}
DISTRIBUTED = {
    "optimizer": {"use_distributed_optimizer": True},
    "distributed_data_parallel_config": {"overlap_grad_reduce": True, "overlap_param_gather": True},
}
RECOMPUTE = {
    "activation_checkpointing": True,
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
UNSHARED = {"sequence_packing": {"share_prompt": False}}
UNPACKED = {"sequence_packing": {"enabled": False}, "train_micro_batch_size": 2}


def in_multiples(tokens, **megatron):
    return {"make_sequence_length_divisible_by": tokens, "megatron_cfg": megatron}


DENSE = {
    # model, rank and size of the world, policy
    "shared": ("llama", (0, 1), {}),
    "unshared": ("mistral", (0, 2), {**UNSHARED, **in_multiples(1, **DISTRIBUTED)}),
    "unpacked": ("llama_tied", (0, 1), UNPACKED),
    "sdpa": ("qwen2", (0, 1), {"attention_kernel": "sdpa"}),
    "float32": ("qwen3", (0, 1), {"precision": "float32"}),
    "recompute": ("qwen3", (1, 2), in_multiples(1, **DISTRIBUTED, **RECOMPUTE)),
    "tp_sp": ("qwen2", (1, 2), in_multiples(2, **TP2_SP)),
    "cp": ("llama", (1, 2), in_multiples(4, context_parallel_size=2)),
    "cp_float32": ("llama", (0, 2), {"precision": "float32", **in_multiples(2, context_parallel_size=2)}),
    "pp_first": ("llama_tied", (0, 2), in_multiples(1, **PP2)),
    "pp_last_tp_sp": ("llama_tied", (3, 4), in_multiples(2, **PP2, **TP2_SP)),
    "vpp": ("llama", (1, 2), in_multiples(1, virtual_pipeline_model_parallel_size=2, **PP2)),
}
EXPERTS = {
    "alltoall": ("qwen3_moe", (1, 2), in_multiples(1, **EP2)),
    "allgather": ("qwen2_moe", (0, 2), in_multiples(1, moe_token_dispatcher_type="allgather", **EP2)),
}


def leave_positions_on_the_cpu(patch):
    from megadpo.data.batches.pack import PackedBatch

    to = PackedBatch.to
    patch.setattr(PackedBatch, "to", lambda b, device: dataclasses.replace(to(b, device), positions=b.positions))


def reduce_metrics_on_the_cpu(patch):
    from megadpo.parallel import ParallelContext

    total = ParallelContext.total_from_last_stage
    patch.setattr(ParallelContext, "total_from_last_stage", lambda self, tensor: total(self, tensor.cpu()))


def read_in_attention(patch):
    from megadpo.model.kernels.varlen import VarlenKernel

    attend = VarlenKernel.attend
    patch.setattr(
        VarlenKernel, "attend", lambda self, q, *rest, **asked: attend(self, q * q.sum().item(), *rest, **asked)
    )


def copy_from_plain_memory(patch):
    patch.setattr(torch.Tensor, "pin_memory", lambda self: self)


def synchronise_at_every_batch(patch):
    from megadpo.model.gpt import PairModel

    forward = PairModel.forward
    patch.setattr(PairModel, "forward", lambda self, batch: torch.cuda.synchronize() or forward(self, batch))


BROKEN = [leave_positions_on_the_cpu, reduce_metrics_on_the_cpu]
WAITING = [read_in_attention, copy_from_plain_memory, synchronise_at_every_batch]


@dataclasses.dataclass
class Seen:
    """What a case did, or the error that ended it."""

    error: str = ""
    kernel: str = ""
    devices: frozenset[str] = frozenset()
    micro_batches: int = 0
    updated: bool = False
    step_waits: list[str] = dataclasses.field(default_factory=list)
    between_waits: list[str] = dataclasses.field(default_factory=list)
    """Between two steps, where the ranks agree whether to stop, on the most memory, and whether a checkpoint is written."""
    evaluation_waits: list[str] = dataclasses.field(default_factory=list)


def run_cases(cases):
    """In a process of its own: every case's config, place in the world, and what to break in it."""
    from tests.helpers import fake_cuda

    fake_cuda.install()
    zlib.crc32 = lambda *_: 1  # whatever is read off the GPU is 1: let the names of metrics have that checksum
    found = {}
    for name, (config, place, break_it) in cases.items():
        fake_cuda.be(*place)
        with pytest.MonkeyPatch.context() as patch:
            if break_it is not None:
                break_it(patch)
            try:
                found[name] = run_case(config)
            except Exception:
                found[name] = Seen(error=traceback.format_exc())
    return found


def run_case(config):
    """A run built, a step and an evaluation, and what happened in them."""
    from megadpo.config import load_config
    from megadpo.config.grid import Grid
    from megadpo.families import read_architecture
    from megadpo.parallel import destroy, initialize, setup_device
    from megadpo.plan.outlines import even_routing
    from megadpo.train.setup import prepare
    from tests.helpers.fake_cuda import FakeCuda

    cfg = load_config(config)
    try:
        with (
            even_routing(read_architecture(Path(cfg.policy.model_name)), 1.0) as answers,
            FakeCuda({operation: only_for_experts(answer) for operation, answer in answers.items()}) as gpu,
        ):
            run = prepare(cfg, initialize(Grid.of(cfg), setup_device(cfg.policy.device)))
            with contextlib.closing(run.inputs.train_loader.batches(0)) as batches:
                batch = next(batches)
                gpu.waits.clear()
                outcome = run.trainer.step(batch)
            step_waits = list(gpu.waits)
            gpu.waits.clear()
            between_steps(run)
            between_waits = list(gpu.waits)
            gpu.waits.clear()
            run.trainer.evaluate(run.validation_batches("held_out"))
            tensors = [t for chunk in run.trainer.model for t in (*chunk.parameters(), *chunk.buffers())]
            return Seen(
                kernel=run.trainer.model[0].kernel.name,
                devices=frozenset(str(tensor.device) for tensor in tensors),
                micro_batches=len(batch.micro_batches),
                updated=outcome.updated,
                step_waits=step_waits,
                between_waits=between_waits,
                evaluation_waits=list(gpu.waits),
            )
    finally:
        destroy()


def between_steps(run):
    from megadpo.train import watch
    from megadpo.train.saving import Saver
    from megadpo.train.stop import StopWatcher

    assert StopWatcher(run.parallel, deadline_s=None).agreed() is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "_peak_bytes", lambda device: 1)  # the allocator's own count, on the host
        run.watch.read()
    saver = Saver(run, SimpleNamespace())
    saver._writing = None, SimpleNamespace(is_alive=lambda: True)
    saver.look(run.position)


def only_for_experts(answer):
    """The planner's answers are for the dispatchers of experts; other reads get ones."""
    from tests.helpers.fake_cuda import place

    files = ("token_dispatcher.py", "moe_utils.py")
    return lambda *args, **kwargs: answer(*args, **kwargs) if place().startswith(files) else None


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Every case by its name, all in one process: most of a case's time would go into starting it."""
    folder = tmp_path_factory.mktemp("fake_cuda")
    cases = {**DENSE, **EXPERTS, **{broken.__name__: ("llama", (0, 1), {}) for broken in (*BROKEN, *WAITING)}}
    breaks = {broken.__name__: broken for broken in (*BROKEN, *WAITING)}
    models = {}
    for name, (model, _, _) in cases.items():
        layers = 4 if name == "vpp" else 2
        models[model, layers] = folder / f"{model}_{layers}"
    for (model, layers), path in models.items():
        make_model(path, model, num_hidden_layers=layers)
    calls = {}
    for name, (model, place, policy) in cases.items():
        (folder / f"run_{name}").mkdir()
        policy = {"device": "cuda", "precision": "bfloat16", "logprob_kernel": "torch", **policy}
        layers = 4 if name == "vpp" else 2
        config = make_config(folder / f"run_{name}", models[model, layers], pairs=8, policy=policy)
        calls[name] = (str(config), place, breaks.get(name))
    [results] = run_distributed(run_cases, 1, calls, init_process_group=False, timeout_s=280)
    return results


@pytest.mark.distributed
@pytest.mark.parametrize("case", DENSE)
def test_a_step_waits_for_its_norm_and_its_metrics_and_nothing_waits_between_two(case, found):
    seen, policy = found[case], DENSE[case][2]
    assert not seen.error, seen.error
    assert seen.updated and seen.devices == {"cuda:0"} and seen.micro_batches >= 1
    assert seen.kernel == ("sdpa" if {"attention_kernel", "precision"} & set(policy) else "varlen")
    assert seen.step_waits == NORM + METRICS and seen.between_waits == []
    assert seen.evaluation_waits == METRICS


@pytest.mark.distributed
@pytest.mark.parametrize("case", EXPERTS)
def test_experts_wait_in_their_dispatcher_too(case, found):
    seen = found[case]
    assert not seen.error, seen.error
    dispatching = [wait for wait in seen.step_waits if wait.startswith(("token_dispatcher", "moe_utils"))]
    # megatron-core 0.19 permutes for alltoall without a wait: it is told the number of rows
    waits = case == "allgather" or Version(version("megatron-core")) < Version("0.17")
    assert seen.updated and (len(dispatching) >= seen.micro_batches if waits else dispatching == [])
    balance = ["moe_balance.py:balance_metrics"]
    assert [wait for wait in seen.step_waits if wait not in dispatching] == 2 * NORM + METRICS + balance


@pytest.mark.distributed
@pytest.mark.parametrize("broken", [broken.__name__ for broken in BROKEN])
def test_a_tensor_on_the_wrong_device_is_seen(broken, found):
    assert "fake_cuda.WrongDevice: " in found[broken].error


@pytest.mark.distributed
@pytest.mark.parametrize("broken", [broken.__name__ for broken in WAITING])
def test_a_wait_between_micro_batches_is_seen(broken, found):
    seen = found[broken]
    assert not seen.error, seen.error
    assert seen.micro_batches >= PACKS and len(seen.step_waits) >= len(METRICS + NORM) + PACKS
