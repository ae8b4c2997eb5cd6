"""The command line: `megadpo COMMAND ...` or `python -m megadpo COMMAND ...`. launch/train.py is `megadpo train`.

Every file of this folder is a command: the file's name is the command's, its docstring is what `megadpo COMMAND --help`
prints, and the docstring's first line is in `megadpo --help`. `main(arguments)` returns the exit code and may raise
UserError. Only the file of the command that runs is imported.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import importlib.metadata
import logging
import os
import pkgutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from megadpo.config.problems import EXIT_NOT_SAVED, EXIT_REFUSED, SaveError, UserError
from megadpo.config.shipped import shipped_folder
from megadpo.launcher import last_words, under_torchrun

EXIT_CTRL_C = 130
OTHERS_WAIT_S = 20.0
_HELP = ("-h", "--help", "help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code. arguments: the command's name and its arguments (default: sys.argv's)."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in _HELP:
        print(overview())
        return 0
    if name == "--version":
        print(f"megadpo {importlib.metadata.version('megadpo')}")
        return 0
    modules = _modules()
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(modules)}"
        print(f"megadpo: no command {name!r}; {hint}", file=sys.stderr)
        return EXIT_REFUSED
    quiet_libraries()
    if not under_torchrun():
        return _run(modules[name], rest)
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(_run)(modules[name], rest) or 0  # torchrun prints what the first failing rank raised


def _run(module: str, arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code. A refusal, a failed save and Ctrl-C have exit codes of their own."""
    try:
        command: Callable[[Sequence[str]], int] = importlib.import_module(f"{__name__}.{module}").main
        return command(arguments)
    except UserError as error:
        return refuse(error)
    except SaveError as error:
        return end_with_words(f"stopped, a checkpoint was not saved: {error}", EXIT_NOT_SAVED)
    except KeyboardInterrupt:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            last_words("stopped by Ctrl-C", sys.stderr)
        return EXIT_CTRL_C


def overview() -> str:
    """What `megadpo --help` prints: a line for each command."""
    modules = _modules()
    width = max(map(len, modules))
    lines = [f"  {name:{width}}  {_summary(module)}" for name, module in modules.items()]
    return "\n".join(
        [
            "usage: megadpo COMMAND ...     (megadpo COMMAND --help; python -m megadpo is the same)",
            "",
            *lines,
            "",
            f"configs, by name or by path: {shipped_folder('configs')}",
            f"files for Slurm, Kubernetes and SkyPilot: {shipped_folder('launch')}",
        ]
    )


def command_parser(module: str, text: str | None) -> argparse.ArgumentParser:
    """The parser of the command in `module`, whose docstring is `text`."""
    name = module.rpartition(".")[2].rstrip("_")
    described = argparse.RawDescriptionHelpFormatter
    # no abbreviations: split_rank_options wouldn't know them
    return argparse.ArgumentParser(
        prog=f"megadpo {name}", description=text, formatter_class=described, allow_abbrev=False
    )


def positive(text: str) -> int:
    """An argparse type: a whole number, 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}: must be 1 or more")
    return number


def refuse(error: UserError) -> int:
    """Print every problem on stderr, once on each node. Returns EXIT_REFUSED."""
    lines = [f"refused, {len(error.problems)} problem(s):", *(f"  {problem}" for problem in error.problems)]
    return end_with_words("\n".join(lines), EXIT_REFUSED)


def end_with_words(text: str, code: int) -> int:
    """Print on stderr why the run ends. Returns `code`.

    Local rank 0 prints at once. The other ranks wait first: torchrun stops all ranks when one ends, and it must not stop
    the one that prints. A rank that is still running after the wait prints too: then only this rank ended this way.
    """
    if under_torchrun() and int(os.environ.get("LOCAL_RANK", "0")) != 0:
        time.sleep(OTHERS_WAIT_S)
    last_words(text, sys.stderr)
    return code


def quiet_libraries() -> None:
    """Silence warnings that users can't act on. megatron-core warns of every optional package that is not installed. torch
    warns on every rank of a class in megatron-core's checkpoints, of how 0.19 loads them, and of collectives in its
    distributed optimizer; built with CUDA, also of a machine without."""
    warnings.filterwarnings("ignore", module="megatron")
    for loading in ("The argument order of load has been changed", "torch.distributed is disabled"):
        warnings.filterwarnings("ignore", loading, UserWarning, module="torch")
    warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning, module="torch")
    collectives = r"`torch\.distributed\._?(all_gather|reduce_scatter)_\w+` is"
    warnings.filterwarnings("ignore", collectives, FutureWarning, module="torch")
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _modules() -> dict[str, str]:
    """Command -> module of this package. A Python keyword gets a trailing underscore as a module's name (import_)."""
    return {one.name.rstrip("_"): one.name for one in pkgutil.iter_modules(__path__)}


def _summary(module: str) -> str:
    """The first line of a command's docstring, without its usage. The module is read, not imported."""
    text = Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0].partition(": megadpo ")[0]
