"""Make preference pairs from NeMo Gym rollouts: megadpo pairs ROLLOUTS.jsonl ... -o PAIRS.jsonl

Groups the answers to each prompt, pairs them by reward, and writes rows for data.train_data_path. Rollouts that are left
out are counted by reason and written to PAIRS.rejected.jsonl. See docs/rollouts.md. Exit code 2: refused, or no pair was
made.
"""

from __future__ import annotations

from collections.abc import Sequence

from megadpo.commands import command_parser
from megadpo.rollouts.command import run
from megadpo.rollouts.options import add_options, read_options


def main(arguments: Sequence[str]) -> int:
    """Build; returns the exit code. Raises UserError."""
    parser = command_parser(__name__, __doc__)
    add_options(parser)
    run(read_options(parser.parse_args(arguments)))
    return 0
