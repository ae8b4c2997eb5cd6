"""The plan's arithmetic against counting by hand, its refusals, its outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megadpo.config.load import load_config
from megadpo.config.problems import ConfigError
from megadpo.data.batches.pack import pack_pairs
from megadpo.data.batches.work import query_keys
from megadpo.data.pairs import TokenizedPair
from megadpo.plan.activations import Estimate, FullPack
from megadpo.plan.flops import forward_flops
from megadpo.plan.freezing import trainable_share
from megadpo.plan.gpus import GPUS, Assumptions, parse_assumptions
from megadpo.plan.grid import Grid
from megadpo.plan.packs import Pack, full_pack, pack_tokens, packed_lengths, stated_lengths, workload
from megadpo.plan.parameters import optimizer_bytes_per_element, stage_buffers, stage_parameters
from megadpo.plan.plan import Job
from megadpo.plan.source import architectures, model_folder
from megadpo.plan.timing import TimeModel
from megadpo.plan.trace import trace_stage
from tests.plan.cases import LLAMA_30M, MIXTRAL, QWEN2_MOE, SMALL, write_case
from tools.plan import main

REPOSITORY = Path(__file__).resolve().parents[2]
MEG = "policy.megatron_cfg"
LENGTHS = st.lists(st.tuples(*[st.integers(1, 40)] * 3), min_size=1, max_size=6)


@pytest.fixture
def small(tmp_path):
    return write_case(tmp_path / "case", LLAMA_30M, device="auto", sequence_packing={"train_mb_tokens": 2048})


@given(LENGTHS, st.booleans())
def test_tokens_and_attention_of_a_pack_are_those_of_its_segments(lengths, share_prompt):
    rows = np.array(lengths, dtype=np.int64)
    pairs = [TokenizedPair(i, *(np.zeros(n, dtype=np.int32) for n in row)) for i, row in enumerate(lengths)]
    pack = pack_pairs(pairs, share_prompt=share_prompt, pad_to_multiple=1, pad_token_id=0)
    seen = sum(s.key_tokens - i for s in pack.segments for i in range(s.query_tokens))
    assert query_keys(rows, share_prompt=share_prompt).sum() == seen
    assert packed_lengths(rows, share_prompt=share_prompt).sum() == pack.num_tokens


@given(st.tuples(*[st.integers(1, 900)] * 3), st.integers(1030, 9000), st.booleans())
def test_a_full_pack_fills_the_budget_to_the_last_token(tmp_path_factory, row, budget, share_prompt):
    path = tmp_path_factory.mktemp("pack")
    packing = {"train_mb_tokens": budget, "share_prompt": share_prompt}
    cfg = load_config(write_case(path / "case", SMALL, sequence_packing=packing))
    pack = full_pack(cfg, np.array([row], dtype=np.int64))
    assert packed_lengths(pack, share_prompt=share_prompt).sum() == pack_tokens(cfg) and pack.min() > 0


@pytest.mark.parametrize(("tp", "ep", "recompute"), [(1, 1, "none"), (1, 4, "none"), (2, 2, "none"), (1, 2, "full")])
def test_the_search_estimates_experts_as_they_are_counted(tmp_path, tp, ep, recompute):
    """Saved bytes within 8%, the peak within 15%."""
    model = {**LLAMA_30M, **MIXTRAL, "num_local_experts": 8, "hidden_size": 512, "intermediate_size": 688}
    path = write_case(tmp_path / "case", model, device="auto", sequence_packing={"train_mb_tokens": 2048})
    sizes = {"tensor_model_parallel_size": tp, "expert_model_parallel_size": ep}
    overrides = [f"{MEG}.{name}={size}" for name, size in sizes.items()]
    overrides += [f"{MEG}.sequence_parallel=true"] if tp > 1 else []
    overrides += [f"{MEG}.activation_checkpointing=true"] if recompute == "full" else []
    cfg = load_config(path, overrides)
    arch, _ = architectures(cfg)
    lengths = full_pack(cfg, np.array([[300, 106, 106]]))
    (counted,) = trace_stage(cfg, arch, None, lengths, world_size=4, stage=0, device_type="cuda").chunks
    foretold = Estimate(cfg, arch, FullPack.of(cfg, lengths)).chunk(arch.num_layers, last=True)
    assert foretold.saved == pytest.approx(counted.saved, rel=0.08)
    assert foretold.backward_peak == pytest.approx(max(counted.forward_peak, counted.backward_peak), rel=0.15)


def test_uneven_experts_take_memory_in_proportion(tmp_path):
    """Twice the tokens at this rank's experts: what every layer keeps of them doubles, and nothing else grows."""
    path = write_case(tmp_path / "case", MIXTRAL, device="auto", sequence_packing={"train_mb_tokens": 2048})
    cfg = load_config(path, [f"{MEG}.expert_model_parallel_size=4"])
    arch, _ = architectures(cfg)
    lengths = full_pack(cfg, np.array([[300, 106, 106]]))
    saved = [
        trace_stage(cfg, arch, None, lengths, world_size=4, stage=0, device_type="cuda", expert_load=load)
        .chunks[0]
        .saved
        for load in (1.0, 2.0)
    ]
    rows = 2048 * 2  # as many come to one expert of four as go out: each token's two choices, from four ranks
    each = 72 + 3 * 200  # the row itself, both sides of SwiGLU and their product's input
    assert saved[1] - saved[0] == pytest.approx(4 * rows * each * 2, rel=0.1)


