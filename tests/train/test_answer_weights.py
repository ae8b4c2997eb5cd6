"""LD-DPO's weights of tokens and WPO's of pairs: from logits of transformers to the loss, and in whole runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config, make_model, read_metrics, train
from tests.train.test_logps import some_pairs

ALPHA, BETA = 0.3, 0.1


def columns_of_a_pack(folder, tensor, context):
    """What the model gives with both weights on, and the loss of cpo: [2P, 3], a number."""
    from megadpo.config.grid import Grid
    from megadpo.config.schema import DpoConfig
    from megadpo.config.schema_megatron import MegatronConfig
    from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
    from megadpo.data.batches.cut import context_part
    from megadpo.data.batches.pack import pack_pairs
    from megadpo.families import read_architecture
    from megadpo.model.build import build_model
    from megadpo.model.weights.load import load_hf_weights
    from megadpo.parallel import initialize, setup_device
    from megadpo.reference import answer_logps
    from megadpo.train.step import pair_loss

    parallel = initialize(Grid(tensor=tensor, context=context), setup_device("auto"))
    sizes = MegatronConfig(tensor_model_parallel_size=tensor, context_parallel_size=context)
    policy = PolicyConfig(
        model_name=folder, tokenizer=TokenizerConfig(name=folder), precision="float32", megatron_cfg=sizes
    )
    arch = read_architecture(folder)
    model = build_model(arch, policy, parallel, frozen=True)
    load_hf_weights(model, arch, folder, parallel.grid)
    model[0].gives_likeness = True
    whole = pack_pairs(some_pairs(), share_prompt=True, pad_to_multiple=8, pad_token_id=0, tail_weight=ALPHA)
    part = context_part(whole, parallel.grid.cp_rank, context)
    (found,) = answer_logps(model, [part], parallel)
    cfg = DpoConfig(loss_type="cpo", ld_alpha=ALPHA, use_weighting=True, reference_policy_kl_penalty=BETA)
    return found, pair_loss(found, part, cfg).loss_sum.item()


def written_out(folder):
    """The same in float64, from the formulas of both papers and transformers' logits: (columns, loss)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    columns, loss = [], 0.0
    for pair in some_pairs():
        answers, likeness = [], []
        for answer, mask in ((pair.chosen_ids, pair.chosen_mask), (pair.rejected_ids, pair.rejected_mask)):
            ids = torch.from_numpy(np.concatenate([pair.prompt_ids, answer])).long()[None]
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].double().log_softmax(-1)[-len(answer) :]
            token = logps.gather(1, torch.from_numpy(answer).long()[:, None])[:, 0]
            aligned = token - (2 * logps).logsumexp(-1)
            kept = torch.ones(len(answer), dtype=torch.bool) if mask is None else torch.from_numpy(mask)
            answers.append(token[kept])
            likeness.append(aligned[kept].sum())
        shared = min(len(one) for one in answers)
        weighted = [one[:shared].sum() + ALPHA * one[shared:].sum() for one in answers]
        columns += [torch.stack([w, one.sum(), a]) for w, one, a in zip(weighted, answers, likeness, strict=True)]
        weight = math.prod(math.exp(a / len(one)) for a, one in zip(likeness, answers, strict=True))
        loss += weight * math.log1p(math.exp(-BETA * (weighted[0] - weighted[1])))
    return torch.stack(columns), loss


@pytest.mark.distributed
@pytest.mark.parametrize(("tensor", "context"), [(1, 1), (2, 1), (1, 2)])
def test_weights_written_out(tensor, context, tmp_path_factory):
    folder = str(make_model(tmp_path_factory.mktemp("model") / "llama"))
    want, want_loss = written_out(folder)
    assert not torch.allclose(want[:, 0], want[:, 1]), "the pairs must differ in length"
    for got, loss in run_distributed(
        columns_of_a_pack, tensor * context, folder, tensor, context, init_process_group=False
    ):
        assert got.shape == want.shape
        assert ((got.double() - want) / want).abs().max() < 1e-5
        assert loss == pytest.approx(want_loss, rel=1e-5)


@pytest.mark.distributed
def test_whole_runs_are_the_same_with_a_cached_reference_and_another_layout(tmp_path):
    """The reference is another model, since at the start every log-ratio would be 0; both weights reach it and the policy."""
    model, other = make_model(tmp_path / "model"), make_model(tmp_path / "other", "qwen2")
    weights = [f"dpo.ld_alpha={ALPHA}", "dpo.use_weighting=true"]
    runs = {
        "plain": (1, []),
        "resident": (1, weights),
        "cached": (1, [*weights, "dpo.reference.mode=cached"]),
        "tp2": (2, [*weights, "policy.megatron_cfg.tensor_model_parallel_size=2"]),
    }
    found = {}
    for name, (ranks, overrides) in runs.items():
        (tmp_path / name).mkdir()
        dpo = {"reference": {"model_name": str(other)}, "max_num_steps": 2}
        config = make_config(tmp_path / name, model, pairs=20, dpo=dpo)
        assert run_distributed(train, ranks, str(config), overrides, init_process_group=False) == [0] * ranks
        found[name] = read_metrics(tmp_path / name / "logs")
    for name in ("cached", "tp2"):
        for mine, theirs in zip(found[name], found["resident"], strict=True):
            for metric in ("train/loss", "train/grad_norm", "train/logps/chosen"):
                assert mine[metric] == pytest.approx(theirs[metric], rel=1e-5), (name, metric)
            assert mine["train/rewards/chosen"] == pytest.approx(theirs["train/rewards/chosen"], abs=1e-5)
    first, plain = found["resident"][0], found["plain"][0]
    assert first["train/logps/chosen"] == pytest.approx(plain["train/logps/chosen"], rel=1e-6), "of whole answers"
    assert first["train/rewards/chosen"] != pytest.approx(plain["train/rewards/chosen"], rel=1e-3)
    assert first["train/loss"] != pytest.approx(plain["train/loss"], rel=1e-3)
