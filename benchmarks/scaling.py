"""How the cost of a step grows, on a CPU: with a pack's tokens, a prompt's length, pairs, ranks and the model's size.

    python benchmarks/scaling.py [--rounds 3] [--only prompt,ranks] [--out result.json]

One thing varies at a time around a base (`Case`'s defaults); every run is `launch/train.py` in a process of its own, the
cases take turns, and medians over the rounds count. Pairs are made up, of equal lengths. Operations are counted as in
megadpo/data/batches/work.py, four times a forward pass (reference, policy, and twice that backward); recomputation in the head's
backward and padding don't count. Memory is the most that one rank ever held (VmHWM).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # run as a script, the path starts in benchmarks/

from benchmarks import make_llama, sides  # noqa: E402
from benchmarks.trl_worker import Spec  # noqa: E402
from benchmarks.vs_trl import GIB, QUIET_SHARE, machine  # noqa: E402
from megadpo.data.batches.work import WorkModel  # noqa: E402
from megadpo.families import read_architecture  # noqa: E402

FORWARDS = 4
VOCAB = 2048
WARMUP_STEPS, TIMED_STEPS = 1, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One point of a series."""

    series: str
    value: str
    """What the series varies, as the table shows it."""
    size: str = "30m"
    prompt_words: int = 60
    answer_words: int = 25
    pairs: int = 16
    pack_tokens: int = 1536
    threads: int = 2
    layout: dict[str, Any] = dataclasses.field(default_factory=dict)


def all_cases() -> list[Case]:
    small: dict[str, Any] = {"series": "ranks", "pack_tokens": 512}
    return [
        *(Case(series="pack", value=f"{n:,} tokens", pack_tokens=n, pairs=32) for n in (512, 1024, 2048, 4096)),
        *(
            Case(series="prompt", value=f"{n:,} words", prompt_words=n, pairs=4, pack_tokens=8192)
            for n in (64, 256, 1024, 2700)
        ),
        *(Case(series="pairs", value=f"{n} a step", pairs=n) for n in (4, 16, 64)),
        Case(**small, value="1", threads=1),
        Case(**small, value="TP2", layout={"tensor_parallel": 2}),
        Case(**small, value="TP2 + SP", layout={"tensor_parallel": 2, "sequence_parallel": True}),
        Case(**small, value="PP2", layout={"pipeline_parallel": 2}),
        Case(**small, value="DP2, sharded optimizer", layout={"data_parallel": 2}),
        *(Case(series="size", value=name, size=name) for name in ("tiny", "small", "30m", "90m")),
    ]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """A file of made-up pairs, and what one of them costs."""

    path: Path
    mean_tokens: float
    longest: tuple[int, int]
    forward_flops_a_pair: float


def make_model(folder: Path, size: str) -> int:
    """Its parameters. Made-up words give a vocabulary of VOCAB at most, so all sizes have that."""
    shape = dataclasses.replace(make_llama.SIZES[size], vocab_size=VOCAB)
    return make_llama.make(make_llama.made_pairs(4000), folder, shape)