def test_flops_of_experts_are_those_that_a_token_goes_to(tmp_path):
    model = {**QWEN2_MOE, "num_experts": 4, "num_experts_per_tok": 3}
    arch, _ = architectures(load_config(write_case(tmp_path / "case", model)))
    flops = forward_flops(arch, Pack(tokens=10, answer_tokens=4, attention=0), layers=2, head=False)
    assert flops.experts == 2 * 10 * 2 * 3 * (3 * 72 * 104)
    assert flops.matmul == 2 * 10 * 2 * (72 * 18 * (2 * 4 + 2 * 2) + 3 * 72 * 56)
    assert flops.router == 2 * 10 * 2 * 72 * 4


def test_frozen_weights_cost_no_gradient(small):
    everything, frozen = time_of(small, [], 1), time_of(small, [], 1, trainable=0.25)
    assert frozen.flops < everything.flops and frozen.train_s < 0.87 * everything.train_s
    arch, _ = architectures(load_config(small))
    assert trainable_share(arch, ()) == 1.0
    layers = trainable_share(arch, ["model.layers.*"])
    assert layers == pytest.approx((2 * 8192 * 512 + 512) / 31_500_000, rel=0.02)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_search_estimates_activations_as_they_are_counted(small, recompute):
    """Saved bytes within 3%, the peak of one micro-batch within 15%, where it is only used to choose what to build."""
    overrides = [f"{MEG}.pipeline_model_parallel_size=2", f"{MEG}.activation_checkpointing={recompute != 'none'}"]
    cfg = load_config(small, [override.replace("True", "true").replace("False", "false") for override in overrides])
    arch, _ = architectures(cfg)
    lengths = full_pack(cfg, np.array([[300, 106, 106]]))
    for stage in (0, 1):
        (counted,) = trace_stage(cfg, arch, None, lengths, world_size=2, stage=stage, device_type="cuda").chunks
        foretold = Estimate(cfg, arch, FullPack.of(cfg, lengths)).chunk(4, last=stage == 1)
        assert foretold.saved == pytest.approx(counted.saved, rel=0.03)
        assert foretold.backward_peak == pytest.approx(max(counted.forward_peak, counted.backward_peak), rel=0.15)


