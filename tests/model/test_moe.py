"""Padding of a pack reaches no expert, and the load-balancing loss sees none of it."""

from __future__ import annotations

import pytest

from tests.helpers.distributed import run_distributed
from tests.model.kernels.test_kernels import random_pairs
from tests.model.weights.hf_models import LAYERS, make_hf_folder

LENGTHS = [(10, 3, 7), (2, 1, 2)]
TOPK = 2


def tokens_of_experts(folder: str, tensor: int) -> tuple[list[int], int, int]:
    """Tokens that this rank's experts computed in each layer, tokens of the pack, and padding."""
    from megadpo.config.grid import Grid
    from megadpo.config.schema_megatron import MegatronConfig
    from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
    from megadpo.data.batches.pack import pack_pairs
    from megadpo.families import read_architecture
    from megadpo.model.build import build_model
    from megadpo.model.moe import plan_routing
    from megadpo.model.weights.load import load_hf_weights
    from megadpo.parallel import initialize, setup_device
    from megadpo.train.setup import seed_everything

    parallel = initialize(Grid(tensor=tensor, expert=tensor), setup_device("auto"))
    seed_everything(0, parallel)
    arch = read_architecture(folder)
    megatron = MegatronConfig(
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        expert_model_parallel_size=tensor,
        moe_router_load_balancing_type="aux_loss",
    )
    policy = PolicyConfig(
        model_name=folder, tokenizer=TokenizerConfig(name=folder), precision="float32", megatron_cfg=megatron
    )
    [model] = build_model(arch, policy, parallel, frozen=False)
    load_hf_weights([model], arch, folder, parallel.grid)
    seen: list[int] = []
    for layer in model.decoder.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, inputs: seen.append(int(inputs[1].sum())))
    batch = pack_pairs(random_pairs(LENGTHS, 64), share_prompt=True, pad_to_multiple=32, pad_token_id=0)
    model.balance.start(num_tokens=batch.num_tokens, num_pairs=2)
    model(batch).sum().backward()
    routing = plan_routing(batch, model.config, model.balance)
    assert routing.sets is not None and routing.sets.members.sum() == routing.real.sum()
    return seen, batch.num_tokens, batch.run_tokens - batch.num_tokens


@pytest.mark.distributed
@pytest.mark.parametrize("tensor", [1, 2])
def test_padding_reaches_no_expert(tmp_path, tensor):
    folder = make_hf_folder(tmp_path / "model", "qwen3_moe")
    ranks = run_distributed(tokens_of_experts, tensor, str(folder), tensor, init_process_group=False)
    _, real, padding = ranks[0]
    assert padding > 0
    for layer in range(LAYERS):
        assert sum(seen[layer] for seen, *_ in ranks) == TOPK * real
