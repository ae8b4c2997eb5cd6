"""Which keys the optimizer's state gets: one a layer where weights are frozen, told alike on every rank."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megadpo.checkpoint import load
from tests.helpers.distributed import run_distributed


def frozen_on_the_last_rank() -> tuple[bool, bool]:
    """Target for run_distributed: what each rank is told where none and where the last one has a frozen weight."""
    import torch.distributed as dist

    from megadpo.checkpoint.save import has_frozen_weights

    parallel = SimpleNamespace(device=torch.device("cpu"))
    model = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    before = has_frozen_weights(model, parallel)
    if dist.get_rank() == dist.get_world_size() - 1:
        model[1].bias.requires_grad_(False)
    return before, has_frozen_weights(model, parallel)


@pytest.mark.distributed
def test_every_rank_knows_of_another_ranks_frozen_weights():
    assert run_distributed(frozen_on_the_last_rank, 2) == [(False, True)] * 2


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("optimizer.state.exp_avg.decoder.layers.2.mlp.linear_fc1.weight", True),
        ("chained_0.optimizer.state.fp32_param.decoder.layers.11.self_attention.linear_qkv.weight", True),
        ("optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight", False),
        ("decoder.layers.2.mlp.linear_fc1.weight", False),  # a weight
    ],
)
def test_a_checkpoint_tells_how_its_optimizer_state_is_kept(key, expected, monkeypatch, tmp_path):
    """So a resume reads what an older version kept otherwise."""
    keys = dict.fromkeys(["decoder.final_layernorm.weight", key])
    monkeypatch.setattr(load, "read_metadata", lambda folder: SimpleNamespace(state_dict_metadata=keys))
    assert load._is_per_layer(tmp_path) is expected
