"""Between the first micro-batch and the last nothing reads a number off the device: a GPU would stand idle meanwhile.

On a CPU every such read is caught where it happens; on a GPU torch itself raises (tests/gpu).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config, make_model

# What on a GPU waits: a number for Python, or a shape that depends on values.
WAITING = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten._unique2,
    torch.ops.aten.equal,
}


class NoWaits(TorchDispatchMode):
    """Raises at whatever would wait for a GPU; `tolist`, `numpy` and `cpu` are patched beside it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in WAITING, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


def guarded(run_pipeline):
    def run(*args, **kwargs):
        with NoWaits(), pytest.MonkeyPatch.context() as patch:
            for name in ("tolist", "numpy", "cpu"):
                patch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} waits for the device"))
            return run_pipeline(*args, **kwargs)

    return run


def step_under_guard(config):
    from megadpo import reference
    from megadpo.config import load_config
    from megadpo.parallel import initialize, setup_device
    from megadpo.train import step
    from megadpo.train.setup import layout_of, prepare

    cfg = load_config(config)
    run = prepare(cfg, initialize(layout_of(cfg), setup_device("auto")))
    counted = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (step, reference):
            inner = guarded(module.run_pipeline)
            patch.setattr(module, "run_pipeline", lambda *a, inner=inner, **k: counted.append(1) or inner(*a, **k))
        outcome = run.trainer.step(next(run.data.train_loader.batches(0)))
        metrics = run.trainer.evaluate(run.validation_batches("held_out"))
    return len(counted), dataclasses.asdict(outcome), metrics


@pytest.mark.distributed
@pytest.mark.parametrize("share_prompt", [True, False])
def test_no_micro_batch_waits(share_prompt, tmp_path):
    model = make_model(tmp_path / "model")
    packing = {"sequence_packing": {"share_prompt": share_prompt}, "attention_kernel": "sdpa"}
    config = make_config(tmp_path, model, policy=packing)
    [(passes, outcome, metrics)] = run_distributed(step_under_guard, 1, str(config), init_process_group=False)
    assert passes >= 4 and outcome["updated"] and metrics["loss"] > 0  # the reference and the policy, twice each


def test_the_guard_sees_a_wait():
    with NoWaits():
        with pytest.raises(AssertionError, match="waits"):
            torch.ones(1).item()
        with pytest.raises(AssertionError, match="waits"):
            torch.ones(3).nonzero()
