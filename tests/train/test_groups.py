"""Pairs of common prompts in one pack: the same run as each pair alone, on every layout and with every reference."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path

import pytest

from tests.helpers.equal_runs import Outcome, assert_equal_runs, run
from tests.helpers.overrides import BALANCE, CP2, DIST, EP2, PP2, RECOMPUTE, SP, TP2, VPP2
from tests.helpers.runs import WORDS, make_model

CACHED = "dpo.reference.mode=cached"
MODELS = {"dense": ("qwen3", {}), "moe": ("qwen3_moe", {"megatron_cfg": BALANCE})}
LAYOUTS = {
    # name: (model, processes, overrides)
    "one_process": ("dense", 1, []),
    "cached_reference_dp2": ("dense", 2, [CACHED, DIST]),
    "tp2_sp_pp2": ("dense", 4, [TP2, SP, PP2]),
    "pp2_vpp2_recompute": ("dense", 2, [PP2, VPP2, RECOMPUTE]),
    "cp2_tp2": ("dense", 4, [CP2, TP2]),
    "moe_one_process": ("moe", 1, []),
    "moe_ep2_cp2": ("moe", 4, [EP2, CP2]),
}
APART = "data.group_prompts=false"


def ranked_pairs(path: Path, *, prompts: int, answers: int, seed: int) -> Path:
    """All pairs of `answers` answers to each prompt."""
    rng = random.Random(seed)

    def text(longest: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, longest)))

    rows = []
    for number in range(prompts):
        prompt = text(20) + f" {number}?"
        texts = [f" {text(10)} no{i}" for i in range(answers)]
        rows += [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in combinations(texts, 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """run(model, processes, overrides) over the same pairs, in their order."""
    folder = tmp_path_factory.mktemp("groups")
    data = {
        "train_data_path": str(ranked_pairs(folder / "train.jsonl", prompts=10, answers=4, seed=0)),
        "val_data_paths": {"held_out": str(ranked_pairs(folder / "valid.jsonl", prompts=3, answers=3, seed=1))},
        "shuffle": False,
    }
    models = {name: make_model(folder / name, family) for name, (family, _) in MODELS.items()}

    def start(name: str, model: str, processes: int, overrides: list[str]) -> Outcome:
        policy = {**MODELS[model][1], "train_global_batch_size": 15, "sequence_packing": {"train_mb_tokens": 260}}
        return run(folder / name, models[model], processes, overrides, policy=policy, data=data)

    return start


@pytest.fixture(scope="module")
def apart(started):  # type: ignore[no-untyped-def]
    """One process, each pair computed alone."""
    return {model: started(f"apart-{model}", model, 1, [APART]) for model in MODELS}


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_each_pair_alone(name: str, started, apart) -> None:  # type: ignore[no-untyped-def]
    model, processes, overrides = LAYOUTS[name]
    got, want = started(name, model, processes, overrides), apart[model]
    difference = assert_equal_runs(got, want, same_tokens=False)
    print(name, difference)
    tokens = [[record["train/num_tokens"] for record in one.metrics] for one in (got, want)]
    assert all(2 * few < many for few, many in zip(*tokens, strict=True)), "15 pairs over 10 answers to 2.5 prompts"
