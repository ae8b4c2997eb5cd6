"""The command line of benchmarks/gpu.py."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import gpu_inputs, gpu_trl, sides
from benchmarks.gpu_contenders import FLOAT8, OURS

PACK_TOKENS = {"llama-3.2-1b": 16384, "llama-3.1-8b": 4096, "tiny": 512}


def parse(arguments: list[str] | None, description: str) -> argparse.Namespace:
    """`ours` and `trl` are lists of names; of `trl`, `auto` and `quick` are for gpu_trl.choose."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", choices=sorted(gpu_inputs.SHAPES), default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, help="default: all that fit")
    parser.add_argument("--lengths", choices=["hh", "ultrafeedback"], default="ultrafeedback")
    parser.add_argument("--data", type=Path, default=sides.default_data(), help="hh_train.jsonl, for --lengths hh")
    parser.add_argument("--ours", default="ours", help=f"of {', '.join(OURS)}; '' for none")
    parser.add_argument("--trl", default=None, help="names as gpu_trl.py says, or auto (all that fit); '' for none")
    parser.add_argument("--trl-from", type=Path, help="an earlier result: the fastest of TRL's there take part here")
    parser.add_argument("--trl-fit-layers", type=int, help="TRL's settings have to fit with so many; default: --layers")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that has TRL (default: this one)")
    parser.add_argument("--float64", action="store_true", help="also hold everybody's first step to float64")
    parser.add_argument("--optimizer", choices=["auto", "full", "lean"], default="auto", help="of ours; see README.md")
    parser.add_argument("--pack-tokens", type=int, help=f"default: {PACK_TOKENS}")
    parser.add_argument("--global-batch", type=int, default=32, help="pairs")
    parser.add_argument("--warmup-steps", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=7.5, help="for everything, start to end")
    parser.add_argument("--run-minutes", type=float, default=4.0, help="for one run; a longer one is ended and fails")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="for our config")
    parser.add_argument("--out", type=Path, help="JSON file; one of the same settings is continued")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and few pairs, to see that everything runs")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.model, options.rounds, options.global_batch, options.warmup_steps, options.steps = "tiny", 1, 4, 1, 1
        options.trl = "trl-mb1" if options.trl is None else options.trl
    options.trl = "quick" if options.trl is None else options.trl
    options.ours, options.trl = ([name for name in text.split(",") if name] for text in (options.ours, options.trl))
    if unknown := sorted(set(options.ours) - set(OURS)):
        parser.error(f"unknown: {', '.join(unknown)}")
    for name in options.trl:
        if name not in ("auto", "quick"):
            try:
                gpu_trl.settings(name)
            except ValueError as error:
                parser.error(str(error))
    if set(options.ours) & set(FLOAT8) and "ours" not in options.ours:
        parser.error("float8 is held against bfloat16: name 'ours' in --ours as well")
    if options.lengths == "hh" and not options.data.exists():
        parser.error(f"no such file: {options.data}; name hh_train.jsonl with --data, or its folder with MEGADPO_DATA")
    options.pack_tokens = options.pack_tokens or PACK_TOKENS[options.model]
    return options
