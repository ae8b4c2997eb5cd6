"""Whole runs on other data than plain JSONL: formats told apart set by set, several turns, masks in the averages."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from megadpo.config.schema_dpo import DpoConfig
from megadpo.data.batches.pack import pack_pairs
from megadpo.data.pairs import TokenizedPair
from megadpo.rollouts.build import build_pairs
from megadpo.rollouts.options import BuildOptions
from megadpo.train.step import pair_loss
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import make_config, make_model, read_metrics, train
from tests.helpers.tiny_tokenizer import CHATML

ROOM = {"max_total_sequence_length": 200, "sequence_packing": {"train_mb_tokens": 400}}


def chat(number: int) -> dict[str, object]:
    """A row of PreferenceDataset whose better answer has three turns."""
    better = [
        {"role": "assistant", "content": f"sand {number}"},
        {"role": "user", "content": "what is it?"},
        {"role": "assistant", "content": "the sum"},
    ]
    worse = [{"role": "assistant", "content": f"the sea {number}"}]
    completions = [{"rank": 1, "completion": worse}, {"rank": 0, "completion": better}]
    return {"context": [{"role": "user", "content": f"at the shore {number}?"}], "completions": completions}


@pytest.mark.distributed
def test_validation_sets_of_three_formats_and_two_kinds_of_file(tmp_path):
    model = make_model(tmp_path / "model", max_position_embeddings=256)
    ranked, transcripts = tmp_path / "ranked.jsonl", tmp_path / "transcripts.parquet"
    ranked.write_text("".join(json.dumps(chat(n)) + "\n" for n in range(9)))
    hh = [{k: f"\n\nHuman: {n}?\n\nAssistant: {k} {n}" for k in ("chosen", "rejected")} for n in range(7)]
    pa.parquet.write_table(pa.Table.from_pylist(hh), transcripts)
    config = make_config(
        tmp_path,
        model,
        policy={"tokenizer": {"chat_template": CHATML}, **ROOM},
        data={"val_data_paths": {"ranked": str(ranked), "hh-rlhf": str(transcripts)}},
        dpo={"val_at_start": True, "val_period": 3, "val_batches": 0},
        checkpointing={"enabled": True, "metric_name": "validation-hh-rlhf_loss", "save_period": 3},
    )
    assert run_distributed(train, 2, str(config), [], init_process_group=False) == [0, 0]
    records = read_metrics(tmp_path / "logs")
    validated = [record for record in records if "timing/validation/total_validation_time" in record]
    assert [record["step"] for record in validated] == [0, 3]
    for record in validated:
        names = {key.split("/")[0] for key in record if key.startswith("validation-")}
        assert names == {"validation-held_out", "validation-ranked", "validation-hh-rlhf"}
        assert record["timing/validation/total_validation_time"] > 0
        assert all(math.isfinite(record[f"{name}/loss"]) for name in names)
    first = validated[0]
    assert first["validation-ranked/preference_loss"] == pytest.approx(math.log(2), abs=1e-6)
    saved = json.loads((tmp_path / "checkpoints/step_3/megadpo.json").read_text())
    assert saved["position"]["metrics"]["validation-hh-rlhf/loss"] == validated[-1]["validation-hh-rlhf/loss"]


@pytest.mark.distributed
def test_turns_in_the_loss_decide_what_is_learned_from(tmp_path):
    """With every differing turn in the loss, more tokens count: other losses from the same tokens in the same packs."""
    model = make_model(tmp_path / "model", max_position_embeddings=256)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(chat(n)) + "\n" for n in range(24)))
    runs = {}
    for loss_on in ("last_turn", "differing_turns"):
        folder = tmp_path / loss_on
        folder.mkdir()
        config = make_config(
            folder,
            model,
            policy={"tokenizer": {"chat_template": CHATML}, **ROOM},
            data={"train_data_path": str(rows), "val_data_paths": None, "loss_on": loss_on, "shuffle": False},
        )
        assert run_distributed(train, 1, str(config), [], init_process_group=False) == [0]
        runs[loss_on] = read_metrics(folder / "logs")[0]
    last, differing = runs["last_turn"], runs["differing_turns"]
    assert last["train/num_tokens"] == differing["train/num_tokens"]
    assert differing["train/logps/chosen"] < 1.5 * last["train/logps/chosen"] < 0
    assert differing["train/logps/rejected"] == pytest.approx(last["train/logps/rejected"], rel=1e-6)


def test_averages_divide_by_the_tokens_in_the_loss():
    mask = np.array([False, True, True, False, True])
    pair = TokenizedPair(0, *(np.arange(n, dtype=np.int32) for n in (3, 5, 4)), mask, None)
    batch = pack_pairs([pair], share_prompt=True, pad_to_multiple=8, pad_token_id=0)
    logps, reference = torch.tensor([-6.0, -8.0]), torch.tensor([-9.0, -4.0])
    cfg = dataclasses.replace(DpoConfig(), preference_average_log_probs=True, sft_average_log_probs=True)
    output = pair_loss(logps, reference, batch, cfg)
    margin = cfg.reference_policy_kl_penalty * ((-6.0 + 9.0) / 3 - (-8.0 + 4.0) / 4)
    torch.testing.assert_close(output.loss_sum, -torch.tensor(margin).sigmoid().log())
    assert output.metrics["sft_loss"][0] == pytest.approx(6.0 / 3)


TOOL_CHAT = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments.a }}){% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def rollout(task: int, right: bool) -> dict[str, object]:
    """A row as NeMo Gym writes it: thinks, calls a tool, reads what it says, answers."""
    said = {"type": "output_text", "text": f"it is {2 * task}" if right else "at sea"}
    calls = {
        "type": "function_call",
        "call_id": "c",
        "name": "twice",
        "arguments": json.dumps({"a": task + (not right)}),
    }
    return {
        "responses_create_params": {
            "input": [{"role": "user", "content": f"what is twice {task}?"}],
            "tools": [{"type": "function", "name": "twice", "parameters": {"type": "object"}}],
        },
        "response": {
            "output": [
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "sum"}]},
                calls,
                {"type": "function_call_output", "call_id": "c", "output": str(2 * task)},
                {"type": "message", "role": "assistant", "content": [said]},
            ]
        },
        "reward": float(right),
        "_ng_task_index": task,
    }


@pytest.mark.distributed
def test_pairs_built_from_rollouts_with_tools_train(tmp_path):
    """From rollouts to a step: the last turn alone in the loss, or the calls before it as well; never a tool's words."""
    rollouts, pairs = tmp_path / "rollouts.jsonl", tmp_path / "pairs.jsonl"
    rollouts.write_text("".join(json.dumps(rollout(n, right)) + "\n" for n in range(24) for right in (True, False)))
    build_pairs([rollouts], pairs, BuildOptions())
    model = make_model(tmp_path / "model", max_position_embeddings=512)
    room = {"max_total_sequence_length": 400, "sequence_packing": {"train_mb_tokens": 800}}
    first = {}
    for loss_on in ("last_turn", "differing_turns"):
        folder = tmp_path / loss_on
        folder.mkdir()
        config = make_config(
            folder,
            model,
            policy={"tokenizer": {"chat_template": TOOL_CHAT}, **room},
            data={"train_data_path": str(pairs), "val_data_paths": None, "loss_on": loss_on, "shuffle": False},
        )
        assert run_distributed(train, 1, str(config), [], init_process_group=False) == [0]
        steps = read_metrics(folder / "logs")
        assert len(steps) == 3 and all(math.isfinite(step["train/grad_norm"]) for step in steps)
        first[loss_on] = steps[0]
    last, differing = first["last_turn"], first["differing_turns"]
    assert last["train/preference_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert differing["train/logps/chosen"] < 1.2 * last["train/logps/chosen"] < 0
