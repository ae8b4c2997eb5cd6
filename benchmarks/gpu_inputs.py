"""Models of real shapes with random weights, and pairs of exact lengths, made on the spot: a GPU machine may have no network.

Text is made of words, each of which is one token of a tokenizer made for it, so that lengths are exact and ids spread
over the whole vocabulary as a real model's do.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import make_llama

BOS, EOS, PAD = 0, 1, 2
SPECIAL = ("<s>", "</s>", "<pad>")
Lengths = npt.NDArray[np.int64]
"""[pairs, 3]: tokens of prompt, chosen and rejected, EOS counted in each answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape(make_llama.LlamaSize):
    """Sizes of a Llama 3 as its config.json states them."""

    rope_factor: float

    @property
    def parameters(self) -> int:
        """Tied embeddings once."""
        return sum(math.prod(shape) for _, shape in make_llama.weight_shapes(self))


SHAPES = {
    # https://huggingface.co/meta-llama/Llama-3.2-1B and /Llama-3.1-8B, config.json
    "llama-3.2-1b": Shape(2048, 16, 32, 8, 8192, 128256, tied=True, rope_factor=32.0),
    "llama-3.1-8b": Shape(4096, 32, 32, 8, 14336, 128256, tied=False, rope_factor=8.0),
    "tiny": Shape(64, 2, 4, 2, 128, 512, tied=True, rope_factor=8.0),
}


def hugging_face_config(shape: Shape) -> dict[str, Any]:
    """config.json, but for the ids of the special tokens, which are our tokenizer's."""
    rope = {"factor": shape.rope_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_type": "llama3", "rope_theta": 500000.0}
    return make_llama.hugging_face_config(shape) | {
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": rope,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "torch_dtype": "bfloat16",
    }


def make_model(shape: Shape, folder: Path, device: torch.device, seed: int = 1) -> None:
    """config.json, a tokenizer and bfloat16 weights, normal with standard deviation 0.02, norms 1, a file for each layer
    or so. The weights are drawn on `device`: on another kind they are others."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hugging_face_config(shape), indent=2), encoding="utf-8")
    make_tokenizer(folder, shape.vocab_size)
    generator = torch.Generator(device).manual_seed(seed)
    index: dict[str, str] = {}
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, size in make_llama.weight_shapes(shape):
        file = f"model-{name.split('.')[2] if '.layers.' in name else 'ends'}.safetensors"
        tensor = torch.ones(size, dtype=torch.bfloat16)
        if len(size) > 1:
            drawn = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
            tensor = drawn.mul_(0.02).cpu()
        index[name] = file
        files.setdefault(file, {})[name] = tensor
        if ".layers." in name and name.endswith("mlp.down_proj.weight"):  # the layer's last
            save_file(files.pop(file), folder / file, metadata={"format": "pt"})
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    content = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """Words `w3`, `w4`, ... between spaces, one token each, up to the vocabulary's end."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    vocab = {token: number for number, token in enumerate(SPECIAL)}
    vocab |= {f"w{number}": number for number in range(len(SPECIAL), vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=SPECIAL[PAD]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    description = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 1 << 20}
    description |= {"eos_token": SPECIAL[EOS], "pad_token": SPECIAL[PAD], "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(description), encoding="utf-8")


def hh_lengths(data: Path, count: int) -> Lengths:
    """Of the first `count` pairs of a JSONL file, under a byte-level BPE of 8,192 tokens learned from the whole file."""
    from tokenizers import Tokenizer

    rows = make_llama.read_pairs(data)
    with tempfile.TemporaryDirectory() as name:
        make_llama.make_tokenizer(rows, Path(name), 8192)
        tokenizer = Tokenizer.from_file(str(Path(name) / "tokenizer.json"))
    lengths = []
    for row in rows[:count]:
        prompt = len(tokenizer.encode(row["prompt"]).ids)
        answers = [len(tokenizer.encode(row[answer]).ids) + 1 for answer in ("chosen", "rejected")]
        lengths.append([prompt, *answers])
    if len(lengths) < count:
        raise ValueError(f"{data} has {len(lengths)} pairs; {count} are needed")
    return np.array(lengths, dtype=np.int64)


def ultrafeedback_lengths(count: int, *, seed: int = 11, scale: float = 1.0) -> Lengths:
    """Log-normal with means of about 150 (prompt) and 350 (answer) tokens, prompt and answer at most 2,048 together;
    all of it times `scale`, for a smoke run."""
    generator = np.random.Generator(np.random.PCG64(seed))

    def draw(mean: float, spread: float, size: tuple[int, ...]) -> npt.NDArray[np.float64]:
        return scale * generator.lognormal(math.log(mean) - spread**2 / 2, spread, size)

    prompts = draw(150, 0.8, (count,)).round().clip(4, scale * 1024 + 4).astype(np.int64)
    answers = draw(350, 0.7, (count, 2)).round().clip(2, None).astype(np.int64)
    answers = np.minimum(answers, int(scale * 2048) + 8 - prompts[:, None])
    return np.concatenate([prompts[:, None], answers], axis=1)


def write_pairs(lengths: Lengths, vocab_size: int, path: Path, seed: int = 5) -> None:
    """JSONL of random words; the answers' EOS, which either side appends, is counted in their lengths."""
    generator = np.random.Generator(np.random.PCG64(seed))

    def words(count: int) -> str:
        return " ".join(f"w{number}" for number in generator.integers(len(SPECIAL), vocab_size, count))

    with path.open("w", encoding="utf-8") as out:
        for prompt, chosen, rejected in lengths.tolist():
            row = {"prompt": words(prompt), "chosen": " " + words(chosen - 1), "rejected": " " + words(rejected - 1)}
            out.write(json.dumps(row) + "\n")


def work_folder(needed_bytes: int) -> Path:
    """A new temporary folder, in memory (/dev/shm) where that has room for `needed_bytes`, else on disk."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 1.2 * needed_bytes
    return Path(tempfile.mkdtemp(prefix="megadpo-gpu-", dir=shared if roomy else None))
