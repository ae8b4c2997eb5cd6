"""Megatron checkpoint folder -> Hugging Face folder: python tools/megatron_to_hf.py --megatron DIR --hf DIR

One process, no GPU, a tensor at a time; DIR of --megatron is step_<N> of a run, or what tools/hf_to_megatron.py made.
The result opens with AutoModelForCausalLM.from_pretrained; --push-to-hub OWNER/NAME uploads it too. Exit code 2: refused,
with every problem on stderr.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megadpo.config.problems import UserError
from megadpo.config.variants import import_plugins
from megadpo.train.command import quiet_libraries, refuse


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Megatron checkpoint folder -> Hugging Face folder.")
    parser.add_argument("--megatron", required=True, type=Path, help="folder with model/, hf/ and megadpo.json")
    parser.add_argument("--hf", required=True, type=Path, help="folder to make; absent or empty")
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="FILE.py", help="adds a model family; executed"
    )
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="also upload it; a new repository is private")
    options = parser.parse_args(arguments)
    quiet_libraries()
    from megadpo.model.weights import export_hf, push_to_hub  # after quiet_libraries, and not for --help

    try:
        import_plugins(options.plugin)
        export_hf(options.megatron, options.hf)
        print(f"wrote {options.hf}")
        if options.push_to_hub is not None:
            print(f"uploaded to {push_to_hub(options.hf, options.push_to_hub)}")
    except UserError as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
