"""Options without effect are noted."""

from __future__ import annotations

from megadpo.config import load_config

SMALL = "policy: {model_name: m}\ndata: {train_data_path: t.jsonl}\n"


IDLE = {
    "policy.megatron_cfg.optimizer.sgd_momentum": "0.5",
    "policy.megatron_cfg.optimizer.min_lr": "1.0e-7",
    "policy.megatron_cfg.scheduler.lr_decay_iters": "10",
    "policy.megatron_cfg.scheduler.lr_warmup_init": "1.0e-7",
    "policy.train_micro_batch_size": "4",
    "data.num_workers": "7",
    "dpo.val_at_end": "true",
}


def test_options_without_effect_are_noted_each(write):
    path = write("c.yaml", SMALL)
    notes = load_config(path, [f"{name}={value}" for name, value in IDLE.items()]).notes
    assert [note.split(": ")[0] for note in notes] == list(IDLE) and all("has no effect: " in note for note in notes)
    assert load_config(path).notes == ()
    off = ["policy.sequence_packing.enabled=false", "policy.train_micro_batch_size=4", "data.val_data_paths=v.jsonl"]
    assert load_config(path, [*off, "dpo.val_at_end=true"]).notes == ()
