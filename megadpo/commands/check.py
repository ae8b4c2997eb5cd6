"""Check config, model folder, layout and data, without weights or a GPU: megadpo check CONFIG [--world-size N]

Lists all problems of the config at once. When it has none, lists all problems of model folder, layout and data.
Exit code 0: good; 2: refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from megadpo.commands import command_parser, positive
from megadpo.train.check import check


def main(arguments: Sequence[str]) -> int:
    """Check; returns the exit code. Raises UserError."""
    parser = command_parser(__name__, __doc__)
    parser.add_argument("config", help="YAML file, or the name of a shipped config")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--world-size", type=positive, help="the number of ranks to check for")
    options = parser.parse_intermixed_args(arguments)
    return check(options.config, options.overrides, options.world_size)
