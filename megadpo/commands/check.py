"""Check config, model folder, layout and data, without weights or a GPU: megadpo check CONFIG [--world-size N]

Lists all problems of the config at once. When it has none, lists all problems of model folder, layout and data. The number of
ranks can also be given as for megadpo train, with --nnodes and --nproc-per-node; no rank is started.
Exit code 0: good; 2: refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from megadpo.commands import command_parser, positive
from megadpo.launcher import add_rank_options
from megadpo.train.check import asked_world_size, check


def main(arguments: Sequence[str]) -> int:
    """Check; returns the exit code. Raises UserError."""
    parser = command_parser(__name__, __doc__)
    parser.add_argument("config", help="YAML file, or the name of a shipped config")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--world-size", type=positive, help="the number of ranks to check for")
    add_rank_options(parser)
    options = parser.parse_intermixed_args(arguments)
    return check(options.config, options.overrides, asked_world_size(options))
