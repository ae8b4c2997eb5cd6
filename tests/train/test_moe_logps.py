"""Truth 3 for models with experts: logps equal transformers', however the experts lie on the ranks."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_model
from tests.model.weights.hf_models import MOE_CASES
from tests.train.test_logps import LENGTHS, some_pairs, transformers_logps

LAYOUTS: dict[int, list[dict[str, Any]]] = {
    # processes: layouts, by the names of Grid
    1: [{}],
    2: [
        {"expert": 2},
        {"tensor": 2},
        {"tensor": 2, "expert_tensor": 2},
        {"tensor": 2, "expert": 2},
        {"expert_tensor": 2},
        {"pipeline": 2},
    ],
    4: [
        {"tensor": 2, "expert": 2},
        {"tensor": 2, "expert": 4},
        {"tensor": 2, "expert": 2, "expert_tensor": 2},
        {"pipeline": 2, "expert": 2},
    ],
}


def packs_of(dp_rank: int) -> list[Any]:
    """Every pair in each pack on the first data-parallel rank; others have fewer, so that lengths differ, then none."""
    from megadpo.data.batches.pack import pack_pairs

    counts = (len(LENGTHS), len(LENGTHS)) if dp_rank == 0 else (2, 0)
    pairs = some_pairs()
    return [
        pack_pairs(pairs[:count], share_prompt=share, pad_to_multiple=8, pad_token_id=0)
        for count, share in zip(counts, (True, False), strict=True)
    ]


def logps_in_layouts(folders: dict[str, str], layouts: list[dict[str, Any]]) -> list[Any]:
    """[layout][dispatcher] -> {family: logps of both packs}, on the last stage."""
    from megatron.core import parallel_state

    from megadpo.config.grid import Grid
    from megadpo.config.schema_megatron import MegatronConfig
    from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
    from megadpo.families import read_architecture
    from megadpo.model.build import build_model
    from megadpo.model.weights.load import load_hf_weights
    from megadpo.parallel import initialize, setup_device
    from megadpo.reference import ResidentReference
    from megadpo.train.setup import seed_everything

    results = []
    for sizes in layouts:
        parallel = initialize(Grid(**sizes), setup_device("auto"))
        grid = parallel.grid
        seed_everything(0, parallel)  # sequence parallelism asks for megatron-core's random-number states
        for dispatcher in ("alltoall", "allgather"):
            megatron = MegatronConfig(
                tensor_model_parallel_size=grid.tensor,
                pipeline_model_parallel_size=grid.pipeline,
                sequence_parallel=grid.tensor > 1,
                expert_model_parallel_size=grid.expert,
                expert_tensor_parallel_size=grid.expert_tensor,
                moe_token_dispatcher_type=dispatcher,
            )
            found = {}
            for case, folder in folders.items():
                arch = read_architecture(folder)
                policy = PolicyConfig(
                    model_name=folder,
                    tokenizer=TokenizerConfig(name=folder),
                    precision="float32",
                    megatron_cfg=megatron,
                )
                model = build_model(arch, policy, parallel, frozen=True)
                load_hf_weights(model, arch, folder, parallel.grid)
                found[case] = ResidentReference(model, parallel).logps(packs_of(parallel.grid.dp_rank))
            results.append((sizes, dispatcher, parallel.grid.dp_rank, found))
        parallel_state.destroy_model_parallel()
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {case: str(make_model(root / case, case)) for case in MOE_CASES}


@pytest.mark.distributed
@pytest.mark.parametrize("processes", LAYOUTS)
def test_logps_equal_transformers(folders, processes):
    ranks = run_distributed(logps_in_layouts, processes, folders, LAYOUTS[processes], init_process_group=False)
    wanted = {case: transformers_logps(folder) for case, folder in folders.items()}
    seen = 0
    for rank in ranks:
        for sizes, dispatcher, _, found in rank:
            for case, packs in found.items():
                for got in packs:  # none before the last pipeline stage
                    want = wanted[case][: got.numel()]
                    assert got.isfinite().all()
                    if got.numel():
                        error = ((got.double() - want) / want).abs().max()
                        assert error < 1e-5, f"{case} {sizes} {dispatcher}: relative error {error:.1e}"
                        seen += 1
    assert seen >= 2 * 2 * len(MOE_CASES) * len(LAYOUTS[processes])
