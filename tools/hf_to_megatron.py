"""Hugging Face folder -> Megatron checkpoint folder: python tools/hf_to_megatron.py --hf DIR --megatron DIR

One process, no GPU, a layer at a time. The result can be `policy.model_name` in any layout, and
tools/megatron_to_hf.py gives the Hugging Face folder back, bit for bit. Exit code 2: refused, with every problem on
stderr.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megadpo.config.problems import UserError
from megadpo.config.variants import import_plugins
from megadpo.train.command import quiet_libraries, refuse

DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Hugging Face folder -> Megatron checkpoint folder.")
    parser.add_argument("--hf", required=True, type=Path, help="folder with config.json and *.safetensors")
    parser.add_argument("--megatron", required=True, type=Path, help="folder to make; absent or empty")
    parser.add_argument("--dtype", choices=DTYPES, default=None, help="cast the weights (default: keep the files' own)")
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="FILE.py", help="adds a model family; executed"
    )
    options = parser.parse_args(arguments)
    quiet_libraries()
    from megadpo.model.weights.convert import dtype_named, import_hf  # after quiet_libraries, and not for --help

    try:
        import_plugins(options.plugin)
        import_hf(options.hf, options.megatron, dtype_named(options.dtype) if options.dtype else None)
    except UserError as error:
        return refuse(error)
    print(f"wrote {options.megatron}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
