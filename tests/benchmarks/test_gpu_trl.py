"""TRL's side of the GPU benchmark: settings by name, memory foretold, who takes part; and whether work was the same."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from benchmarks import gpu_float64, gpu_inputs, gpu_te, gpu_trl, gpu_work
from benchmarks.gpu_sides import OUT_OF_MEMORY, Outcome
from benchmarks.trl_worker import Spec, precompute_step_times

TINY, LLAMA_8B = gpu_inputs.SHAPES["tiny"], gpu_inputs.SHAPES["llama-3.1-8b"]
H200 = 150_754_820_096  # 143771 MiB
PAIRS = np.array([[10, 6, 4], [3, 2, 5]])


def test_a_name_says_all_settings():
    assert gpu_trl.settings("trl-plain-mb8-sorted-precompute-checkpointing-liger") == {
        "micro_batch_pairs": 8,
        "dtype": "bfloat16",
        "sort_within_global_batch": True,
        "precompute_reference": True,
        "extra": {
            "optim": "adamw_torch_fused",
            "bf16": False,
            "gradient_checkpointing": True,
            "use_liger_kernel": True,
        },
    }
    assert gpu_trl.settings("trl-mb1") == {"micro_batch_pairs": 1}
    assert gpu_trl.settings("trl-mixed-mb2-flash")["attention"] == "flash_attention_2"
    for wrong in ("trl-fp16-mb1", "trl-bf16", "trl-bf16-mb2-swift", "ours"):
        with pytest.raises(ValueError, match=wrong):
            gpu_trl.settings(wrong)
    for name in gpu_trl.CANDIDATES:
        Spec(
            **{"data": "", "model": "", "output_dir": "", "steps": 1, "global_batch_pairs": 8}, **gpu_trl.settings(name)
        )


@pytest.mark.parametrize(
    ("name", "total"),
    [
        # 106,816 parameters x 10 bytes; 4 sequences of 16; a layer 16 h + 8 h + 4 x 4 + 2 x 16 + 8 f = 2,608 bytes a token,
        # last norm 512; the head's backward (17 + 512) x 64 x 6 + 2 x 17 x 512
        ("trl-bf16-mb2", 1_068_160 + 64 * (2 * 2608 + 512) + 203_136 + 17_408),
        # the pair of 16 alone: 32 tokens, 10 of answers
        ("trl-plain-mb1-sorted", 1_068_160 + 32 * (2 * 2608 + 512) + 200_448 + 10_240),
        # 16 bytes without the reference; copies of 74,048 weights; residual 4 h a layer and one layer of 18 h + 560 + 6 f
        (
            "trl-mixed-mb2-precompute-checkpointing-liger",
            1_709_056 + 148_096 + 64 * (512 + 1152 + 560 + 768 + 512) + 135_424 + 17_408,
        ),
    ],
)
def test_the_memory_foretold_is_that_of_the_formula(name, total):
    assert TINY.parameters == 106_816
    assert gpu_trl.peak_bytes(TINY, gpu_trl.settings(name), PAIRS, 2)["total"] == total


def test_micro_batches_are_those_that_trl_makes():
    lengths = np.array([[1, 1, 1], [1, 9, 1], [1, 5, 1], [1, 1, 3], [2, 2, 2], [7, 7, 7]])
    batches = list(gpu_trl.micro_batches(lengths, 4, {"micro_batch_pairs": 2, "sort_within_global_batch": True}))
    assert [batch.tolist() for batch in batches] == [
        [[1, 9, 1], [1, 5, 1]],
        [[1, 1, 3], [1, 1, 1]],
        [[7, 7, 7], [2, 2, 2]],
    ]


def test_only_what_fits_takes_part():
    lengths = gpu_inputs.ultrafeedback_lengths(192)
    fitting, unfit = gpu_trl.choose(["auto", "trl-bf16-mb8"], LLAMA_8B, lengths, 32, H200, None)
    assert {"trl-bf16-mb2-sorted", "trl-bf16-mb2-sorted-liger", "trl-bf16-mb8-sorted-checkpointing"} <= set(fitting)
    assert {"trl-bf16-mb8", "trl-bf16-mb8-sorted-liger", "trl-mixed-mb2-sorted-liger"} <= set(unfit)
    assert "GiB foretold" in unfit["trl-bf16-mb8"]
    small = dataclasses.replace(LLAMA_8B, num_layers=4)
    assert not gpu_trl.choose(["auto"], small, lengths, 32, H200, None)[1]


def test_the_fastest_found_before_is_carried_on_where_it_fits(tmp_path):
    lengths = gpu_inputs.ultrafeedback_lengths(192)
    measured = [
        {"name": name, "pairs_per_s": speed}
        for name, speed in [("ours", 99), ("trl-bf16-mb2-sorted", 2), ("trl-bf16-mb16", 9), ("trl-bf16-mb1-sorted", 3)]
    ]
    earlier = tmp_path / "trl.json"
    earlier.write_text(json.dumps({"measured": measured}))
    fitting, unfit = gpu_trl.choose(["quick"], LLAMA_8B, lengths, 32, H200, earlier)
    assert fitting[:2] == ["trl-bf16-mb1-sorted", "trl-bf16-mb2-sorted"] and len(fitting) == gpu_trl.QUICK
    assert unfit == {}
    llama_1b = gpu_inputs.SHAPES["llama-3.2-1b"]
    fitting, _ = gpu_trl.choose(["quick"], llama_1b, lengths, 32, H200, earlier)
    assert fitting == ["trl-bf16-mb16", "trl-bf16-mb1-sorted", "trl-mixed-mb2-sorted-liger"]
    assert gpu_trl.choose(["quick"], llama_1b, lengths, 32, H200, tmp_path / "none")[0] == list(gpu_trl.CANDIDATES[:3])


def test_a_reference_pass_made_beforehand_counts_with_its_step():
    sizes = {"steps": 2, "global_batch_pairs": 4, "micro_batch_pairs": 2}
    spec = Spec(data="", model="", output_dir="", precompute_reference=True, **sizes)
    assert precompute_step_times(spec, [10.0, 13.0, 14.0, 14.5, 15.0]) == [4.0, 1.0]
    assert precompute_step_times(dataclasses.replace(spec, precompute_reference=False), []) == []
    with pytest.raises(ValueError, match="4 expected"):
        precompute_step_times(spec, [10.0, 11.0])


def step(chosen, rejected, norm):
    return {"logps/chosen": chosen, "logps/rejected": rejected, "grad_norm": norm}


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (step(-4400.1, -4300.0, 20.1), None),
        (step(-4400.0, -4300.0, 20.4), "grad_norm"),
        # other weights: within 1% of a sum over 350 tokens, but not of what bfloat16 is off
        (step(-4406.0, -4300.0, 20.0), "logps/chosen"),
        (step(-4400.0, math.nan, 20.0), "logps/rejected"),
        ({"logps/chosen": -4400.0, "logps/rejected": -4300.0}, "grad_norm"),
    ],
)
def test_the_first_step_shows_other_work_that_losses_hide(other, what):
    """Losses near ln 2 agree whatever was computed."""
    batch = np.array([[150, 350, 350]] * 32)
    losses = {"ours": [0.6931, 0.6930], "trl-a": [0.6931, 0.6929]}
    assert gpu_work.different_losses(losses, "cuda") == []
    found = gpu_work.different_first_steps({"ours": step(-4400.0, -4300.0, 20.0), "trl-a": other}, batch)
    assert [text.split("'s ")[1].split(":")[0] for text in found] == ([what] if what else [])
    assert gpu_work.different_first_steps({"ours": step(-4400.0, -4300.0, 20.0), "ours-fp8": other}, batch) == []


def test_results_of_the_same_settings_are_continued(tmp_path):
    path, machine = tmp_path / "r.json", {"gpu": "H200", "code": "a", "versions": {"torch": "2"}, "environment": {}}
    options = dict.fromkeys(gpu_work.SAME, "1")
    ran, hung = (Outcome("ours", 60.0, [1.0], [0.7], 1, 1, error, "") for error in (None, "timed out"))
    large = dataclasses.replace(ran, name="trl-a", error=OUT_OF_MEMORY)
    runs = {"ours": [ran, hung], "trl-a": [large], "trl-b": [hung]}
    content = {"runs": {name: [dataclasses.asdict(one) for one in found] for name, found in runs.items()}}
    path.write_text(json.dumps(content | {"options": options, "machine": machine}))
    assert gpu_work.continued(path, options, machine) == {"ours": [ran], "trl-a": [large]}
    assert gpu_work.continued(path, options | {"layers": "4"}, machine) == {}
    assert gpu_work.continued(path, options, machine | {"code": "b"}) == {}
    assert gpu_work.continued(tmp_path / "none", options, machine) == {}


def test_float64s_first_step_is_that_of_logits_in_full(tmp_path):
    """Against one pass over each whole sequence, with all logits, and the loss as it is defined."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gpu_inputs.make_model(TINY, tmp_path / "model", torch.device("cpu"))
    gpu_inputs.write_pairs(PAIRS, TINY.vocab_size, tmp_path / "pairs.jsonl")
    sizes = {"steps": 1, "global_batch_pairs": 2, "micro_batch_pairs": 1}
    spec = Spec(data=str(tmp_path / "pairs.jsonl"), model=str(tmp_path / "model"), output_dir="", beta=0.3, **sizes)
    found = gpu_float64.first_step(spec)

    model = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    loss, sums = torch.zeros((), dtype=torch.float64), {"chosen": 0.0, "rejected": 0.0}
    for line, lengths in zip((tmp_path / "pairs.jsonl").open(), PAIRS.tolist(), strict=True):
        row, logps = json.loads(line), {}
        for answer, count in zip(sums, lengths[1:], strict=True):
            ids = torch.tensor(tokenizer(row["prompt"] + row[answer])["input_ids"] + [tokenizer.eos_token_id])
            every = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])
            logps[answer] = every[-count:].sum()
            sums[answer] += logps[answer].item() / 2
        ratio = logps["chosen"] - logps["chosen"].detach() - logps["rejected"] + logps["rejected"].detach()
        loss = loss - torch.nn.functional.logsigmoid(0.3 * ratio) / 2
    loss.backward()
    norm = math.sqrt(sum(float(parameter.grad.square().sum()) for parameter in model.parameters()))
    assert found == pytest.approx(
        {f"logps/{name}": value for name, value in sums.items()} | {"grad_norm": norm}, rel=1e-9
    )


def test_transformer_engines_check_has_prompts_shared():
    mask, lengths, keys = gpu_te.segments([(2, 1, 2), (1, 1, 1)])
    assert lengths == [2, 1, 2, 1, 1, 1]
    assert keys == [[0, 1], [0, 1, 2], [0, 1, 3, 4], [5], [5, 6], [5, 7]]
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 0, 1],
    ]
