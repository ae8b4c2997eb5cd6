"""Make a small Llama with random weights, and a BPE tokenizer trained on a file of pairs, in Hugging Face's format.

    python benchmarks/make_llama.py --data pairs.jsonl --out DIR --size small

The same arguments give the same bits on every machine: weights are drawn uniformly (torch's CPU generator gives the same
uniform numbers with and without AVX, which is not true of its normal ones), tensor by tensor, from (seed, tensor index).
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
MOST_TOKENS = 8192
"""Of the tokenizer: more would be whole words of a small file of pairs, and sequences too short."""


@dataclasses.dataclass(frozen=True)
class LlamaSize:
    """Sizes of a Llama; `vocab_size` is the embedding's, and the tokenizer's up to MOST_TOKENS."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_hidden_size: int
    vocab_size: int
    tied: bool = False
    """The embedding is the output layer as well."""

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


SIZES = {
    # 0.3M parameters: five steps in seconds
    "tiny": LlamaSize(64, 4, 4, 2, 160, 1024),
    # 7.1M parameters
    "small": LlamaSize(256, 4, 4, 2, 704, 8192),
    # 31.6M parameters
    "30m": LlamaSize(512, 8, 8, 4, 1376, 8192),
    # 88.1M parameters
    "90m": LlamaSize(768, 12, 12, 4, 2048, 8192),
    # 113.3M parameters
    "110m": LlamaSize(768, 16, 12, 4, 2048, 8192),
    # 494.0M parameters, the shapes of Qwen2.5-0.5B: 136.1M are a tied embedding
    "0.5b": LlamaSize(896, 24, 14, 2, 4864, 151936, tied=True),
}


def read_pairs(path: Path, count: int | None = None) -> list[dict[str, str]]:
    """The first `count` (default: all) rows of a JSONL file with the strings `prompt`, `chosen` and `rejected`."""
    with path.open(encoding="utf-8") as lines:
        rows = [
            json.loads(line) for _, line in zip(range(sys.maxsize if count is None else count), lines, strict=False)
        ]
    return [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]


def made_pairs(count: int, seed: int = 7) -> list[dict[str, str]]:
    """Pairs of made-up words with prompts of 3 to 60 words and answers of 1 to 40, the same on every machine.

    Numbers come from a linear congruential generator (Knuth's MMIX constants): Python's own may change with a version.
    """
    state = seed

    def below(limit: int) -> int:
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        return (state >> 33) % limit

    def word() -> str:
        syllables = ("ba", "cor", "di", "el", "fun", "ga", "hin", "jo", "ket", "lu", "mer", "no", "pri", "qua", "sto")
        return "".join(syllables[below(len(syllables))] for _ in range(1 + below(3)))

    def text(words: int) -> str:
        return " ".join(word() for _ in range(words))

    return [
        {
            "prompt": f"Human: {text(3 + below(58))}? Assistant:",
            "chosen": f" {text(1 + below(40))}.",
            "rejected": f" {text(1 + below(40))}!",
        }
        for _ in range(count)
    ]


def make_tokenizer(pairs: Iterable[dict[str, str]], folder: Path, vocab_size: int, *, add_bos: bool = False) -> None:
    """Trains a byte-level BPE of exactly `vocab_size` ids on the pairs' text and writes it into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [text for pair in pairs for text in (pair["prompt"] + pair["chosen"], pair["rejected"])]
    tokenizer.train_from_iterator(texts, trainer)
    size = tokenizer.get_vocab_size()
    if size != vocab_size:
        raise ValueError(f"the text gives a vocabulary of {size} only; expected {vocab_size}")
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    description: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": 1 << 20,
        "clean_up_tokenization_spaces": False,
    }
    if add_bos:
        description["bos_token"] = BOS
    _write_json(folder / "tokenizer_config.json", description)


def longest(folder: Path, pairs: Iterable[dict[str, str]]) -> tuple[int, int]:
    """Under the tokenizer in `folder`: tokens of the longest prompt + answer + EOS, and of the longest pair whose
    prompt counts once."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = list(pairs)
    prompts = [len(encoding.ids) for encoding in tokenizer.encode_batch([row["prompt"] for row in rows])]
    chosen, rejected = (
        [len(encoding.ids) for encoding in tokenizer.encode_batch([row["prompt"] + row[name] + EOS for row in rows])]
        for name in ("chosen", "rejected")
    )
    both = zip(prompts, chosen, rejected, strict=True)
    return max([*chosen, *rejected]), max(a + b - prompt for prompt, a, b in both)


def weight_shapes(size: LlamaSize) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama's tensors (linear weights are [out, in]), in a fixed order."""
    yield "model.embed_tokens.weight", (size.vocab_size, size.hidden_size)
    queries, keys = size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
    for layer in range(size.num_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (size.hidden_size,)
        yield prefix + "self_attn.q_proj.weight", (queries, size.hidden_size)
        yield prefix + "self_attn.k_proj.weight", (keys, size.hidden_size)
        yield prefix + "self_attn.v_proj.weight", (keys, size.hidden_size)
        yield prefix + "self_attn.o_proj.weight", (size.hidden_size, queries)
        yield prefix + "post_attention_layernorm.weight", (size.hidden_size,)
        yield prefix + "mlp.gate_proj.weight", (size.ffn_hidden_size, size.hidden_size)
        yield prefix + "mlp.up_proj.weight", (size.ffn_hidden_size, size.hidden_size)
        yield prefix + "mlp.down_proj.weight", (size.hidden_size, size.ffn_hidden_size)
    yield "model.norm.weight", (size.hidden_size,)
    if not size.tied:
        yield "lm_head.weight", (size.vocab_size, size.hidden_size)


def make_weights(size: LlamaSize, folder: Path, seed: int) -> int:
    """Writes config.json and fp32 model.safetensors into `folder`; returns the number of parameters.

    Matrices are uniform with standard deviation 0.05 (0.02 gives a first gradient too small to tell wrong from right);
    norm weights are uniform in 0.9 to 1.1, so that a norm that goes astray is seen.
    """
    import torch
    from safetensors.torch import save_file

    tensors = {}
    for index, (name, shape) in enumerate(weight_shapes(size)):
        uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed * 100_003 + index))
        half_width = 0.1 if len(shape) == 1 else 0.05 * 3**0.5
        tensors[name] = (2 * uniform - 1) * half_width + (1.0 if len(shape) == 1 else 0.0)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    _write_json(folder / "config.json", hugging_face_config(size))
    return sum(tensor.numel() for tensor in tensors.values())


def hugging_face_config(size: LlamaSize) -> dict[str, Any]:
    """The model's config.json; ids are those that `make_tokenizer` gives its special tokens."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden_size,
        "intermediate_size": size.ffn_hidden_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "head_dim": size.head_dim,
        "vocab_size": size.vocab_size,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": size.tied,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    }


def make(pairs: list[dict[str, str]], folder: Path, size: LlamaSize, *, seed: int = 1, add_bos: bool = False) -> int:
    """Tokenizer and model together in `folder`; returns the number of parameters."""
    make_tokenizer(pairs, folder, min(size.vocab_size, MOST_TOKENS), add_bos=add_bos)
    return make_weights(size, folder, seed)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="JSONL of pairs; the tokenizer is trained on all of it"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bos", action="store_true", help="the tokenizer puts <s> before every text")
    arguments = parser.parse_args()
    count = make(
        read_pairs(arguments.data), arguments.out, SIZES[arguments.size], seed=arguments.seed, add_bos=arguments.bos
    )
    print(f"{arguments.out}: {count:,} parameters, weights sha256 {sha256(arguments.out / 'model.safetensors')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
