"""Export a run's model as a Hugging Face folder: megadpo export RUN FOLDER [--best | --step N]

RUN is a run's checkpointing.checkpoint_dir or one checkpoint (a run's step_<N>, or the output of megadpo import). Of a run,
the newest checkpoint is exported; --best exports the best by the run's metric_name, --step N that of step N. FOLDER opens
with AutoModelForCausalLM.from_pretrained. A run with LoRA is exported as a PEFT adapter, or with --merge as a whole model
(docs/lora.md). --push-to-hub OWNER/NAME uploads it too. Runs in one process without a GPU, one tensor at a time. Exit code
2: refused, with every problem on stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megadpo.commands import command_parser
from megadpo.config.variants import import_plugins

DTYPES = ("bfloat16", "float16", "float32")


def main(arguments: Sequence[str]) -> int:
    """Export; returns the exit code. Raises UserError."""
    parser = command_parser(__name__, __doc__)
    parser.add_argument("run", type=Path, help="a run's checkpoint_dir, or one checkpoint")
    parser.add_argument("folder", type=Path, help="where to write; must be new or empty")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--best", action="store_true", help="the checkpoint with the best validation metric")
    which.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step")
    parser.add_argument("--merge", action="store_true", help="for a run with LoRA: write a whole model, not an adapter")
    parser.add_argument("--base", metavar="FOLDER", help="the adapters' base model, if it has moved since the run")
    parser.add_argument("--dtype", choices=DTYPES, help="cast the weights (default: the checkpoint's own)")
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="FILE.py", help="adds a model family; executed"
    )
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="also upload it; a new repository is private")
    options = parser.parse_args(arguments)
    from megadpo.checkpoint.choose import choose_checkpoint  # not for --help
    from megadpo.lora.export import export
    from megadpo.model.weights import dtype_named, push_to_hub
    from megadpo.train.handed_on import old_tokenizer_notes

    import_plugins(options.plugin)
    checkpoint = choose_checkpoint(options.run, step=options.step, best=options.best)
    for note in old_tokenizer_notes(checkpoint):
        print(f"note: {note}", file=sys.stderr)
    dtype = dtype_named(options.dtype) if options.dtype else None
    export(checkpoint, options.folder, merge=options.merge, base=options.base, dtype=dtype)
    print(f"wrote {options.folder}" + (f", of {checkpoint}" if checkpoint != options.run else ""))
    if options.push_to_hub is not None:
        print(f"uploaded to {push_to_hub(options.folder, options.push_to_hub)}")
    return 0
