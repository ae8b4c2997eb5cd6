"""The command line against the file: it wins in the other key that says the same, too."""

from __future__ import annotations

import pytest

from megadpo.config import ConfigError, load_config

MEG = "policy.megatron_cfg"
BASE = """
policy:
  model_name: some/model
  precision: bfloat16
  max_grad_norm: 1.0
  max_total_sequence_length: 512
  megatron_cfg:
    pipeline_dtype: bfloat16
    fused_linear_logprobs_chunk_size: 256
    optimizer: {weight_decay: 0.1, clip_grad: 1.0, bf16: true}
    scheduler: {start_weight_decay: 0.1, end_weight_decay: 0.1}
data:
  max_input_seq_length: 512
  train: {dataset_name: BinaryPreferenceDataset, data_path: theirs.jsonl}
  validation: {dataset_name: BinaryPreferenceDataset, data_path: theirs_too.jsonl}
"""
DECAY = f"{MEG}.optimizer.weight_decay"
GIVES_WAY = [
    # the command line, the keys of the file that it outdoes, what comes of it
    ([f"{DECAY}=0"], [f"{MEG}.scheduler.start_weight_decay", f"{MEG}.scheduler.end_weight_decay"],
     lambda cfg: cfg.policy.megatron_cfg.scheduler.start_weight_decay == 0),
    (["data.train_data_path=mine.jsonl"], ["data.train"], lambda cfg: cfg.data.train_data_path == "mine.jsonl"),
    (["data.val_data_paths={a: mine.jsonl}"], ["data.validation"],
     lambda cfg: cfg.data.val_data_paths == {"a": "mine.jsonl"}),
    (["policy.max_grad_norm=2.0"], [f"{MEG}.optimizer.clip_grad"],
     lambda cfg: cfg.policy.megatron_cfg.optimizer.clip_grad == 2.0),
    (["policy.precision=float32"], [f"{MEG}.pipeline_dtype", f"{MEG}.optimizer.bf16"],
     lambda cfg: not cfg.policy.megatron_cfg.optimizer.bf16),
    (["policy.logprob_chunk_size=64"], [f"{MEG}.fused_linear_logprobs_chunk_size"],
     lambda cfg: cfg.policy.logprob_chunk_size == 64),
    (["policy.max_total_sequence_length=128"], ["data.max_input_seq_length"],
     lambda cfg: cfg.data.max_input_seq_length == 128),
    (["policy.max_total_sequence_length=1024"], [], lambda cfg: cfg.data.max_input_seq_length == 512),
    ([f"{DECAY}=0.1", "policy.precision=bfloat16"], [], lambda cfg: True),
    ([f"{MEG}.optimizer={{weight_decay: 0.3}}"],
     [f"{MEG}.scheduler.start_weight_decay", f"{MEG}.scheduler.end_weight_decay"],
     lambda cfg: cfg.policy.megatron_cfg.scheduler.end_weight_decay == 0.3),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "outdone", "holds"), GIVES_WAY, ids=[" ".join(one[0])[:60] for one in GIVES_WAY])
def test_what_gives_way(overrides, outdone, holds, write):
    cfg = load_config(write("c.yaml", BASE), overrides)
    assert holds(cfg)
    notes = [note for note in cfg.notes if "gives way" in note]
    assert [note.partition(":")[0] for note in notes] == outdone
    assert all("of the command line" in note for note in notes)


def test_the_other_way_round(write):
    cfg = load_config(write("c.yaml", BASE.replace("train: {dataset_name: BinaryPreferenceDataset, data_path: theirs.jsonl}",
                                                   "train_data_path: theirs.jsonl")),
                      ["data.train.data_path=mine.jsonl"])  # fmt: skip
    assert cfg.data.train_data_path == "mine.jsonl"
    assert "data.train_data_path: 'theirs.jsonl' of the file gives way" in " ".join(cfg.notes)


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{DECAY}=0", f"{MEG}.scheduler.end_weight_decay=0.1"],
        ["data.train_data_path=a.jsonl", "data.train={data_path: b.jsonl}"],
    ],
)
def test_two_words_of_the_command_line_do_not_outdo_each_other(overrides, write):
    with pytest.raises(ConfigError):
        load_config(write("c.yaml", BASE), overrides)


def test_a_schedule_of_weight_decay_stands(write):
    text = BASE.replace("end_weight_decay: 0.1", "end_weight_decay: 0.2, weight_decay_incr_style: linear")
    cfg = load_config(write("c.yaml", text), [f"{DECAY}=0"])
    schedule = cfg.policy.megatron_cfg.scheduler
    assert (schedule.start_weight_decay, schedule.end_weight_decay) == (0.1, 0.2)
