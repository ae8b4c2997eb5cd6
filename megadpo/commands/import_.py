"""Import a Hugging Face folder as a Megatron checkpoint folder: megadpo import HF_FOLDER FOLDER

Runs in one process without a GPU, one layer at a time. policy.model_name can be FOLDER in any layout; megadpo export writes
the Hugging Face folder back, bit for bit. Training reads Hugging Face folders directly, so this is rarely needed. Exit code
2: refused, with every problem on stderr.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megadpo.commands import command_parser
from megadpo.commands.export import DTYPES
from megadpo.config.variants import import_plugins


def main(arguments: Sequence[str]) -> int:
    """Import; returns the exit code. Raises UserError."""
    parser = command_parser(__name__, __doc__)
    parser.add_argument("hf", type=Path, help="folder with config.json and *.safetensors")
    parser.add_argument("folder", type=Path, help="where to write; must be new or empty")
    parser.add_argument("--dtype", choices=DTYPES, help="cast the weights (default: keep the files' own)")
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="FILE.py", help="adds a model family; executed"
    )
    options = parser.parse_args(arguments)
    from megadpo.model.weights import dtype_named, import_hf  # not for --help

    import_plugins(options.plugin)
    import_hf(options.hf, options.folder, dtype_named(options.dtype) if options.dtype else None)
    print(f"wrote {options.folder}")
    return 0
