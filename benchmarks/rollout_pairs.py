"""Time and memory of `megadpo pairs` on generated rollouts: python benchmarks/rollout_pairs.py [--prompts 25000]

Writes rollouts of random words (prompts of 150, reasoning of 100 to 600, answers of 20 to 200) to a temporary folder,
builds pairs in a process of its own, and prints its CPU time and peak memory. CPU time, because a shared machine's
clock measures its company too.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=25_000)
    parser.add_argument("--repeats", type=int, default=4, help="rollouts a prompt")
    parser.add_argument("--pairing", default="best-worst")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rollouts = Path(folder) / "rollouts.jsonl"
        write_rollouts(rollouts, options.prompts, options.repeats)
        command = [sys.executable, "-m", "megadpo", "pairs", str(rollouts)]
        command += ["-o", str(rollouts.with_name("pairs.jsonl")), "--pairing", options.pairing]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"{options.prompts * options.repeats:,} rollouts, {rollouts.stat().st_size / 1e6:,.0f} MB")
        print(done.stdout.splitlines()[-1].replace(folder, ""))
        print(
            f"{usage.ru_utime + usage.ru_stime:.1f} s of CPU time, {usage.ru_maxrss / 1024:,.0f} MiB of memory at most"
        )


def write_rollouts(path: Path, prompts: int, repeats: int) -> None:
    """NeMo Gym rows with rewards in hundredths; the same bytes every time."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randrange(2, 10))) for _ in range(5000)]

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randrange(least, most)))

    with path.open("w") as file:
        for task in range(prompts):
            prompt = text(150, 151)
            for rollout in range(repeats):
                output = [
                    {"type": "reasoning", "summary": [{"type": "summary_text", "text": text(100, 600)}]},
                    {
                        "type": "message",
                        "role": "assistant",
                        "content": [{"type": "output_text", "text": text(20, 200)}],
                    },
                ]
                row = {
                    "responses_create_params": {"input": [{"role": "user", "content": prompt}], "tools": []},
                    "response": {"output": output},
                    "reward": draw.randrange(101) / 100,
                    "_ng_task_index": task,
                    "_ng_rollout_index": rollout,
                }
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
