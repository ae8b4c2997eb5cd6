"""The search over layouts: what it finds, in which order, and what it says where nothing fits."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megadpo.commands import main
from megadpo.config.check import layers_per_stage
from megadpo.config.grid import Grid
from megadpo.plan.suggest import Candidate, divisions
from tests.plan.cases import LLAMA_30M, MIXTRAL, write_case

MEG = "policy.megatron_cfg"
LLAMA_405B = {
    **LLAMA_30M,
    "hidden_size": 16384,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "intermediate_size": 53248,
    "vocab_size": 128256,
}


@pytest.fixture
def small(tmp_path):
    return write_case(tmp_path / "case", LLAMA_30M, device="auto", sequence_packing={"train_mb_tokens": 2048})


def test_no_suggestions_are_refused(small, capsys):
    assert main(["plan", small, "--world-size", "1", "--suggest", "0"]) == 2
    assert "--suggest: got 0; expected 1 or more" in capsys.readouterr().err


def test_suggestions_are_ranked_and_can_be_pasted(small, capsys, tmp_path):
    picture = tmp_path / "layout.svg"
    arguments = [small, "--world-size", "4", "--lengths", "300,106,106", "--json", "--picture", str(picture)]
    assert main(["plan", *arguments, "--suggest", "2"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["gpu"]["name"] == "h100" and printed["assumptions"]["reserve_gib"] == 3
    found = printed["suggestions"]
    peaks = [max(stage["peak_bytes"] for stage in one["stages"]) for one in found]
    assert [round(20 * one["needed_share"]) for one in found] == [20, 20]
    assert found[0]["layout"]["data_parallel"] == 4 and found[1]["layout"]["tensor_parallel"] == 2
    assert main(["plan", small, "--world-size", "4", "--lengths", "300,106,106", "--json", *found[0]["overrides"]]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][0]["peak_bytes"] == peaks[0]
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
    assert main(["plan", *arguments, "--lengths", "8192,8192,8192"]) == 0
    layouts = [one["layout"] for one in json.loads(capsys.readouterr().out)["suggestions"]]
    assert any(layout["expert_parallel"] > 1 for layout in layouts)
    assert any(layout["context_parallel"] > 1 for layout in layouts)
    assert any(layout["virtual_pipeline"] > 1 for layout in layouts)


def test_layers_that_no_depth_divides_get_shorter_ends(tmp_path, capsys):
    """Llama-3.1-405B on 512 ranks: 126 layers, and no number of stages that divides both lets it fit. 16 stages do, of 8
    layers but 7 at the ends."""
    sizes = {"train_global_batch_size": 128, "sequence_packing": {"train_mb_tokens": 8192}}
    path = write_case(tmp_path / "case", LLAMA_405B, device="auto", **sizes)
    arguments = [path, "--world-size", "512", "--lengths", "512,384,384", "--json"]
    arguments.append(f"{MEG}.optimizer.use_distributed_optimizer=true")
    assert main(["plan", *arguments, "--suggest", "1"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["suggestions"]
    layers = [stage["layers"] for stage in found["stages"]]
    assert sum(layers) == 126 and len(set(layers)) > 1
    assert main(["plan", *arguments, *found["overrides"]]) == 0
    assert (1, 7, 7) in divisions(126, 16)


@given(st.integers(1, 130), st.integers(1, 64))
def test_a_division_of_layers_is_one_that_the_config_accepts(layers, stages):
    """Every layer once, in whole chunks, as many in all stages but the ends, which have no more."""
    for chunks, first, last in divisions(layers, stages):
        cfg = SimpleNamespace(policy=SimpleNamespace(megatron_cfg=SimpleNamespace()))
        cfg.policy.megatron_cfg.pipeline_model_parallel_size = stages
        cfg.policy.megatron_cfg.num_layers_in_first_pipeline_stage = first
        cfg.policy.megatron_cfg.num_layers_in_last_pipeline_stage = last
        counts = layers_per_stage(cfg, layers)
        assert counts is not None and sum(counts) == layers and len(counts) == stages
        assert all(count > 0 and count % chunks == 0 for count in counts)
        assert len(set(counts[1:-1])) <= 1 and (stages < 3 or max(counts) == counts[1])


def test_the_order_is_by_counts():
    """What the module's docstring says, one line after another; the first of each pair is better in that only."""
    better_and_worse = [
        ({"grid": Grid(tensor=8), "needed_share": 0.1}, {"grid": Grid(tensor=2, context=8), "needed_share": 1.0}),
        ({"grid": Grid(expert=8), "needed_share": 0.1}, {"grid": Grid(expert=16), "needed_share": 1.0}),
        ({"grid": Grid(tensor=8), "needed_share": 0.95}, {"grid": Grid(tensor=1), "needed_share": 0.85}),
        ({"grid": Grid(tensor=2), "needed_share": 0.94}, {"grid": Grid(tensor=4), "needed_share": 0.95}),
        ({"grid": Grid(tensor=2, expert=2)}, {"grid": Grid(tensor=2, expert=4)}),
        ({"grid": Grid(pipeline=4)}, {"grid": Grid(pipeline=2, virtual_pipeline=4)}),
        ({"peak": 1}, {"peak": 2}),
    ]
    for better, worse in better_and_worse:
        assert candidate(**better).order(8) < candidate(**worse).order(8)


def candidate(**given):
    fields = {"cfg": None, "grid": Grid(), "overrides": (), "needed_share": 1.0, "static": 0, "peak": 0}
    return Candidate(**(fields | given))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["--assume", "reserve_gib=73.5", "policy.sequence_packing.train_mb_tokens=262144"],
            ["GiB per rank; the smallest, tensor", "fix: lower policy.sequence_packing.train_mb_tokens"],
        ),
        (["--assume", "reserve_gib=74.505"], ["weights, gradients, optimizer and reference; fix: raise --world-size"]),
        (
            ["policy.sequence_packing.train_mb_tokens=1024", "--lengths", "900,90,90"],
            ["for which this model has a layout; the first refusal", "at least a pair's 1080 tokens"],
        ),
    ],
)
def test_where_nothing_fits_the_nearest_is_named(small, capsys, arguments, told):
    assert main(["plan", small, "--world-size", "2", *arguments, "--suggest"]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in told), message
