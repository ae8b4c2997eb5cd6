"""Answers in groups: K answers to each prompt, as pairs that share it, as pairs computed alone, and in TRL. CPU, fp32.

    python benchmarks/groups.py --data hh_train.jsonl --trl-python trl_venv/bin/python --out groups.json

A case is a K, the pairs made of it (all of them, or the best with the worst) and lengths: `hh` takes prompts and answers of
the data, `agent` prompts of about 1,500 tokens and answers of about 150; `turns` the same behind a first turn of about 300
tokens, which half of the answers have in common. Each case has its own file of pairs; all sides train on the same pairs in
the same order, so the losses must be the same. Runs, clocks and memory: benchmarks/vs_trl.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # run as a script, the path starts in benchmarks/

from benchmarks import make_llama, sides, vs_trl  # noqa: E402
from benchmarks.trl_worker import Spec  # noqa: E402

AGENT_TEXTS = 9
"""Prompts of the data that make one prompt of an agent: about 1,500 tokens."""
TURN_TEXTS = 6
"""Answers of the data that make a first turn: about 300 tokens."""
GOALS = {("hh", 4): 3.0, ("agent", 4): 4.0, ("hh", 8): 7.0}
"""All pairs of K answers: at least so many times the pairs per second of each pair alone."""
TRL_GOAL = 6.0
"""K = 4, all pairs: at least so many times TRL's."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Which pairs."""

    lengths: str
    answers: int
    pairs: str
    """all or best_worst."""

    @property
    def name(self) -> str:
        return f"{self.lengths} K={self.answers} {self.pairs}"

    @property
    def pairs_per_prompt(self) -> int:
        return 1 if self.pairs == "best_worst" else self.answers * (self.answers - 1) // 2


