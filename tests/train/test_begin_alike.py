"""Answers that begin alike at the width of a real model, once and whole: the same log-probabilities and gradient."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from tests.data.builders import pairs_that_begin_alike
from tests.helpers.distributed import run_distributed

QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 2,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
"""Qwen2.5-0.5B, but for the number of its layers."""


def logps_and_gradient(folder):
    """By what is shared: logps of the pairs' answers [P, 2], tokens of the pack, every parameter's gradient."""
    from megadpo.config.grid import Grid
    from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
    from megadpo.data.batches.groups import PairGroups
    from megadpo.data.batches.pack import pack_pairs
    from megadpo.data.pairs import FlatPairs
    from megadpo.families import read_architecture
    from megadpo.model.build import build_model
    from megadpo.parallel import initialize, setup_device
    from megadpo.train.setup import seed_everything

    parallel = initialize(Grid(), setup_device("cpu"))
    seed_everything(1, parallel)
    policy = PolicyConfig(model_name=folder, tokenizer=TokenizerConfig(name=folder), precision="float32")
    (model,) = build_model(read_architecture(folder), policy, parallel, frozen=False)
    for name, one in model.named_parameters():  # weights are left as they are: a run loads them
        torch.nn.init.ones_(one) if "norm" in name else torch.nn.init.normal_(one, std=0.02)
    pairs, found = pairs_that_begin_alike(vocab=151_936), {}
    for name, groups in (("alike", PairGroups.of(FlatPairs.of(pairs))), ("prompts", None)):
        pack = pack_pairs(pairs, share_prompt=True, pad_to_multiple=8, pad_token_id=0, groups=groups)
        logps = model(pack)[pack.pairs]
        model.zero_grad()
        (logps.double() @ torch.tensor([1.0, -0.7], dtype=torch.float64)).dot(
            torch.tensor([1.0, 2.0, 0.5]).double()
        ).backward()
        gradient = {name: one.grad.clone() for name, one in model.named_parameters()}
        found[name] = logps.detach(), pack.num_tokens, gradient
    (alike, few, mine), (alone, many, theirs) = found["alike"], found["prompts"]
    norm = torch.stack([one.double().norm() for one in theirs.values()]).norm()
    apart = torch.stack([(mine[name] - one).double().norm() for name, one in theirs.items()]).norm()
    mine_norm = torch.stack([one.double().norm() for one in mine.values()]).norm()
    return alike, alone, (few, many), float(apart / norm), float(mine_norm / norm - 1)


@pytest.mark.distributed
def test_they_are_the_same_at_the_width_of_a_real_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    ((alike, alone, tokens, apart, norm),) = run_distributed(
        logps_and_gradient, 1, str(tmp_path), init_process_group=False, timeout_s=280
    )
    assert tokens == (90, 9 + 35 + 3 + 35 + 5 + 9 + 22 + 6 + 3 + 21 + 24)
    np.testing.assert_allclose(alike, alone, rtol=1e-6, equal_nan=False)
    assert abs(norm) < 1e-6 and apart < 5e-6  # rounding: 1.1e-6 when this was written
