"""`megadpo evaluate`: the numbers of training's own validation, in any layout, and each pair's logps in file order."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
import torch

from tests.helpers.distributed import run_distributed
from tests.helpers.overrides import CP2, PP2, SP, TP2, VPP2
from tests.helpers.runs import evaluate, make_config, make_model, read_metrics, train


def evaluate_and_read(config, overrides):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = evaluate(config, overrides)
    return code, printed.getvalue()


def pairs(folder):
    return [json.loads(line) for line in (folder / "logs/pairs-held_out.jsonl").read_text().splitlines()]


@pytest.mark.distributed
def test_evaluation_equals_validation_and_file_order(tmp_path):
    model = make_model(tmp_path / "model")
    config = make_config(
        tmp_path,
        model,
        dpo={"val_at_end": True, "val_batches": 0, "max_num_steps": 2},
        checkpointing={"enabled": True, "save_period": 1},
    )
    assert run_distributed(train, 1, str(config), [], init_process_group=False) == [0]
    trained = read_metrics(tmp_path / "logs")[-1]
    checkpoint = tmp_path / "checkpoints/step_2"
    named = [f"policy.model_name={checkpoint}", f"dpo.reference.model_name={model}"]
    codes = run_distributed(evaluate, 4, str(config), [*named, TP2, SP, PP2, VPP2], init_process_group=False)
    assert codes == [0] * 4
    metrics = json.loads((tmp_path / "logs/evaluation.json").read_text())
    for name in ("loss", "preference_loss", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert metrics[f"validation-held_out/{name}"] == pytest.approx(
            trained[f"validation-held_out/{name}"], rel=2e-5, abs=1e-6
        )
    every_checkpoint = ["--checkpoint", str(tmp_path / "checkpoints"), named[1], TP2]
    ((code, printed), *_) = run_distributed(
        evaluate_and_read, 2, str(config), every_checkpoint, init_process_group=False
    )
    assert code == 0, printed
    for step in (1, 2):
        one = json.loads((tmp_path / f"logs/step_{step}/evaluation.json").read_text())
        margins = one["validation-held_out/rewards/margins"]
        assert (margins == pytest.approx(metrics["validation-held_out/rewards/margins"], rel=1e-5)) == (step == 2)
        assert f"step_{step}" in printed and f"{margins:.4f}" in printed
    four_ranks = pairs(tmp_path)
    assert [row["index"] for row in four_ranks] == list(range(11))

    codes = run_distributed(evaluate, 4, str(config), [*named, CP2, TP2], init_process_group=False)
    assert codes == [0] * 4
    for a, b in zip(pairs(tmp_path), four_ranks, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)

    assert run_distributed(evaluate, 2, str(config), named[:1], init_process_group=False) == [0, 0]
    alone = pairs(tmp_path)
    assert all(row["reference_chosen_logps"] is None for row in alone)
    assert "validation-held_out/rewards/margins" not in json.loads((tmp_path / "logs/evaluation.json").read_text())
    free = [named[0], "dpo.loss_type=cpo", "dpo.reference.mode=none"]
    assert run_distributed(evaluate, 1, str(config), free, init_process_group=False) == [0]
    of_the_policy = json.loads((tmp_path / "logs/evaluation.json").read_text())
    margins = of_the_policy["validation-held_out/logps/margins"]
    assert of_the_policy["validation-held_out/rewards/margins"] == pytest.approx(0.1 * margins, rel=1e-5)
    assert of_the_policy["validation-held_out/loss"] > 0
    for a, b in zip(four_ranks, alone, strict=True):
        torch.testing.assert_close(a["policy_chosen_logps"], b["policy_chosen_logps"], rtol=1e-5, atol=1e-4)


@pytest.mark.distributed
def test_log_dir_that_cannot_be_written_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("in the way")
    config = make_config(tmp_path, make_model(tmp_path / "model"), logger={"log_dir": str(tmp_path / "file/logs")})
    assert run_distributed(evaluate, 1, str(config), [], init_process_group=False) == [2]


def test_what_is_not_finite_is_null(tmp_path):
    from megadpo.train.evaluation import PairScore, write_scores

    write_scores(tmp_path / "pairs.jsonl", [PairScore(0, 0, float("nan"), -1.0, float("-inf"), None)])
    text = (tmp_path / "pairs.jsonl").read_text()
    assert list(json.loads(text).values()) == [0, 0, None, -1.0, None, None]