def rows_of(case: Case, source: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """`count` pairs. Answers of other prompts stand in for further samples: only their lengths matter here."""
    texts = [row[side].strip() for row in source for side in ("chosen", "rejected")]
    per_prompt = AGENT_TEXTS if case.lengths in ("agent", "turns") else 1
    rows: list[dict[str, str]] = []
    for number in range(-(-count // case.pairs_per_prompt)):
        prompt = "".join(source[(number * per_prompt + i) % len(source)]["prompt"] for i in range(per_prompt))
        answers = [texts[(number * case.answers + i) % len(texts)] for i in range(case.answers)]
        if case.lengths in ("agent", "turns"):  # two texts make about 150 tokens
            answers = [f"{text} {texts[(7 * number + 3 * i) % len(texts)]}" for i, text in enumerate(answers)]
        # A number makes them distinct, whatever the texts
        ranked = [f" {i}: {text}" for i, text in enumerate(answers)]
        if case.lengths == "turns":
            turns = [
                " ".join(texts[(5 * number + 11 * one + i) % len(texts)] for i in range(TURN_TEXTS)) for one in (0, 1)
            ]
            ranked = [f" {turns[i // 2 % 2]}{text}" for i, text in enumerate(ranked)]
        chosen = [(ranked[0], ranked[-1])] if case.pairs == "best_worst" else list(combinations(ranked, 2))
        rows += [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in chosen]
    return rows[:count]


def contenders(options: argparse.Namespace, spec: Spec, longest: tuple[int, int]) -> list[vs_trl.Contender]:
    """The sides that take turns."""
    pack = max(options.pack_tokens, longest[1])

    def ours(group: bool) -> Callable[[], sides.Side]:
        overrides = [f"data.group_prompts={str(group).lower()}"]
        return lambda: sides.run_ours(spec, sides.Layout(pack_tokens=pack), longest=longest, overrides=overrides)

    def theirs(setting: str) -> Callable[[], sides.Side]:
        return lambda: sides.run_trl(
            dataclasses.replace(spec, **vs_trl.TRL_SETTINGS[setting]), options.trl_python
        )  # fmt: skip

    found: list[vs_trl.Contender] = [("megadpo groups", ours(True)), ("megadpo pairs", ours(False))]
    return found + [(f"TRL {name}", theirs(name)) for name in options.trl]


def run_case(case: Case, options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Every contender's figures, and the ratios."""
    steps = options.warmup_steps + options.steps
    pairs = options.prompts * case.pairs_per_prompt
    source = make_llama.read_pairs(options.data)
    with tempfile.TemporaryDirectory(prefix="megadpo-groups-") as folder:
        data = Path(folder) / "pairs.jsonl"
        rows = rows_of(case, source, steps * pairs)
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        spec = Spec(
            data=str(data), model=str(model), output_dir="", steps=steps, global_batch_pairs=pairs,
            micro_batch_pairs=1, threads=options.threads,
        )  # fmt: skip
        taking_part = contenders(options, spec, make_llama.longest(model, rows))
        timings, failures = vs_trl.run_rounds(taking_part, options.rounds, options.warmup_steps)
    speeds = {name: median(run.pairs_per_s for run in runs) for name, runs in timings.items()}
    best_trl = max((speed for name, speed in speeds.items() if name.startswith("TRL")), default=None)
    grouped = speeds["megadpo groups"]
    return {
        "case": case.name,
        "pairs_a_step": pairs,
        "times_pairs_alone": grouped / speeds["megadpo pairs"],
        "times_trl": None if best_trl is None else grouped / best_trl,
        "peak_bytes": {name: median(run.peak_bytes for run in runs) for name, runs in timings.items()},
        "pairs_per_s": speeds,
        "different_losses": vs_trl.different_losses(timings),
        "others_share": max(run.others_share for runs in timings.values() for run in runs),
        "failures": failures,
        "runs": {name: [dataclasses.asdict(run) for run in runs] for name, runs in timings.items()},
    }


def goals(case: Case, result: dict[str, Any]) -> list[str]:
    """Lines that hold the case's ratios to the goals."""
    lines = []
    if case.pairs == "all" and (case.lengths, case.answers) in GOALS:
        goal, found = GOALS[case.lengths, case.answers], result["times_pairs_alone"]
        lines.append(f"{found:.2f}x each pair alone; goal >= {goal}: {'met' if found >= goal else 'not met'}")
    if case.pairs == "all" and case.answers == 4 and result["times_trl"] is not None:
        found = result["times_trl"]
        lines.append(f"{found:.2f}x TRL's best here; goal >= {TRL_GOAL}: {'met' if found >= TRL_GOAL else 'not met'}")
    if case.answers == 2:
        found = result["times_pairs_alone"]
        lines.append(f"{found:.3f}x each pair alone; goal >= 0.99: {'met' if found >= 0.99 else 'not met'}")
    return lines


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=sides.default_data(), help="JSONL of pairs (default: %(default)s)")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that has TRL (default: this one)")
    parser.add_argument("--trl", default="mb1", help="TRL's settings of vs_trl.py, or '' for none")
    parser.add_argument(
        "--cases", default="hh:2:all,hh:4:all,hh:8:all,hh:4:best_worst,agent:2:all,agent:4:all,agent:8:all"
    )
    parser.add_argument("--prompts", type=int, default=4, help="a global batch")
    parser.add_argument("--pack-tokens", type=int, default=1536, help="a micro-batch, or as many as the longest pair")
    parser.add_argument("--size", choices=sorted(make_llama.SIZES), default="30m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup-steps", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--threads", type=int, default=2, help="of each side")
    parser.add_argument("--out", type=Path, help="JSON file for every round's figures, written after each case")
    options = parser.parse_args(arguments)
    options.trl = [name for name in options.trl.split(",") if name]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not options.data.exists():
        print(f"no such file: {options.data}; name one with --data, or its folder with MEGADPO_DATA", file=sys.stderr)
        return 2
    about, results, wrong = vs_trl.machine(), [], False
    with tempfile.TemporaryDirectory(prefix="megadpo-groups-model-") as folder:
        model = Path(folder) / "model"
        make_llama.make(make_llama.read_pairs(options.data), model, make_llama.SIZES[options.size])
        for text in options.cases.split(","):
            lengths, answers, pairs = text.split(":")
            case = Case(lengths, int(answers), pairs)
            print(f"\n{case.name}", flush=True)
            result = run_case(case, options, model)
            results.append(result)
            wrong = wrong or bool(result["different_losses"])
            for line in [*goals(case, result), *result["different_losses"]]:
                print(line, flush=True)
            if options.out:
                content = {"machine": about, "options": {k: str(v) for k, v in vars(options).items()}, "cases": results}
                options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sides.end_tidily_when_terminated()
    sys.exit(main())
