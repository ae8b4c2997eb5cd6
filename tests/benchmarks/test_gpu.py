"""The GPU benchmark, as far as a machine without one can hold it: its inputs, its arithmetic, and a smoke run."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import (
    gpu,
    gpu_contenders,
    gpu_head,
    gpu_inputs,
    gpu_machine,
    gpu_options,
    gpu_report,
    gpu_worker,
    make_llama,
)
from benchmarks.gpu_sides import OUT_OF_MEMORY, Outcome
from megadpo import commands
from megadpo.config.load import load_config
from megadpo.data.tokens.tokenizer import load_tokenizer
from megadpo.families import read_architecture
from megadpo.train import reference, watch

TINY = gpu_inputs.SHAPES["tiny"]


def parse(arguments):
    return gpu_options.parse(arguments, "")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    gpu_inputs.make_model(TINY, folder, torch.device("cpu"))
    return folder


def test_real_shapes_have_the_real_numbers_of_parameters():
    # as Meta's model cards and `sum(p.numel())` of transformers' models say
    assert gpu_inputs.SHAPES["llama-3.2-1b"].parameters == 1_235_814_400
    assert gpu_inputs.SHAPES["llama-3.1-8b"].parameters == 8_030_261_248


def test_a_made_model_opens_in_transformers(model):
    from transformers import AutoModelForCausalLM

    loaded, said = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert sum(p.numel() for p in loaded.parameters()) == TINY.parameters
    assert loaded.dtype == torch.bfloat16


def test_text_has_exactly_the_tokens_asked_for(model, tmp_path):
    lengths = gpu_inputs.ultrafeedback_lengths(20, scale=0.1)
    gpu_inputs.write_pairs(lengths, TINY.vocab_size, tmp_path / "pairs.jsonl")
    tokenizer = load_tokenizer(str(model))
    for line, (prompt, chosen, rejected) in zip((tmp_path / "pairs.jsonl").open(), lengths.tolist(), strict=True):
        row = json.loads(line)
        assert len(tokenizer(row["prompt"])["input_ids"]) == prompt
        for answer, count in (("chosen", chosen), ("rejected", rejected)):
            ids = tokenizer(row["prompt"] + row[answer] + "</s>")["input_ids"]
            assert len(ids) == prompt + count and ids[-1] == gpu_inputs.EOS
            assert gpu_inputs.PAD not in ids


def test_lengths_are_like_ultrafeedbacks():
    lengths = gpu_inputs.ultrafeedback_lengths(4000)
    assert 140 < lengths[:, 0].mean() < 160
    assert 330 < lengths[:, 1:].mean() < 370
    assert (lengths[:, 0] + lengths[:, 1:].max(axis=1)).max() <= 2048 + 8
    assert lengths.min() >= 2


def test_flops_are_those_of_the_formula(model):
    arch = read_architecture(model)
    lengths = np.array([[5, 3, 2], [1, 1, 4]])
    weights = sum(math.prod(size) for name, size in make_llama.weight_shapes(TINY) if "proj" in name)
    head = TINY.hidden_size * TINY.vocab_size
    key = 2 * TINY.num_layers * TINY.num_heads * TINY.head_dim
    # prompt 5 sees 15 keys; answers of 3 and 2 after it 6 + 7 + 8 and 6 + 7; then 1; 2 and 2 + 3 + 4 + 5
    shared = 2 * 4 * (weights * 16 + head * 10 + key * (15 + 21 + 13 + 1 + 2 + 14))
    assert gpu_report.step_flops(arch, lengths, share_prompt=True) == shared
    repeated = shared + 2 * 4 * (weights * 6 + key * (15 + 1))
    assert gpu_report.step_flops(arch, lengths, share_prompt=False) == repeated


def test_layers_are_left_out_only_where_memory_is_short():
    tiny = TINY.parameters
    # bytes a parameter: weights 2, reference 2, gradients 4; float32 weights 4, moments 8; lean 2 and 4
    assert [gpu_report.state_bytes(TINY, lean=lean) for lean in (False, True)] == [20 * tiny, 14 * tiny]
    whole, h200 = gpu_inputs.SHAPES["llama-3.1-8b"], 150_754_820_096  # 143771 MiB
    assert gpu_report.whole_layers(whole, h200, lean=True) == 32
    fewer = gpu_report.whole_layers(whole, h200, lean=False)
    assert 20 <= fewer < 32
    fits = gpu_report.state_bytes(dataclasses.replace(whole, num_layers=fewer), lean=False)
    assert fits <= 0.82 * h200 < fits + 20 * 218_112_000  # and one more would not
    assert gpu_report.whole_layers(gpu_inputs.SHAPES["llama-3.2-1b"], h200, lean=False) == 16
    # float8 keeps 3 bytes a parameter more: 17 x 7.05e9 in 0.82 of 150.8e9
    assert gpu_report.whole_layers(whole, h200, lean=True, float8=True) == 28


def outcome(name, step_s, peak, error=None):
    return Outcome(name, 60.0, [9.0, step_s, step_s], [0.69] * 3, peak, peak, error, "")


def test_goals_are_held_to_the_fastest_of_trls(model):
    arch, lengths = read_architecture(model), np.array([[10, 5, 5]] * 8)

    def measured(share, *outcomes):
        return gpu_report.measured(list(outcomes), arch, lengths, warmup_steps=1, pairs_per_step=4, share_prompt=share)

    ours = measured(True, outcome("ours", 1.0, 60), outcome("ours", 2.0, 60), outcome("ours", 1.0, 60))
    slow, fast = measured(False, outcome("trl-a", 8.0, 10)), measured(False, outcome("trl-b", 4.0, 100))
    assert measured(False, outcome("trl-c", 4.0, 100, error="out of memory")) is None
    assert ours.pairs_per_s == 4.0 and ours.computed_tokens_per_s == 80.0
    values = {goal["what"]: goal for goal in gpu_report.goals([ours, slow, fast], rate_tflops=1.0)}
    assert values["pairs/s over TRL's"]["value"] == 4.0 and values["pairs/s over TRL's"]["met"]
    assert values["peak memory over TRL's"]["value"] == 0.6 and values["peak memory over TRL's"]["met"]
    assert not values["MFU of the measured rate"]["met"]
    mixed = measured(False, outcome("trl-mixed-a", 8.0, 200))
    against = {goal["what"]: goal["against"] for goal in gpu_report.goals([ours, fast, mixed], rate_tflops=1.0)}
    assert against["pairs/s over TRL's"] == "trl-b"
    assert against["peak memory over TRL's" + gpu_report.ALIKE] == "trl-mixed-a"


HOPPER = {"gpu": "NVIDIA H200", "gpu_compute_capability": [9, 0], "cuda": "13.0"}
WITH_TE, WITHOUT_TE = ({"versions": {"transformer-engine": version}} for version in ("2.11.0", None))


@pytest.mark.parametrize(
    ("machine", "blockwise", "tensorwise"),
    [
        (HOPPER | WITH_TE, None, None),
        (HOPPER | WITHOUT_TE, "Transformer Engine", "Transformer Engine"),
        (HOPPER | WITH_TE | {"gpu_compute_capability": [8, 0]}, "has 8.0", "has 8.0"),
        (HOPPER | WITH_TE | {"cuda": "12.8"}, "CUDA 12.9", None),
        (WITH_TE, "needs a GPU", "needs a GPU"),
    ],
)
def test_float8_is_left_out_where_it_cannot_run_and_says_why(machine, blockwise, tensorwise):
    options = parse(["--ours", "ours,ours-fp8,ours-fp8-tensorwise", "--trl", ""])
    missing = gpu_contenders.absent(options, machine)
    assert "ours" not in missing
    for name, reason in (("ours-fp8", blockwise), ("ours-fp8-tensorwise", tensorwise)):
        assert (reason is None and name not in missing) or reason in missing[name]
    assert gpu_contenders.nothing_to_compare(options, missing) == (blockwise is not None and tensorwise is not None)


def test_float8_that_cannot_run_costs_no_session(monkeypatch, tmp_path, capsys):
    said = subprocess.CompletedProcess([], 0, stdout=json.dumps(HOPPER | WITHOUT_TE), stderr="")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: said)
    monkeypatch.setattr(gpu, "prepare", lambda *_, **__: pytest.fail("nothing is to be made"))
    out = tmp_path / "fp8.json"
    assert gpu.main(["--ours", "ours,ours-fp8", "--trl", "", "--out", str(out)]) == 0
    assert "ours-fp8: float8 needs Transformer Engine" in capsys.readouterr().out
    assert list(json.loads(out.read_text())["failed"]) == ["ours-fp8"]


def test_what_is_compared_without_float8_is_run_all_the_same():
    missing = {"ours-fp8": "no Transformer Engine"}
    for asked in (["--ours", "ours,ours-fp8"], ["--ours", "ours", "--trl", ""], ["--ours", "ours"]):
        options = parse(asked)
        assert not gpu_contenders.nothing_to_compare(options, missing | dict.fromkeys(options.trl, "no TRL"))
    with pytest.raises(SystemExit):
        parse(["--ours", "ours-fp8", "--trl", ""])


def test_float8_configs_are_accepted_up_to_the_device(model, tmp_path):
    """With the benchmark's own config: packs' length, layers and recipe are checked before anything runs on a GPU."""
    for name, recipe in gpu_contenders.FLOAT8.items():
        sizes = {"steps": 6, "global_batch_pairs": 32, "micro_batch_pairs": 1}
        spec = gpu.Spec(data="pairs.jsonl", model=str(model), output_dir="", device="cuda", **sizes)
        settings = gpu.OurSettings(pack_tokens=4096, longest_tokens=2056, lean=True)
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(gpu.our_config(spec, settings, tmp_path / "logs")))
        cfg = load_config(path, gpu_contenders.OURS[name]["overrides"])
        assert cfg.policy.megatron_cfg.fp8_cfg.enabled and cfg.policy.megatron_cfg.fp8_cfg.fp8_recipe == recipe


def test_float8_is_held_to_a_hundredth_of_ours_loss(model):
    arch, lengths = read_architecture(model), np.array([[10, 5, 5]] * 8)
    recipes = gpu_contenders.FLOAT8
    found = [
        gpu_report.measured([one], arch, lengths, warmup_steps=1, pairs_per_step=4, share_prompt=True)
        for one in (outcome("ours", 2.0, 60), outcome("ours-fp8", 1.6, 60), outcome("ours-fp8-tensorwise", 1.0, 60))
    ]
    losses = {"ours": [0.69, 0.6], "ours-fp8": [0.69, 0.605], "ours-fp8-tensorwise": [0.69, math.nan]}
    blockwise, tensorwise = gpu_report.float8_beside(found, losses, recipes, 1e-2)
    assert (blockwise["speed_up"], tensorwise["speed_up"]) == (1.25, 2.0)
    assert blockwise["within"] and 0.008 < blockwise["losses_apart"] < 0.009
    assert not tensorwise["within"]
    losses["ours-fp8"] = [0.69, 0.61]
    assert not gpu_report.float8_beside(found, losses, recipes, 1e-2)[0]["within"]
    assert gpu_report.float8_beside(found[1:], losses, recipes, 1e-2) == []


class Clock:
    """Runs that take as long as they say, in a session of so many seconds."""

    def __init__(self, session_s, run_minutes=4.0, rounds=3):
        self.now, self.session_s, self.started = 0.0, session_s, []
        arguments = ["--trl", "", "--rounds", str(rounds), "--run-minutes", str(run_minutes)]
        self.options = parse([*arguments, "--model", "tiny"])

    def left_s(self):
        return self.session_s - self.now

    def contender(self, name, seconds, error=None):
        def start():
            self.started.append(name)
            limit = min(self.left_s(), 60 * self.options.run_minutes)
            self.now += min(seconds, limit)
            failed = "timed out" if seconds > limit else error
            return dataclasses.replace(outcome(name, 1.0, 10, failed), seconds=min(seconds, limit))

        return name, start


def held(monkeypatch, clock, *contenders, before=None):
    outcomes, failed, left_out, written = before or {}, {}, {}, []
    monkeypatch.setattr(gpu, "contenders", lambda job: list(contenders))

    def write():
        written.append({name: len(runs) for name, runs in outcomes.items()})

    gpu.run_rounds(clock, outcomes, failed, left_out, write)
    return failed, left_out, written


def test_whoever_the_time_does_not_suffice_for_is_named(monkeypatch):
    clock = Clock(100)
    failed, left_out, written = held(monkeypatch, clock, *(clock.contender(n, 40) for n in ("ours", "b", "c", "d")))
    assert clock.started == ["ours", "b"]  # 20 s are left, and nobody took less than 40
    assert failed == {} and sorted(left_out) == ["c", "d"] and "20 s were left, 40 needed" in left_out["c"]
    assert written[:2] == [{"ours": 1}, {"ours": 1, "b": 1}]  # after every run


def test_a_first_run_that_the_end_of_time_cuts_off_is_no_failure(monkeypatch):
    clock = Clock(100)
    failed, left_out, written = held(monkeypatch, clock, clock.contender("ours", 40), clock.contender("slow", 90))
    assert failed == {} and "the time was up" in left_out["slow"]
    assert written[-1]["ours"] == 1


def test_a_run_that_hangs_is_ended_and_the_others_still_run(monkeypatch):
    clock = Clock(1000, run_minutes=2.0, rounds=2)
    contenders = (
        clock.contender("hangs", 9999),
        clock.contender("ours", 40),
        clock.contender("breaks", 5, "no memory"),
    )
    failed, left_out, _ = held(monkeypatch, clock, *contenders)
    assert failed == {"hangs": "timed out", "breaks": "no memory"} and left_out == {}
    assert clock.started == ["hangs", "ours", "breaks", "ours"]


def test_a_call_goes_on_where_the_one_before_stopped(monkeypatch):
    clock = Clock(1000, rounds=2)
    before = {"ours": [outcome("ours", 1.0, 10)], "large": [outcome("large", 1.0, 10, OUT_OF_MEMORY)]}
    contenders = [clock.contender(name, 40) for name in ("ours", "large", "new")]
    failed, _, _ = held(monkeypatch, clock, *contenders, before=before)
    assert clock.started == ["new", "ours", "new"]
    assert failed == {"large": OUT_OF_MEMORY}


def test_a_file_of_results_is_whole_or_the_one_before(tmp_path):
    path = tmp_path / "result.json"
    gpu.save(path, {"runs": 1})
    with pytest.raises(TypeError):
        gpu.save(path, {"runs": object()})
    assert json.loads(path.read_text()) == {"runs": 1}


def test_ours_peak_is_the_largest_of_its_whole_life(monkeypatch, tmp_path):
    """megadpo resets torch's peak after every step; after the last one only the state is left."""
    peak = 0

    def reset(device=None):
        nonlocal peak
        peak = 20

    def three_steps(arguments):
        nonlocal peak
        for allocated in (30, 90, 50):
            peak = allocated
            watch._peak_bytes(torch.device("cuda", 0))
        return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: peak)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device=None: 2 * peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(reference, "compute_missing", reference.compute_missing)
    monkeypatch.setattr(commands, "main", three_steps)
    monkeypatch.setattr(sys, "argv", ["gpu_worker.py", str(tmp_path / "result.json"), "config.yaml"])
    assert gpu_worker.main() == 0
    content = json.loads((tmp_path / "result.json").read_text())
    assert (content["gpu_peak_allocated_bytes"], content["gpu_peak_reserved_bytes"]) == (90, 180)


