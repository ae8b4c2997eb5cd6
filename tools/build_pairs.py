"""NeMo Gym rollouts -> preference pairs: python tools/build_pairs.py ROLLOUTS.jsonl ... -o PAIRS.jsonl [--help]

Groups the answers to each prompt, pairs them by reward, writes rows that `data.train_data_path` takes, and prints what
came of it; whatever is left out is counted by reason and written to PAIRS.rejected.jsonl. See docs/rollouts.md. Exit
code 2: refused, or not a single pair.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megadpo.config.problems import UserError
from megadpo.rollouts.command import run
from megadpo.train.command import refuse


def main(arguments: list[str]) -> int:
    try:
        run(arguments)
    except UserError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