def write_pairs(case: Case, model: Path, path: Path, steps: int = WARMUP_STEPS + TIMED_STEPS) -> Pairs:
    """As many pairs as `steps` of the case need, prompts of `prompt_words` words and answers of `answer_words`."""
    from tokenizers import Tokenizer

    words = " ".join(row["prompt"] for row in make_llama.made_pairs(600)).split()
    longest_start = len(words) - case.prompt_words - 2 * case.answer_words

    def text(start: int, count: int) -> str:
        return " ".join(words[start : start + count])

    rows = []
    for number in range(steps * case.pairs):
        start = 97 * number % longest_start
        answers = [text(start + case.prompt_words + n * case.answer_words, case.answer_words) for n in (0, 1)]
        rows.append(
            {"prompt": text(start, case.prompt_words), "chosen": f" {answers[0]}", "rejected": f" {answers[1]}"}
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    lengths = np.array(
        [[len(tokenizer.encode(row[key]).ids) for key in ("prompt", "chosen", "rejected")] for row in rows]
    )
    work = WorkModel.of(read_architecture(model))
    answers_tokens = lengths[:, 1:].sum(1)
    flops = work.per_token * lengths.sum() + work.per_answer_token * answers_tokens.sum()
    flops = float(flops + work.attention(lengths, share_prompt=True)) / len(lengths)
    return Pairs(path, float(lengths.sum(1).mean()), make_llama.longest(model, rows), flops)


def run(case: Case, pairs: Pairs, model: Path) -> dict[str, float]:
    """Seconds a step, and the most memory of a rank."""
    layout = sides.Layout(pack_tokens=max(case.pack_tokens, pairs.longest[1]), **case.layout)
    spec = Spec(
        data=str(pairs.path),
        model=str(model),
        output_dir="",
        steps=WARMUP_STEPS + TIMED_STEPS,
        global_batch_pairs=case.pairs,
        micro_batch_pairs=1,
        threads=case.threads,
    )
    side = sides.run_ours(spec, layout, longest=pairs.longest)
    seconds = median(step["step_time_s"] for step in side.steps[WARMUP_STEPS:])
    return {"step_s": seconds, "rank_peak_bytes": max(side.rank_peak_bytes), "others_share": side.others_share}


def row(case: Case, pairs: Pairs, parameters: int, runs: list[dict[str, float]]) -> dict[str, Any]:
    """A case's medians."""
    seconds = median(one["step_s"] for one in runs)
    return {
        **dataclasses.asdict(case),
        "parameters": parameters,
        "tokens_a_pair": pairs.mean_tokens,
        "step_s": seconds,
        "pairs_per_s": case.pairs / seconds,
        "tokens_per_s": case.pairs * pairs.mean_tokens / seconds,
        "gflop_a_pair": FORWARDS * pairs.forward_flops_a_pair / 1e9,
        "gflops_per_s": FORWARDS * pairs.forward_flops_a_pair * case.pairs / seconds / 1e9,
        "rank_peak_gib": median(one["rank_peak_bytes"] for one in runs) / GIB,
        "others_share": max(one["others_share"] for one in runs),
        "runs": runs,
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown, one table a series."""
    lines: list[str] = []
    for series in dict.fromkeys(found["series"] for found in rows):
        lines += [
            "",
            f"| {series} | tokens a pair | GFLOP a pair | s a step | pairs/s | tokens/s | GFLOP/s | GiB a rank |",
        ]
        lines += ["|---|---|---|---|---|---|---|---|"]
        lines += [
            f"| {r['value']}{_millions(r)} | {r['tokens_a_pair']:,.0f} | {r['gflop_a_pair']:,.2f} | {r['step_s']:.2f} |"
            f" {r['pairs_per_s']:.2f} | {r['tokens_per_s']:,.0f} | {r['gflops_per_s']:,.0f} | {r['rank_peak_gib']:.2f} |"
            for r in rows
            if r["series"] == series
        ]
    return lines


def _millions(row: dict[str, Any]) -> str:
    return f", {row['parameters'] / 1e6:.1f}M" if row["series"] == "size" else ""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="series, of " + ", ".join(dict.fromkeys(case.series for case in all_cases())))
    parser.add_argument("--size", choices=sorted(make_llama.SIZES), help="this model in every series but `size`")
    parser.add_argument("--out", type=Path, help="JSON file for every run's figures")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",") if options.only else [case.series for case in all_cases()]
    cases = [case for case in all_cases() if case.series in wanted]
    if options.size:
        cases = [c if c.series == "size" else dataclasses.replace(c, size=options.size) for c in cases]
    if not cases:
        parser.error(f"no such series: {options.only}")
    about = machine()
    with tempfile.TemporaryDirectory(prefix="megadpo-scaling-") as name:
        folder = Path(name)
        parameters = {size: make_model(folder / size, size) for size in {case.size for case in cases}}
        pairs = [write_pairs(case, folder / case.size, folder / f"{n}.jsonl") for n, case in enumerate(cases)]
        runs: list[list[dict[str, float]]] = [[] for _ in cases]
        for number in range(1, options.rounds + 1):
            for case, its_pairs, found in zip(cases, pairs, runs, strict=True):
                found.append(run(case, its_pairs, folder / case.size))
                print(f"round {number}  {case.series} {case.value}: {found[-1]['step_s']:.2f} s a step", flush=True)
    rows = [row(c, p, parameters[c.size], found) for c, p, found in zip(cases, pairs, runs, strict=True)]
    print(f"{about['cpu']}, {about['cores']} cores, fp32, {options.rounds} rounds", *table(rows), sep="\n")
    busiest = max(found["others_share"] for found in rows)
    if busiest > QUIET_SHARE:
        print(f"NOT A QUIET MACHINE: other work took up to {busiest:.0%} of the CPU; the speeds above say nothing")
    if options.out:
        options.out.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sides.end_tidily_when_terminated()
    sys.exit(main())
