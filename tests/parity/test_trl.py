"""Five DPO steps against TRL's, as stored in stored.json: docs/compare_with_trl.md says how the figures were made.

The whole path takes part: tokenizing, packing, reference, loss, AdamW with weight decay, clipping, through the command
behind launch/train.py.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from benchmarks import parity_trl, sides
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import read_metrics, train

HH_DATA = sides.default_data()
NEEDS_HH = pytest.mark.skipif(
    not HH_DATA.exists(), reason=f"no {HH_DATA}: set MEGADPO_DATA to the folder that holds it"
)


def assert_same_as_trl(case_name: str, layout_name: str, folder: Path) -> None:
    case = parity_trl.CASES[case_name]
    spec = parity_trl.prepare(case, HH_DATA, folder)
    theirs = parity_trl.check_stored(case_name, spec)
    layout = parity_trl.LAYOUTS[layout_name]
    overrides = case.overrides + case.lora_overrides(spec.adapter)
    config = folder / "config.yaml"
    config.write_text(json.dumps(sides.our_config(spec, layout, folder / "logs", parity_trl.LONGEST_TOKENS)))
    ranks = layout.world_size
    assert run_distributed(train, ranks, str(config), overrides, init_process_group=False) == [0] * ranks
    ours = [sides.our_step(record) for record in read_metrics(folder / "logs")]
    lines, good = parity_trl.compare(theirs, ours, case.names)
    assert good, "\n".join(lines)


@pytest.mark.distributed
def test_one_process_on_made_pairs(tmp_path: Path) -> None:
    assert_same_as_trl("made-tiny", "one", tmp_path)


def test_lora_after_lora(tmp_path: Path) -> None:
    """TRL and peft go on with an adapter, and its first numbers are the reference's."""
    assert_same_as_trl("made-tiny-lora-trained", "one", tmp_path)


@pytest.mark.distributed
def test_lora_tensor_and_pipeline_parallel(tmp_path: Path) -> None:
    assert_same_as_trl("made-tiny-lora-new", "tp2pp2", tmp_path)


FAST = ("ipo", "alpha_divergence", "norm_ld_weighting")


@pytest.mark.distributed
@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(loss, marks=[] if loss in FAST else pytest.mark.slow)
        for loss in (*parity_trl.LOSSES, *parity_trl.DIVERGENCES, *parity_trl.COMBINED)
    ],
)
def test_other_losses_on_made_pairs(loss: str, tmp_path: Path) -> None:
    """Every one is held to its formula in tests/objective; here with all that is around it."""
    assert_same_as_trl(f"made-tiny-{loss}", "one", tmp_path)


@NEEDS_HH
@pytest.mark.distributed
def test_one_process_on_human_pairs(tmp_path: Path) -> None:
    assert_same_as_trl("hh-tiny", "one", tmp_path)


@pytest.mark.distributed
def test_tensor_and_pipeline_parallel_on_made_pairs(tmp_path: Path) -> None:
    assert_same_as_trl("made-tiny", "tp2pp2", tmp_path)


@pytest.mark.slow
@pytest.mark.distributed
@NEEDS_HH
def test_tensor_and_pipeline_parallel_on_human_pairs(tmp_path: Path) -> None:
    assert_same_as_trl("hh-tiny", "tp2pp2", tmp_path)


def test_other_weights_are_not_compared_with_stored_figures(tmp_path: Path) -> None:
    spec = parity_trl.prepare(parity_trl.CASES["made-tiny"], HH_DATA, tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match="weights_sha256"):
        parity_trl.check_stored("made-tiny", spec)


STEP = {"loss": 0.7, "grad_norm": 2.0, "logps/chosen": -100.0, "logps/rejected": -90.0}


@pytest.mark.parametrize("name", parity_trl.TOLERANCES)
def test_a_difference_beyond_the_tolerance_is_seen(name: str) -> None:
    ours = [dict(STEP), dict(STEP)]
    ours[1][name] *= 1 + 1.5 * parity_trl.TOLERANCES[name]
    lines, good = parity_trl.compare([STEP, STEP], ours)
    assert not good
    assert [name in line for line in lines if "BEYOND" in line] == [True]


def test_a_difference_within_the_tolerance_is_none() -> None:
    ours = [{name: value * (1 + 0.5 * parity_trl.TOLERANCES[name]) for name, value in STEP.items()}]
    assert parity_trl.compare([STEP], ours)[1]


def test_nan_and_missing_steps_are_differences() -> None:
    assert not parity_trl.compare([STEP], [copy.copy(STEP) | {"loss": float("nan")}])[1]
    assert not parity_trl.compare([STEP, STEP], [STEP])[1]
