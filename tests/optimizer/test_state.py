"""The optimizer's step count, on ranks that count and on those that have nothing to; and which rank holds what is saved."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megadpo.optimizer.state import _steps_done
from tests.helpers.distributed import run_distributed
from tests.model.weights.hf_models import make_hf_folder
from tests.optimizer.test_build import policy_of

THROUGH_GPUS = {"distrib_optim_sharding_type": "fully_reshardable"}


def steps_of(counts: list[list[int]], in_groups: bool) -> float:
    mine = [{"step": torch.tensor(float(count))} for count in counts[torch.distributed.get_rank()]]
    state, groups = ([], mine) if in_groups else (mine, [{"lr": 1.0}])
    return float(
        _steps_done(SimpleNamespace(optimizer=SimpleNamespace(state=dict(enumerate(state)), param_groups=groups)))
    )


@pytest.mark.distributed
@pytest.mark.parametrize("in_groups", [False, True])
def test_every_rank_knows_the_steps_of_those_that_count(in_groups):
    assert run_distributed(steps_of, 3, [[7, 7], [], [7]], in_groups) == [7, 7, 7]


def saved_by_ranks(folder: str) -> list[dict[tuple, torch.Tensor]]:
    """By key and place what this rank hands over to a save, without and with the host's gathers, and what it asks a load for."""
    from megadpo.checkpoint.save import sharded_weights
    from megadpo.config.grid import Grid
    from megadpo.families import read_architecture
    from megadpo.model.build import build_model
    from megadpo.optimizer import state
    from megadpo.optimizer.build import build_optimizer, wrap_for_training
    from megadpo.parallel import initialize, setup_device

    parallel = initialize(Grid(), setup_device("auto"))
    torch.manual_seed(parallel.rank)
    policy = policy_of(folder, use_distributed_optimizer=True)
    model = build_model(read_architecture(folder), policy, parallel, frozen=False)
    optimizer = build_optimizer(wrap_for_training(model, policy), policy, parallel.device)
    state._make_state(optimizer)
    for parameter, moments in optimizer.chained_optimizers[0].optimizer.state.items():
        for one in (parameter.data, moments["exp_avg"], moments["exp_avg_sq"]):
            one.normal_()
    found = []
    for metadata, is_loading in ((THROUGH_GPUS, False), (state.METADATA, False), (state.METADATA, True)):
        state.METADATA = metadata
        whole = state.sharded_state(optimizer, sharded_weights(model), is_loading=is_loading)["param_state"]
        tensors = [one for parameter in (whole or {}).values() for one in parameter.values()]
        found.append({(one.key, getattr(one, "global_offset", None)): one.data.clone() for one in tensors})
    return found


@pytest.mark.distributed
def test_only_the_first_of_the_copies_collects_what_is_saved(tmp_path):
    """The same tensors under the same keys as where all have them."""
    make_hf_folder(tmp_path, "llama")
    (want, first, asked), (also, second, also_asked) = run_distributed(
        saved_by_ranks, 2, str(tmp_path), init_process_group=False
    )
    assert len(first) > 20 and want.keys() == also.keys() == first.keys() == asked.keys() == also_asked.keys()
    assert all(torch.equal(first[key], want[key]) for key in want)
    assert all(tensor.any() for tensor in first.values())
    assert second == {}
