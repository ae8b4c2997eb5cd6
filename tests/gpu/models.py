"""A model of a size that float8 takes, and float64 answers for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.helpers.runs import VOCAB
from tests.helpers.tiny_tokenizer import tiny_tokenizer

LAYERS, HIDDEN = 4, 512


def make_gpu_model(folder: Path, case: str = "llama") -> Path:
    """4 layers, hidden size 512, initialised as transformers does (0.02), saved in bfloat16. Every side of its linear
    layers is a multiple of 128."""
    import transformers

    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 1024,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    }
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[case]
    if case == "qwen3":
        sizes["head_dim"] = 64
    torch.manual_seed(0)
    model(config(**sizes)).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer(vocab_size=VOCAB).save_pretrained(folder)
    return folder


def float64_logps_and_gradients(folder, pairs, weights):
    """[2P] float64 answer logps, and d (logps . weights) / d parameter by Hugging Face name; transformers, on the CPU,
    each sequence alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    total, sums = torch.zeros((), dtype=torch.float64), []
    for pair in pairs:
        for answer in (pair.chosen_ids, pair.rejected_ids):
            ids = torch.from_numpy(np.concatenate([pair.prompt_ids, answer])).long()[None]
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-len(answer) :, 0]
            total = total + logps.sum() * weights[len(sums)]
            sums.append(logps.sum().detach())
    total.backward()
    return torch.stack(sums), {name: parameter.grad for name, parameter in model.named_parameters()}
