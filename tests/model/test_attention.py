"""What is made once a micro-batch: attention plan and rotation, for all chunks of a stage and for policy and reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megadpo.data.batches.cut import context_part
from megadpo.data.batches.pack import pack_pairs
from megadpo.model.attention import once
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_model
from tests.model.kernels.test_kernels import random_pairs


def a_batch():
    return pack_pairs(random_pairs(), share_prompt=True, pad_to_multiple=8, pad_token_id=0)


def test_it_is_made_once_and_goes_with_the_micro_batch():
    batch, calls = a_batch(), []

    def make():
        calls.append(len(calls))
        return calls[-1]

    with_logps = dataclasses.replace(batch, reference_logps=torch.zeros(6))  # still the same micro-batch
    assert [once(one, "a", make) for one in (batch, with_logps, batch.to("cpu"))] == [0, 0, 0]
    assert (once(batch, "b", make), once(a_batch(), "a", make)) == (1, 2)
    part = context_part(batch, 0, 2)  # another run of tokens
    assert once(part, "a", make) == 3 and once(batch, "a", make) == 0


def forward_twice(folder):
    """Plans and rotations that this rank made for two micro-batches, and what it keeps of each."""
    from megadpo.config.grid import Grid
    from megadpo.config.schema_megatron import MegatronConfig
    from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
    from megadpo.families import read_architecture
    from megadpo.model.build import build_model
    from megadpo.model.kernels.cpu import CpuKernel
    from megadpo.model.rope import RotaryTable
    from megadpo.model.weights.load import load_hf_weights
    from megadpo.parallel import initialize, setup_device
    from megadpo.reference import answer_logps
    from megadpo.train.setup import seed_everything

    parallel = initialize(Grid(pipeline=2, virtual_pipeline=2), setup_device("auto"))
    seed_everything(1, parallel)
    arch = read_architecture(folder)
    policy = PolicyConfig(
        model_name=folder,
        tokenizer=TokenizerConfig(name=folder),
        precision="float32",
        megatron_cfg=MegatronConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    )
    made, kept = {"plan": 0, "__call__": 0}, []

    def counted(owner, name):
        original = getattr(owner, name)

        def call(self, *rest):
            made[name] += 1
            return original(self, *rest)

        return call

    batches = [a_batch(), a_batch()]
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((CpuKernel, "plan"), (RotaryTable, "__call__")):
            patch.setattr(owner, name, counted(owner, name))
        for frozen in (True, False):  # the reference, then the policy
            model = build_model(arch, policy, parallel, frozen=frozen)
            load_hf_weights(model, arch, folder, parallel.grid)
            answer_logps(model, batches, parallel)
            kept.append([len(batch.made) for batch in batches])
    return made, kept


@pytest.mark.distributed
def test_chunks_of_a_stage_and_the_reference_share_it(tmp_path):
    model = make_model(tmp_path / "model", "llama", num_hidden_layers=4)
    for made, kept in run_distributed(forward_twice, 2, str(model), init_process_group=False):
        assert made == {"plan": 2, "__call__": 2} and kept == [[2, 2], [0, 0]]
