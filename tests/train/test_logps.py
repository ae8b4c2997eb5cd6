"""Truth 3: logps equal transformers' for the same weights, for every family, packed or not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_model
from tests.model.kernels.test_kernels import random_pairs

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
CASES = {
    "llama": {},
    "llama_tied": {"rope_parameters": LLAMA3},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
                                  "rope_theta": 10000.0}},
}  # fmt: skip
LENGTHS = [(40, 20, 7), (1, 1, 2), (3, 50, 30), (25, 9, 11)]


def some_pairs():
    """Of unlike lengths; the third has answers with tokens outside the loss, the first and the last among them."""
    pairs = random_pairs(LENGTHS, 320)
    chosen, rejected = pairs[2].chosen_tokens, pairs[2].rejected_tokens
    masks = {"chosen_mask": np.arange(chosen) % 5 > 1, "rejected_mask": np.arange(rejected) < rejected - 1}
    pairs[2] = dataclasses.replace(pairs[2], **masks)
    return pairs


def logps_of_packs(folders, tensor, pipeline):
    """{case: {share_prompt: logps}} on the last stage, None elsewhere."""
    from megadpo.config.grid import Grid
    from megadpo.config.schema_megatron import MegatronConfig
    from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
    from megadpo.data.batches.pack import pack_pairs
    from megadpo.families import read_architecture
    from megadpo.model.build import build_model
    from megadpo.model.weights.load import load_hf_weights
    from megadpo.parallel import initialize, setup_device
    from megadpo.reference import ResidentReference

    parallel = initialize(Grid(tensor=tensor, pipeline=pipeline), setup_device("auto"))
    results = {}
    for case, folder in folders.items():
        arch = read_architecture(folder)
        sizes = MegatronConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
        policy = PolicyConfig(
            model_name=folder, tokenizer=TokenizerConfig(name=folder), precision="float32", megatron_cfg=sizes
        )
        model = build_model(arch, policy, parallel, frozen=True)
        load_hf_weights(model, arch, folder, parallel.grid)
        packs = [
            pack_pairs(some_pairs(), share_prompt=share, pad_to_multiple=8, pad_token_id=0) for share in (True, False)
        ]
        results[case] = ResidentReference(model, parallel).logps(packs)
    return results


def transformers_logps(folder, change=lambda model: model):
    """[2P] float64 sums of log-probabilities over the answers, each sequence alone. change: made of the model first."""
    from transformers import AutoModelForCausalLM

    model = change(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    sums = []
    for pair in some_pairs():
        for answer, mask in ((pair.chosen_ids, pair.chosen_mask), (pair.rejected_ids, pair.rejected_mask)):
            ids = torch.from_numpy(np.concatenate([pair.prompt_ids, answer])).long()[None]
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].double().log_softmax(-1)
            answer_logps = logps.gather(1, ids[0, 1:, None])[-len(answer) :, 0]
            sums.append(answer_logps.sum() if mask is None else answer_logps[torch.from_numpy(mask)].sum())
    return torch.stack(sums)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for case, changes in CASES.items():
        made[case] = str(make_model(tmp_path_factory.mktemp("models") / case, case, **changes))
        if case == "mistral":  # saved in bfloat16, read in float32 by both sides
            assert '"bfloat16"' in (tmp_path_factory.getbasetemp() / made[case] / "config.json").read_text()
    return made


@pytest.mark.distributed
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (2, 2)])
def test_logps_equal_transformers(folders, tensor, pipeline):
    results = run_distributed(logps_of_packs, tensor * pipeline, folders, tensor, pipeline, init_process_group=False)
    for case, folder in folders.items():
        want = transformers_logps(folder)
        seen = 0
        for rank in results:
            for got in rank[case]:
                error = ((got.double() - want) / want).abs().max()
                assert error < 1e-5, f"{case}: relative error {error:.1e}"
                seen += 1
        assert seen == 2 * tensor  # both packings on every tensor-parallel rank of the last stage