def time_of(path, overrides, world, gpu="h100", trainable=1.0, **assumed):
    cfg = load_config(path, overrides)
    arch, reference = architectures(cfg)
    lengths, said = stated_lengths(cfg, (300, 106, 106))
    model = TimeModel(cfg, arch, reference, GPUS[gpu], Assumptions(**assumed), world, trainable)
    grid = Grid.of(cfg, world)
    buffers = [
        stage_buffers(
            stage_parameters(arch, grid, stage=stage, layers=arch.num_layers // grid.pipeline),
            cfg.policy.megatron_cfg,
            grid,
            first_stage=stage == 0,
        )
        for stage in range(grid.pipeline)
    ]
    return model.step(workload(cfg, arch, lengths, said, dp=grid.data), buffers)


def test_flops_of_a_step_by_hand(small):
    """8 pairs, each 512 tokens: forward 2 FLOPs a weight, backward twice that, the reference once more: four times."""
    weights = 8 * 512 * (2 * 512 + 2 * 256 + 3 * 1376)
    attention = 4 * 512 * 8 * (300 * 301 // 2 + 2 * (106 * 300 + 106 * 107 // 2))
    by_hand = 4 * 8 * (2 * 512 * weights + attention + 2 * 212 * 512 * 8192)
    assert time_of(small, [], 1).flops == by_hand
    alone = ["dpo.reference.mode=none", "dpo.preference_loss_weight=0", "dpo.sft_loss_weight=1"]
    assert time_of(small, alone, 1).flops == by_hand * 3 / 4


def test_the_bubble_is_that_of_1f1b(small):
    """Equal stages but for the head: (p - 1) / (m + p - 1) bounds it from above."""
    overrides = [f"{MEG}.pipeline_model_parallel_size=2", "policy.sequence_packing.train_mb_tokens=1024"]
    bubble = time_of(small, overrides, 2).bubble
    assert 0.5 * 1 / (4 + 1) < bubble <= 1 / (4 + 1)
    assert time_of(small, [], 1).bubble == 0


def test_recomputation_and_slower_networks_cost_time(small):
    plain = time_of(small, [], 2)
    assert time_of(small, [f"{MEG}.activation_checkpointing=true"], 2).train_s > 1.2 * plain.train_s
    assert time_of(small, [], 2, gpus_per_node=1).data_parallel_s > 5 * plain.data_parallel_s > 0
    assert time_of(small, [], 2, gpu="a100").train_s > plain.train_s


def test_lengths_come_from_data_where_it_is_read(tmp_path, capsys):
    from tests.helpers.runs import make_config, make_model

    path = make_config(tmp_path, make_model(tmp_path / "model"))
    assert main([str(path), "--world-size", "1", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert "train.jsonl, 40 pairs" in plan["lengths"] and plan["pairs_per_step"] == 8
    assert 8 * 3 < plan["tokens_per_step"] < 8 * 100


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--world-size", "0"], ["--world-size"]),
        (["--assume", "magic=1", "--assume", "matmul_efficiency=7"], ["magic=1", "--assume matmul_efficiency"]),
        (["--picture", "a.jpeg"], ["--picture"]),
        (["--lengths", "5,5"], ["--lengths"]),
        (["--lengths", "4000,50,50"], ["--lengths", "at most 1024"]),
        ([f"{MEG}.tensor_model_parallel_size=3"], ["a divisor of the model's 8 attention heads", "3 x 1"]),
        (["policy.train_global_batch_size=1"], ["at least 2 pairs"]),
        (["policy.attention_kernel=cpu"], ["policy.attention_kernel"]),
        (["policy.model_name=nobody/nothing"], ["put the model's config.json into a folder"]),
        (["policy.sequence_packing.train_mb_tokens=1024", "--lengths", "900,90,90"], ["train_mb_tokens"]),
        (["policy.device=cpu", "--gpu", "h100"], ["policy.device"]),
        ([f"{MEG}.expert_model_parallel_size=2"], ["has no experts"]),
        ([f"{MEG}.context_parallel_size=3"], ["1 x 1 x 3"]),
        (["policy.freeze=[model.nothing]"], ["policy.freeze", "model.nothing"]),
        (
            [f"{MEG}.fp8_cfg.enabled=true", f"{MEG}.transformer_impl=transformer_engine"],
            ["fp8_cfg.enabled", "plan in bfloat16"],
        ),
        (
            [
                f"{MEG}.optimizer.use_precision_aware_optimizer=true",
                f"{MEG}.optimizer.optimizer_cpu_offload=true",
                f"{MEG}.optimizer.optimizer_offload_fraction=0.5",
            ],
            ["optimizer_cpu_offload", "not planned"],
        ),
    ],
)
def test_what_would_fail_is_refused_with_the_fix(small, capsys, arguments, told):
    world = [] if "--world-size" in arguments else ["--world-size", "2"]
    assert main([small, *world, *arguments]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in told) and "fix: " in message


def test_too_little_memory_is_refused_after_it_was_shown(small, capsys):
    assert main([small, "--world-size", "1", "--assume", "reserve_gib=74"]) == 2
    shown = capsys.readouterr()
    assert "peak" in shown.out and "activation_checkpointing: true" in shown.err and "pipeline stage 0" in shown.err


def test_no_suggestions_are_refused(small, capsys):
    assert main([small, "--world-size", "1", "--suggest", "0"]) == 2
    assert "--suggest: got 0; expected 1 or more" in capsys.readouterr().err


def test_suggestions_are_ranked_and_can_be_pasted(small, capsys, tmp_path):
    picture = tmp_path / "layout.svg"
    arguments = [small, "--world-size", "4", "--lengths", "300,106,106", "--json", "--picture", str(picture)]
    assert main([*arguments, "--suggest", "2"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["gpu"]["name"] == "h100" and printed["assumptions"]["reserve_gib"] == 3
    found = printed["suggestions"]
    times = [one["expected"]["step_s"] for one in found]
    assert len(found) == 2 and times == sorted(times)
    assert found[0]["layout"] != found[1]["layout"]
    assert main([small, "--world-size", "4", "--lengths", "300,106,106", "--json", *found[0]["overrides"]]) == 0
    assert json.loads(capsys.readouterr().out)["expected"]["step_s"] == times[0]
    assert picture.read_text().lstrip().startswith("<?xml")


def test_suggestions_share_out_experts_and_long_packs(tmp_path, capsys):
    """16 GB of states of a model with experts, and pairs of 16,384 tokens, on a GPU with little room left."""
    model = {**LLAMA_30M, **MIXTRAL, "hidden_size": 1024, "intermediate_size": 2048, "max_position_embeddings": 32768}
    path = write_case(
        tmp_path / "case",
        {**model, "num_local_experts": 8, "num_hidden_layers": 16},
        device="auto",
        max_total_sequence_length=16384,
        sequence_packing={"train_mb_tokens": 32768},
    )
    arguments = [path, "--world-size", "8", "--json", "--assume", "reserve_gib=67", "--suggest", "8"]
    assert main([*arguments, "--lengths", "8192,8192,8192"]) == 0
    layouts = [one["layout"] for one in json.loads(capsys.readouterr().out)["suggestions"]]
    assert any(layout["expert_parallel"] > 1 for layout in layouts)
    assert any(layout["context_parallel"] > 1 for layout in layouts)
    assert any(layout["virtual_pipeline"] > 1 for layout in layouts)


def test_the_precision_aware_optimizer_keeps_less(small):
    """Of a bfloat16 weight the two bytes that are missing, and moments as wide as the config says; else 12 bytes."""
    aware = [f"{MEG}.optimizer.use_precision_aware_optimizer=true", "checkpointing.enabled=false"]
    narrow = [f"{MEG}.optimizer.exp_avg_dtype=bfloat16", f"{MEG}.optimizer.exp_avg_sq_dtype=bfloat16"]
    for overrides, width in (([], 12), (aware, 10), ([*aware, *narrow], 6)):
        assert optimizer_bytes_per_element(load_config(small, overrides).policy.megatron_cfg, bf16=True) == width


def test_a_hub_name_is_fetched_without_weights(monkeypatch, tmp_path):
    import huggingface_hub

    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda name, file: asked.append((name, file)) or tmp_path / "config.json"
    )
    assert model_folder("some/model", "policy.model_name") == tmp_path
    assert asked == [("some/model", "config.json")]


def test_assumptions_are_numbers_with_names():
    assert parse_assumptions(["reserve_gib=1.5"]) == Assumptions(reserve_gib=1.5)
    with pytest.raises(ConfigError, match="nvlink_efficiency"):
        parse_assumptions(["nvlink_efficiency=fast"])


def test_job_is_bf16_by_precision(small):
    cfg = load_config(small, ["policy.precision=float32"])
    arch, _ = architectures(cfg)
    job = Job(
        cfg=cfg,
        arch=arch,
        reference=None,
        world_size=1,
        gpu=None,
        assumed=Assumptions(),
        lengths=np.ones((8, 3), dtype=np.int64),
        said="",
    )
    assert not job.bf16


def test_a_plan_is_made_beside_a_gpu_too(small, monkeypatch, capsys):
    """A plan's groups talk to nobody, so it must not ask for those that training has on GPUs only."""
    from megadpo.parallel.cpu import enable_cpu

    enable_cpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main([str(small), "--world-size", "2", f"{MEG}.optimizer.use_distributed_optimizer=true"]) == 0
    assert "GiB" in capsys.readouterr().out
