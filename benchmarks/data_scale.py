"""Data at scale: python benchmarks/data_scale.py --work-dir DIR [--pairs 1000000] [--tokenize-pairs 40000] [--hh FILE]

Makes up a file of preference pairs with the lengths of human preference data, and measures
- tokenising its first --tokenize-pairs rows into the cache, with 1 process and with one for each core (the whole file:
  with one for each core only);
- a start with everything cached, in processes that start together as the ranks of a machine do: reading the file's
  hash, opening and verifying the cache, making the loader, planning and packing the first global batches; and memory;
- packing 100,000 pairs as one global batch, and with --hh how full packs of 4,096 tokens are on that file.

Unless --tokenize-pairs is --pairs, the whole file's cache holds random token ids of the right lengths, written through
the cache's own code: what a start costs does not depend on which ids they are.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megadpo.config.grid import Grid
from megadpo.config.load import build_config
from megadpo.config.schema import Config
from megadpo.data.batches.deal import deal_batch
from megadpo.data.batches.loader import GlobalBatchLoader
from megadpo.data.batches.work import WorkModel
from megadpo.data.pairs import DataReport
from megadpo.data.tokens.cache import TokenCache
from megadpo.data.tokens.cache_key import cache_key
from megadpo.data.tokens.dataset import load_datasets, open_dataset
from megadpo.data.tokens.encode import DataSettings, Sink
from megadpo.data.tokens.tokenizer import load_tokenizer, pad_token_id
from megadpo.data.tokens.workers import usable_cores
from megadpo.families import read_architecture

VOCAB = 8192
BUDGET = 4096
GLOBAL_BATCH = 128
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Places:
    """What the benchmark keeps in its folder."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def pairs(self, count: int) -> Path:
        return self.folder / f"pairs_{count}.jsonl"

    def config(self, path: Path) -> Config:
        """A run over `path`, 8B-shaped, with packing."""
        return build_config(
            {
                "policy": {
                    "model_name": str(self.model),
                    "train_global_batch_size": GLOBAL_BATCH,
                    "max_total_sequence_length": BUDGET,
                    "sequence_packing": {"train_mb_tokens": BUDGET},
                },
                "data": {"train_data_path": str(path), "cache_dir": str(self.cache), "num_workers": 0},
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the data room at scale.")
    parser.add_argument("--work-dir", type=Path, required=True, help="about 3 GB for a million pairs")
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--tokenize-pairs", type=int, default=40_000, help="0: none")
    parser.add_argument("--ranks", type=int, default=2, help="processes that start together")
    parser.add_argument("--hh", type=Path, default=None, help="hh_train.jsonl")
    parser.add_argument("--start", type=int, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    places = Places(options.work_dir)
    if options.start is not None:
        print(json.dumps(start(places, options.pairs, options.start, options.ranks)))
        return
    places.folder.mkdir(parents=True, exist_ok=True)
    make_model(places.model)
    whole = write_pairs(places.pairs(options.pairs), options.pairs)
    if options.tokenize_pairs == options.pairs:
        tokenize(places, whole, workers=usable_cores(), folder=places.cache)
    else:
        tokenize_apart(places, options.tokenize_pairs)
        timed(
            f"{options.pairs:,} pairs of random ids into the cache", lambda: write_cache(places, whole, options.pairs)
        )
    starts(places, options)
    packing(options.hh, places)


def timed(what: str, do: Any) -> Any:
    started = time.perf_counter()
    result = do()
    print(f"{what}: {time.perf_counter() - started:.1f} s", flush=True)
    return result


# What is measured on


def words() -> list[str]:
    letters = random.Random(0)
    return ["".join(letters.choices("etaoinshrdlucmfwypvbgkjqxz", k=letters.randint(2, 8))) for _ in range(6000)]


def make_model(folder: Path) -> None:
    """config.json of an 8B Llama with a small vocabulary, and a byte-level BPE learned from made-up text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if (folder / "tokenizer.json").exists():
        return
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    vocabulary, chosen = words(), random.Random(1)
    backend.train_from_iterator((" ".join(chosen.choices(vocabulary, k=60)) for _ in range(4000)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))


def texts_tokens(count: int) -> np.ndarray:
    """int64 [count, 3]: medians and tails like hh-rlhf's prompts, chosen and rejected answers."""
    generator = np.random.default_rng(0)
    columns = [generator.lognormal(mean, 0.85, count).clip(3, 900) for mean in (4.5, 3.4, 3.6)]
    return np.stack(columns, axis=1).astype(np.int64)


def write_pairs(path: Path, count: int) -> Path:
    """JSONL; the same first rows whatever the count."""
    if path.exists():
        return path
    vocabulary, chosen = words(), random.Random(2)
    pool = " ".join(chosen.choices(vocabulary, k=200_000)).split(" ")

    def text(number: int) -> str:
        start = chosen.randrange(len(pool) - 1000)
        return " ".join(pool[start : start + max(1, int(number / 1.3))])

    def rows() -> Iterator[str]:
        for number, (prompt, good, bad) in enumerate(texts_tokens(1_000_000)[:count].tolist()):
            yield json.dumps(
                {"prompt": f"{number} {text(prompt)}:", "chosen": f" yes {text(good)}", "rejected": f" no {text(bad)}"}
            )

    aside = path.with_suffix(".tmp")
    with aside.open("w") as file:
        file.writelines(row + "\n" for row in rows())
    aside.rename(path)
    print(f"{path.name}: {path.stat().st_size / 1e9:.2f} GB", flush=True)
    return path


def write_cache(places: Places, path: Path, count: int) -> None:
    """The cache of `path` with random ids."""
    cfg = places.config(path)
    tokens = texts_tokens(count)

    def build(sink: Sink) -> DataReport:
        generator = np.random.default_rng(1)
        offsets = np.concatenate([[0], np.cumsum(tokens.ravel())])
        for start in range(0, int(offsets[-1]), 1 << 22):
            size = min(1 << 22, int(offsets[-1]) - start)
            sink("tokens", generator.integers(0, VOCAB, size, dtype=np.int32))
        sink("offsets", offsets)
        sink("rows", np.arange(count))
        sink("lines", np.arange(1, count + 1))
        prompt, good, bad = tokens.sum(axis=0).tolist()
        return DataReport(
            path=str(path), rows=count, pairs=count, prompt_tokens=prompt, chosen_tokens=good, rejected_tokens=bad,
            with_chat_template=False, fingerprint="0" * 64, max_token_id=VOCAB - 1,
        )  # fmt: skip

    cache = TokenCache(places.cache)
    digest = cache.source_digest(str(path))
    key = cache_key(digest, load_tokenizer(str(places.model)), DataSettings.from_config(cfg))
    cache.open_or_build(key, str(path), build)


# What is measured


def tokenize_apart(places: Places, count: int) -> None:
    """The first `count` pairs, each time into a cache of its own."""
    if count:
        path = write_pairs(places.pairs(count), count)
        for workers in dict.fromkeys((1, usable_cores())):
            tokenize(places, path, workers, places.folder / f"build_{os.getpid()}_{workers}")


def tokenize(places: Places, path: Path, workers: int, folder: Path) -> None:
    tokenizer = load_tokenizer(str(places.model))
    settings = DataSettings.from_config(places.config(path))
    started = time.perf_counter()
    pairs = open_dataset(path, tokenizer, settings, cache=TokenCache(folder), num_workers=workers)
    seconds = time.perf_counter() - started
    speed = f"{seconds:.1f} s, {len(pairs) / seconds:,.0f} pairs/s"
    print(f"tokenising {len(pairs):,} pairs with {workers} process(es): {speed}", flush=True)


def starts(places: Places, options: argparse.Namespace) -> None:
    """Every rank in a process of its own, all at once."""
    command = [sys.executable, __file__, "--work-dir", str(places.folder), "--pairs", str(options.pairs)]
    command += ["--ranks", str(options.ranks)]
    ranks = [
        subprocess.Popen([*command, "--start", str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(options.ranks)
    ]
    for rank, process in enumerate(ranks):
        out, _ = process.communicate()
        assert process.returncode == 0, f"rank {rank} failed"
        print(f"rank {rank} of {options.ranks}, {options.pairs:,} pairs cached: {out.strip()}", flush=True)


def start(places: Places, count: int, rank: int, size: int) -> dict[str, float]:
    """Seconds of each part and MB of memory, in this process."""
    path = places.pairs(count)
    cfg, arch = places.config(path), read_architecture(places.model)
    before = memory_mb()
    times: dict[str, float] = {"MB_private_before": before["RssAnon"], "MB_mapped_before": before["RssFile"]}
    last = (time.perf_counter(), time.process_time())

    def lap(name: str) -> None:
        """Seconds by the clock, and of CPU, which other work on the machine stretches less."""
        nonlocal last
        now = (time.perf_counter(), time.process_time())
        times[f"{name}_s"], times[f"{name}_cpu_s"] = (
            round(end - begin, 2) for end, begin in zip(now, last, strict=True)
        )
        last = now

    tokenizer = load_tokenizer(str(places.model))
    lap("tokenizer")
    dataset = load_datasets(cfg, {"train": str(path)}, tokenizer, arch.vocab_size)["train"]
    lap("dataset")
    pad = pad_token_id(tokenizer)
    loader = GlobalBatchLoader.from_config(
        dataset, cfg, arch, pad_token_id=pad, training=True, grid=Grid(data=size, rank=rank)
    )
    lap("loader")
    batches = loader.batches(epoch=0)
    next(batches)
    lap("first_batch")
    for _ in range(100):
        next(batches)
    lap("next_100_batches")
    memory = memory_mb()
    return {**times, "MB_private": memory["RssAnon"], "MB_mapped": memory["RssFile"], "MB_peak": memory["VmHWM"]}


def memory_mb() -> dict[str, float]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {
        name[:-1]: round(int(value[0]) / 1e3) for name, *value in lines if name in ("RssAnon:", "RssFile:", "VmHWM:")
    }


def packing(hh: Path | None, places: Places) -> None:
    model = WorkModel.of(read_architecture(places.model))
    texts = texts_tokens(100_000)
    lengths, work = texts.sum(axis=1), model.pair_work(texts, share_prompt=True)
    for ranks in (1, 8, 64):
        started, cpu = time.perf_counter(), time.process_time()
        plan = deal_batch(lengths, num_ranks=ranks, budget_tokens=BUDGET, work=work)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        took = f"{seconds:.2f} s, {cpu:.2f} s CPU"
        print(f"packing 100,000 pairs for {ranks} rank(s): {took}; {described(plan, lengths, work)}", flush=True)
    if hh is None:
        return
    settings = DataSettings(max_total_sequence_length=BUDGET)
    pairs = open_dataset(hh, bpe_of(hh), settings)
    lengths = pairs.packed_tokens(share_prompt=True)
    work = model.pair_work(pairs.text_tokens(), share_prompt=True)
    plan = deal_batch(lengths, num_ranks=1, budget_tokens=BUDGET, work=work)
    filled = sorted(lengths[pack].sum() / BUDGET for pack in plan[0])[1:]
    print(f"{hh.name} as one batch: {np.mean(filled):.1%} of {BUDGET} tokens filled, mean over all packs but the last")
    order = np.random.default_rng(0).permutation(len(pairs))
    for ranks in (2, 4, 8):
        worst = max(
            1 - min(loads) / max(loads)
            for start in range(0, len(order) - GLOBAL_BATCH + 1, GLOBAL_BATCH)
            for loads in [rank_work(lengths, work, order[start : start + GLOBAL_BATCH], ranks)]
        )
        print(f"{hh.name} in global batches of {GLOBAL_BATCH}, {ranks} ranks: work within {worst:.2%} in every batch")


def rank_work(lengths: np.ndarray, work: np.ndarray, positions: np.ndarray, ranks: int) -> list[int]:
    plan = deal_batch(lengths[positions], num_ranks=ranks, budget_tokens=BUDGET, work=work[positions])
    return [int(work[positions][[pair for pack in rank for pair in pack]].sum()) for rank in plan]


def described(plan: list[list[list[int]]], lengths: np.ndarray, work: np.ndarray) -> str:
    loads = [int(work[[pair for pack in rank for pair in pack]].sum()) for rank in plan]
    fill = lengths.sum() / (BUDGET * len(plan) * len(plan[0]))
    return f"{fill:.1%} filled, ranks' work within {1 - min(loads) / max(loads):.2%}"


def bpe_of(path: Path) -> Any:
    """A byte-level BPE of VOCAB tokens learned from the file itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["</s>"], show_progress=False)
    rows = (text for line in path.open(encoding="utf-8") for text in json.loads(line).values())
    backend.train_from_iterator(rows, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


if __name__ == "__main__":
    main()
