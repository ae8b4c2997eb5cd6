"""A demo in a few minutes on two cores: data, SFT, DPO, export, and a comparison of the models before and after DPO.

    make demo        (or: python tools/demo.py)
    python tools/demo.py --device cuda --ranks 1        the same on GPUs, one for each rank: a container's smoke test

A small Llama with random weights learns to add from a pupil who forgets to carry, then learns from preference pairs to prefer
the right sum. Both trainings run tensor-parallel in two processes, with the command of a real run. Everything is written to
./demo_run, which is deleted first. Exit code 1 if DPO did not reach its goal.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from megadpo.config.load import load_config
from megadpo.demo.measure import Score, read_metrics, score
from megadpo.demo.sums import Sum, question, split_sums, worked_answer, write_preferences, write_warm_up
from megadpo.demo.tiny_model import make_model

REPOSITORY = Path(__file__).resolve().parents[1]
RUN = Path("demo_run")
SEED = 1
HELD_OUT_SUMS = 200
RANKS = 2
GOAL = 0.9  # held-out preference accuracy after DPO
CONSOLE = Console(highlight=False)


def main() -> int:
    options = parse()
    os.chdir(REPOSITORY)
    disable_progress_bar()  # transformers draws one for every file it opens
    start = time.monotonic()
    shutil.rmtree(RUN, ignore_errors=True)
    held_out = make_data_and_model()
    train("warm-up: the model copies the pupil, slips and all", "configs/demo_sft.yaml", options)
    export("sft")
    train("DPO: it learns to prefer the right sum; its own copy is the reference", "configs/demo.yaml", options)
    export("dpo")
    heading("measuring both models on held-out sums")
    before, after = score(RUN / "sft/model", held_out), score(RUN / "dpo/model", held_out)
    metrics, beta = read_metrics(RUN / "dpo/logs"), load_config("configs/demo.yaml").dpo.reference_policy_kl_penalty
    return report(before, after, metrics, beta=beta, seconds=time.monotonic() - start)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--ranks", type=int, choices=[1, 2], default=RANKS, help="tensor-parallel processes")
    return parser.parse_args()


def make_data_and_model() -> list[Sum]:
    """Write data and a Llama with random weights to demo_run; returns the held-out sums."""
    heading("making data, a tokenizer and a model")
    training, held_out = split_sums(held_out=HELD_OUT_SUMS, seed=SEED)
    write_warm_up(RUN / "data/warm_up.jsonl", training, seed=SEED)
    write_preferences(RUN / "data/preferences.jsonl", training)
    write_preferences(RUN / "data/held_out.jsonl", held_out)
    texts = [question(a, b) + worked_answer(a, b) for a, b in training]
    parameters = make_model(RUN / "model", texts, seed=SEED)
    CONSOLE.print(f"{len(training)} sums to train on, {len(held_out)} held out; a Llama of {parameters:,} parameters")
    CONSOLE.print((RUN / "data/preferences.jsonl").read_text().splitlines()[0])
    return held_out


def train(title: str, config: str, options: argparse.Namespace) -> None:
    heading(title)
    torchrun = ["-m", "torch.distributed.run", "--local-addr", "127.0.0.1", "--nproc-per-node", str(options.ranks)]
    launch = ["launch/train.py", config]
    if (options.device, options.ranks) != ("cpu", RANKS):
        ranks = f"policy.megatron_cfg.tensor_model_parallel_size={options.ranks}"
        launch += [f"policy.device={options.device}", ranks]
    command(*torchrun, *launch, shown=f"torchrun --nproc-per-node {options.ranks} {' '.join(launch)}")


def export(stage: str) -> None:
    """Export demo_run/STAGE's last checkpoint to demo_run/STAGE/model, a Hugging Face folder."""
    arguments = ["export", str(RUN / stage / "checkpoints"), str(RUN / stage / "model")]
    command("-m", "megadpo", *arguments, shown=f"megadpo {' '.join(arguments)}")


def report(before: Score, after: Score, metrics: list[dict[str, Any]], *, beta: float, seconds: float) -> int:
    """Print the table, write result.json; returns the exit code."""
    table = Table(title=f"{HELD_OUT_SUMS} held-out sums")
    for column in ("", "before (warm-up only)", "after DPO"):
        table.add_column(column)
    rows = [
        ("preference accuracy", "preference_accuracy", "{:.1%}"),
        ("mean margin, nats", "mean_margin", "{:+.2f}"),
        ("right greedy answers", "right_answers", "{:.1%}"),
        ("for example", "example", "{}"),
    ]
    for name, field, form in rows:
        table.add_row(name, form.format(getattr(before, field)), form.format(getattr(after, field)))
    # The reference is the model before DPO, so the reward margin is beta x the increase of the margin. megadpo measured it in
    # training and transformers on the exports: if they disagree, the export is not the trained model.
    trained = float(metrics[-1]["validation-sums/rewards/margins"])
    exported = beta * (after.mean_margin - before.mean_margin)
    reached, agree = after.preference_accuracy >= GOAL, abs(trained - exported) <= 1e-3 * abs(trained)
    CONSOLE.print(table)
    CONSOLE.print(
        "preference accuracy: share of pairs whose right answer the model finds more likely than the slip\n"
        "margin: log p(right answer) - log p(slip); both by transformers, on the exported models\n"
        f"reward margin against the reference: {trained:.4f} in training, {exported:.4f} by transformers\n"
        f"the models: {RUN}/sft/model and {RUN}/dpo/model; {seconds:.0f} s in all"
    )
    if not reached:
        CONSOLE.print(f"[red]failed: preference accuracy after DPO is below the goal of {GOAL:.0%}")
    if not agree:
        CONSOLE.print("[red]failed: the exported models are not the ones that were trained")
    result = {
        "before": dataclasses.asdict(before),
        "after": dataclasses.asdict(after),
        "reward_margin": {"training": trained, "transformers": exported},
        "goal": GOAL,
        "passed": reached and agree,
        "seconds": round(seconds, 1),
    }
    (RUN / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0 if reached and agree else 1


def command(*arguments: str, shown: str | None = None) -> None:
    """Run this Python with the arguments, after showing what a user would type. Ends the demo if it fails."""
    CONSOLE.print(f"[bold]$ {shown or ' '.join(['python', *arguments])}")
    code = subprocess.run([sys.executable, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    if code:
        sys.exit(code)


def heading(text: str) -> None:
    CONSOLE.rule(f"[bold]{text}", align="left")


if __name__ == "__main__":
    sys.exit(main())
