"""Pairs of common prompts, and answers that begin alike, in one pack: the same run as each pair alone, on every layout and
with every reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.distributed import run_distributed
from tests.helpers.equal_runs import Outcome, assert_equal_runs, run
from tests.helpers.overrides import BALANCE, CP2, DIST, EP2, PP2, RECOMPUTE, SP, TP2, VPP2
from tests.helpers.runs import evaluate, make_config, make_model, ranked_pairs, read_metrics, train

CACHED = "dpo.reference.mode=cached"
LORA = {"peft": {"enabled": True, "dim": 4, "alpha": 8, "lora_B_init_method": "xavier"}}
WEIGHTED = ["dpo.ld_alpha=0.3", "dpo.use_weighting=true"]
MODELS = {
    "dense": ("qwen3", {}, []),
    "moe": ("qwen3_moe", {"megatron_cfg": BALANCE}, []),
    "lora": ("qwen3", {"megatron_cfg": LORA}, ["dpo.use_weighting=true"]),
    "weighted": ("qwen3", {}, WEIGHTED),
}
"""name: (family, changes of policy, overrides)"""
LAYOUTS = {
    # name: (model, processes, overrides)
    "one_process": ("dense", 1, []),
    "cached_reference_dp2": ("dense", 2, [CACHED, DIST]),
    "tp2_sp_pp2": ("dense", 4, [TP2, SP, PP2]),
    "pp2_vpp2_recompute": ("dense", 2, [PP2, VPP2, RECOMPUTE]),
    "cp2_tp2": ("dense", 4, [CP2, TP2]),
    "moe_one_process": ("moe", 1, []),
    "moe_ep2_cp2": ("moe", 4, [EP2, CP2]),
    "lora_tp2_sp": ("lora", 2, [TP2, SP]),
    "weighted_one_process": ("weighted", 1, []),
    "weighted_cached_cp2": ("weighted", 2, [CACHED, CP2]),
}
APART = "data.group_prompts=false"
BEGIN = 16
"""Words, so that these are more tokens."""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """run(model, processes, overrides) over the same pairs, in their order."""
    folder = tmp_path_factory.mktemp("groups")
    data = {
        "train_data_path": str(ranked_pairs(folder / "train.jsonl", prompts=10, answers=4, seed=0, begin=BEGIN)),
        "val_data_paths": {
            "held_out": str(ranked_pairs(folder / "valid.jsonl", prompts=3, answers=3, seed=1, begin=BEGIN))
        },
        "shuffle": False,
    }
    models = {name: make_model(folder / name, family) for name, (family, _, _) in MODELS.items()}

    def start(name: str, model: str, processes: int, overrides: list[str]) -> Outcome:
        sizes = {"max_total_sequence_length": 128, "sequence_packing": {"train_mb_tokens": 300}}
        policy = {**MODELS[model][1], "train_global_batch_size": 15, **sizes}
        return run(folder / name, models[model], processes, [*overrides, *MODELS[model][2]], policy=policy, data=data)

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
    saved = 1.1 if model == "weighted" else 3  # an answer's weights depend on its pair, so that only prompts are shared
    assert all(saved * few < many for few, many in zip(*tokens, strict=True)), "15 pairs over 10 answers to 2.5 prompts"


@pytest.mark.distributed
def test_rows_of_answers_are_the_same_pairs(tmp_path: Path) -> None:
    """Training and evaluation, the pairs of a row on two ranks: which pair is which stays known."""
    model = make_model(tmp_path / "model")
    pairs = ranked_pairs(tmp_path / "pairs.jsonl", prompts=6, answers=4, seed=2)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    answers = tmp_path / "answers.jsonl"
    with answers.open("w") as file:
        for start in range(0, len(rows), 6):
            texts = [rows[start]["chosen"], *(row["rejected"] for row in rows[start : start + 3])]
            ranked = [{"text": text, "score": -number} for number, text in enumerate(texts)]
            file.write(json.dumps({"prompt": rows[start]["prompt"], "answers": ranked}) + "\n")
    found = {}
    for path in (pairs, answers):
        data = {"train_data_path": str(path), "val_data_paths": {"held_out": str(path)}, "shuffle": False}
        folder = tmp_path / path.stem
        folder.mkdir()
        config = make_config(folder, model, data=data, policy={"sequence_packing": {"train_mb_tokens": 100}})
        assert run_distributed(train, 2, str(config), [], init_process_group=False) == [0, 0]
        named = [f"policy.model_name={model}"]
        assert run_distributed(evaluate, 2, str(config), named, init_process_group=False) == [0, 0]
        scores = [json.loads(line) for line in (folder / "logs/pairs-held_out.jsonl").read_text().splitlines()]
        losses = [record["train/loss"] for record in read_metrics(folder / "logs") if "train/loss" in record]
        found[path.stem] = losses, [score["policy_chosen_logps"] for score in scores]
        numbers = [(score["index"], score["pair"]) for score in scores]
        assert numbers == [(n, 0) if path is pairs else divmod(n, 6) for n in range(len(rows))]
    assert found["pairs"] == found["answers"]
