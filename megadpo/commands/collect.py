"""Ask a server for answers to prompts, with rewards: megadpo collect +input_jsonl_fpath=... +output_jsonl_fpath=... ...

Asks an OpenAI-compatible server (vLLM, SGLang, NIM) num_repeats times for each prompt. Takes the options of NeMo Gym's
ng_collect_rollouts; see docs/collecting.md. Started again after it was killed, it continues where it stopped. Exit code 0:
every rollout was collected; 1: some failed for good; 2: refused, with every problem on stderr; 130 and 143: stopped by a
signal.
"""

from __future__ import annotations

from collections.abc import Sequence

from megadpo.collect.command import collect
from megadpo.commands import command_parser


def main(arguments: Sequence[str]) -> int:
    """Collect; returns the exit code. Raises UserError."""
    parser = command_parser(__name__, __doc__)
    parser.add_argument("options", nargs="*", help="key=value or +key=value, e.g. +num_repeats=4; docs/collecting.md")
    return collect(parser.parse_args(arguments).options)