def test_a_smoke_run_ends_well_without_trl(tmp_path, capsys):
    out = tmp_path / "result.json"
    arguments = ["--smoke", "--trl", "trl-mb1", "--trl-python", "/bin/false", "--out", str(out)]
    assert gpu.main(arguments) == 0, capsys.readouterr().err
    content = json.loads(out.read_text())
    (measured,) = content["measured"]
    assert measured["name"] == "ours" and measured["pairs_per_s"] > 0
    assert "TRL is not importable" in content["failed"]["trl-mb1"]
    assert content["machine"]["matrix_rate_tflops"] > 0 and content["command"]
    assert content["machine"]["sustained_matrix_rate_tflops"] > 0


def test_without_time_nothing_is_started(tmp_path, capsys, monkeypatch):
    rates = {"matrix_rate_tflops": 1.0, "sustained_matrix_rate_tflops": 1.0, "copy_rate_gbytes_per_s": 1.0}
    said = subprocess.CompletedProcess([], 0, stdout=json.dumps(gpu_machine.machine() | rates), stderr="")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: said)
    assert gpu.main(["--smoke", "--trl", "", "--minutes", "0.1", "--out", str(tmp_path / "r.json")]) == gpu.UNFINISHED
    assert "not started" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["measured"] == []


def test_the_heads_smoke_run_says_what_does_not_run(tmp_path, capsys):
    assert gpu_head.main(["--smoke", "--out", str(tmp_path / "head.json")]) == 0
    (result,) = json.loads((tmp_path / "head.json").read_text())["results"]
    assert result["heads"]["torch"]["both_ms"] > 0
    if not torch.cuda.is_available():
        assert "CUDA" in result["heads"]["triton"]["not_run"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
@pytest.mark.parametrize("command", [gpu.main, gpu_head.main])
def test_without_a_gpu_nothing_is_measured(command, capsys):
    assert command([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
