"""Prompts -> rollouts with rewards: python tools/collect_rollouts.py +input_jsonl_fpath=... +output_jsonl_fpath=... ...

Asks an OpenAI-compatible server (vLLM, SGLang, NIM) `num_repeats` times for each prompt, with the options of NeMo Gym's
ng_collect_rollouts; see docs/collecting.md. Started again after a kill, it goes on where it was. Exit code 0: every
rollout is there; 1: some failed for good; 2: refused, with every problem on stderr; 130 and 143: stopped by a signal.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megadpo.collect.command import collect
from megadpo.config.problems import UserError
from megadpo.train.command import refuse


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Collect rollouts from an OpenAI-compatible server.", epilog="All options: docs/collecting.md"
    )
    parser.add_argument("options", nargs="*", help="key=value or +key=value, e.g. +num_repeats=4")
    try:
        return collect(parser.parse_args(arguments).options)
    except UserError as error:
        return refuse(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
