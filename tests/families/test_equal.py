"""Every family against transformers: log-probabilities, the gradient of every parameter, and weights there and back.

All cases run in one group of processes for each layout: starting processes costs more than these models do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megadpo.config.check import chunk_layers
from megadpo.config.schema import Config
from megadpo.config.schema_megatron import MegatronConfig, OptimizerConfig
from megadpo.config.schema_policy import PolicyConfig, TokenizerConfig
from megadpo.config.variants import FAMILIES
from megadpo.data.pairs import TokenizedPair
from megadpo.families import WeightTable, read_architecture, weight_table
from megadpo.model.weights.hf_folder import HfWeights
from tests.families.cases import CASES, make_case
from tests.families.layouts import LAYOUTS, takes_part
from tests.helpers.distributed import run_distributed
from tests.model.kernels.test_kernels import random_pairs
from tests.model.weights.hf_models import read_tensors
from tests.plan.cases import stage_parameters

PAIRS = random_pairs([(9, 6, 4), (1, 1, 2), (2, 14, 7), (11, 5, 8)], vocab=64)
TOLERANCE = 1e-5
"""Relative. Of a gradient tensor that is small among the others, relative to a thousandth of the whole gradient."""


def shared_prompts(layout: dict[str, Any]) -> tuple[bool, ...]:
    """Both ways where tokens are laid out by them: in one process, and cut over context-parallel ranks."""
    return (True, False) if not layout or "context" in layout else (True,)


def weigh(logps: torch.Tensor) -> torch.Tensor:
    """A loss in which no log-probability can stand in for another."""
    return (logps * torch.linspace(-1.0, 1.5, logps.numel(), dtype=logps.dtype)).sum()


def measured(folders: dict[str, str], layout: dict[str, Any], pairs: list[TokenizedPair] = PAIRS) -> dict[str, Any]:
    """This rank's part of each case: its place, its parameters' sizes, and by `share_prompt` logps and gradients."""
    from megadpo.config.grid import Grid
    from megadpo.parallel import initialize, setup_device
    from megadpo.train.setup import seed_everything

    parallel = initialize(Grid(**{k: v for k, v in layout.items() if k != "sequence_parallel"}), setup_device("auto"))
    seed_everything(1, parallel)
    cases = {case: _measured(folder, layout, parallel, pairs) for case, folder in folders.items()}
    return {"place": parallel.grid, "cases": cases}


def _measured(folder: str, layout: dict[str, Any], parallel: Any, pairs: list[TokenizedPair]) -> dict[str, Any]:
    from megatron.core.distributed import finalize_model_grads

    from megadpo.data.batches.cut import context_part
    from megadpo.data.batches.pack import pack_pairs
    from megadpo.model.build import build_model
    from megadpo.model.weights.load import load_hf_weights, named_global_parameters
    from megadpo.optimizer.build import wrap_for_training

    arch, place = read_architecture(folder), parallel.grid
    megatron = MegatronConfig(
        tensor_model_parallel_size=place.tensor,
        sequence_parallel=layout.get("sequence_parallel", False),
        pipeline_model_parallel_size=place.pipeline,
        context_parallel_size=place.context,
        expert_model_parallel_size=place.expert,
        moe_router_load_balancing_type="none",
        optimizer=OptimizerConfig(use_distributed_optimizer=False),  # it leaves a rank a part of the sums only
    )
    tokenizer = TokenizerConfig(name=folder)
    policy = PolicyConfig(model_name=folder, tokenizer=tokenizer, precision="float32", megatron_cfg=megatron)
    chunks = build_model(arch, policy, parallel, frozen=False)
    load_hf_weights(chunks, arch, folder, place)
    wrapped = wrap_for_training(chunks, policy)
    wrapped[0].module.config.finalize_model_grads_func = lambda parts, _, **groups: finalize_model_grads(
        parts, None, **groups
    )
    layers = chunk_layers(Config(policy=policy), arch)[place.pp_rank]
    found: dict[str, Any] = {
        "elements": [[one.numel() for one in chunk.parameters()] for chunk in chunks],
        "planned": [
            [one.elements for one in chunk]
            for chunk in stage_parameters(arch, place, stage=place.pp_rank, chunks=layers)
        ],
    }
    for share in shared_prompts(layout):
        whole = pack_pairs(pairs, share_prompt=share, pad_to_multiple=8, pad_token_id=0)
        logps = _forward_backward(wrapped, context_part(whole, place.cp_rank, place.context), copies=place.data)
        first = weight_table(arch).num_experts // place.expert * place.ep_rank
        gradients = {
            name: one.main_grad.clone()
            for chunk in wrapped
            for name, one in named_global_parameters(chunk, first)
            if one.requires_grad
        }
        found[str(share)] = logps, gradients
    return found


def _forward_backward(wrapped: Any, batch: Any, *, copies: int) -> list[torch.Tensor]:
    """The logps on the last stage; gradients are in the buffers. copies: of the model, each of which has all pairs."""
    from megadpo.parallel.pipeline import run_pipeline

    kept = []

    def loss(logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        kept.append(logps.detach())
        return weigh(logps) / copies, torch.zeros((), dtype=torch.int), None

    for chunk in wrapped:
        chunk.zero_grad_buffer()
    run_pipeline(wrapped, [batch], lambda iterator, chunk: (chunk(next(iterator)), loss), forward_only=False)
    return kept


def gradient_errors(
    table: WeightTable, ranks: list[dict[str, Any]], case: str, share: str, want: dict[str, torch.Tensor]
) -> dict[str, float]:
    """The worst error of each tensor of the folder, on any rank that has a part of it; NaN where no rank has all of it."""
    total = float(torch.stack([one.norm() for one in want.values()]).norm())
    errors = dict.fromkeys(want, 0.0)
    seen = {name: torch.zeros(one.shape, dtype=torch.bool) for name, one in want.items()}
    for rank in ranks:
        place = rank["place"]
        for name, gradient in rank["cases"][case][share][1].items():
            entry = table.by_name[name]
            tp = (place.tp_rank, place.tensor) if entry.expert is None else (place.etp_rank, place.expert_tensor)
            for rectangle in entry.rectangles(*tp):
                hf, at = entry.hf[rectangle.source], rectangle.source_index
                difference = float((gradient[rectangle.shard_index] - want[hf][at]).norm())
                errors[hf] = max(errors[hf], difference / max(float(want[hf].norm()), 1e-3 * total))
                seen[hf][at] = True
    return {name: error if seen[name].all() else float("nan") for name, error in errors.items()}


def by_transformers(folder: str, pairs: list[TokenizedPair] = PAIRS) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logps [2P], each text alone, and the gradient of `weigh` by the table's names."""
    import transformers

    (name,) = json.loads((Path(folder) / "config.json").read_text())["architectures"]
    one = getattr(
        transformers, name
    )  # an Auto class takes a Mistral with layer_types for a Ministral, which it then is
    if name == "MistralForCausalLM":
        one = transformers.AutoModelForCausalLM
    model = one.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    sums = []
    for pair in pairs:
        for answer in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.from_numpy(np.concatenate([pair.prompt_ids, answer])).long()[None]
            logps = model(ids).logits[0, :-1].log_softmax(-1)
            sums.append(logps.gather(1, ids[0, 1:, None])[-len(answer) :].sum())
    logps = torch.stack(sums)
    weigh(logps).backward()
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    model.save_pretrained(Path(folder) / "gradient")  # which renames as for weights
    table = weight_table(read_architecture(folder))
    weights = HfWeights.open(Path(folder) / "gradient", table)
    names = [name for entry in table.entries if not entry.row.frozen for name in entry.hf]
    with weights.slices(names) as sources:  # a stack of all experts comes apart
        return logps.detach(), {name: source[(slice(None),)] for name, source in zip(names, sources, strict=True)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {case: str(make_case(tmp_path_factory.mktemp("families") / case, case)) for case in CASES}


@pytest.fixture(scope="module")
def truths(folders: dict[str, str]) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    return {case: by_transformers(folder) for case, folder in folders.items()}


def test_every_class_has_a_case(folders: dict[str, str]) -> None:
    classes = {
        json.loads((Path(folder) / "config.json").read_text())["architectures"][0] for folder in folders.values()
    }
    assert classes == {one for family in FAMILIES for one in family.classes}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logps_and_gradients_are_transformers(layout: str, folders: Any, truths: Any) -> None:
    sizes = LAYOUTS[layout]
    cases = {case: folder for case, folder in folders.items() if takes_part(read_architecture(folder), sizes)}
    world = 2 if sizes else 1
    ranks = run_distributed(measured, world, cases, sizes, init_process_group=False)
    wrong = []
    for case, folder in cases.items():
        arch, (want_logps, want) = read_architecture(folder), truths[case]
        for share in map(str, shared_prompts(sizes)):
            seen = [logps for rank in ranks for logps in rank["cases"][case][share][0]]
            errors = {"logps": max(float((logps - want_logps).norm() / want_logps.norm()) for logps in seen)}
            errors |= gradient_errors(weight_table(arch), ranks, case, share, want)
            wrong += [f"{case} share={share} {n}: {e:.1e}" for n, e in errors.items() if not e < TOLERANCE]
        parts = [rank["cases"][case] for rank in ranks]
        assert [part["elements"] for part in parts] == [part["planned"] for part in parts], case
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_bit_for_bit(case: str, folders: Any, tmp_path: Path) -> None:
    from megadpo.model.weights.convert import export_hf, import_hf

    import_hf(folders[case], tmp_path / "megatron")
    export_hf(tmp_path / "megatron", tmp_path / "back")
    got, want = read_tensors(tmp_path / "back"), read_tensors(Path(folders[case]))
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []
