"""Starts the ranks of `megadpo train --nproc-per-node N`, with torchrun's agent and options.

It ends otherwise than torchrun. After a stop signal torchrun kills its ranks 30 seconds later, too early for a large model
to finish its step and save. It exits with 1 whatever the ranks' exit code is, and prints its own traceback after their
messages. Here SIGTERM, SIGUSR1 and Ctrl-C are passed on, and the ranks are waited for without a limit. The exit code is
theirs. torchrun's table of failed ranks is printed only after a crash.
"""

from __future__ import annotations

import argparse
import atexit
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import IO

_OPTIONS = {
    "--nproc-per-node": "ranks of each node: start them here",
    "--nnodes": "nodes; start the same command on each",
    "--node-rank": "this node's number, with --master-addr",
    "--master-addr": "of the first node, where there is no --rdzv-endpoint",
    "--master-port": "its port",
    "--rdzv-backend": "how nodes find each other: static or c10d",
    "--rdzv-endpoint": "HOST:PORT where they meet",
    "--rdzv-id": "any name, the same on all",
    "--local-addr": "this node's own address",
}
_LAUNCHED = "MEGADPO_LAUNCHED_S"
_OWN_WORDS = (0, 2, 74, 75, 130, 143)
"""Exit codes of ranks that said why they ended."""


def add_rank_options(parser: argparse.ArgumentParser) -> None:
    """torchrun's options that say how many ranks there are and where."""
    group = parser.add_argument_group("ranks (torchrun's options; without one: this process alone)")
    for name, words in _OPTIONS.items():
        group.add_argument(name, help=words, metavar="X")


def split_rank_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command's arguments: the options of `add_rank_options`, for torchrun, and all others, for each rank."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_rank_options(parser)
    options, others = parser.parse_known_args(arguments)
    given = ((name, getattr(options, name[2:].replace("-", "_"))) for name in _OPTIONS)
    return [word for name, value in given if value is not None for word in (name, value)], others


def launch(ranks: Sequence[str], command: Sequence[str], *, saves: bool) -> int:
    """Start `megadpo COMMAND` as the ranks that `ranks` (torchrun's options) asks for; returns the first failing rank's
    exit code, 128 + number for a signal, or 0. saves: the ranks answer SIGTERM by saving, and are waited for."""
    os.environ[_LAUNCHED] = str(time.monotonic())
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does, which says so in three lines
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    here = ["--signals-to-handle", "SIGHUP,SIGQUIT"] if saves else []
    if saves:
        _signal_the_ranks_instead()
    _end_while_there_is_no_rank()  # below: its thread must not get SIGUSR1 either
    try:
        run(parse_args([*ranks, *here, "-m", "megadpo", *command]))
    except ChildFailedError as error:
        code: int = error.get_first_failure()[1].exitcode
        code = code if code > 0 else 128 - code
        if code not in _OWN_WORDS:
            print(error.format_msg(), file=sys.stderr)
        return code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _signal_the_ranks_instead() -> None:
    """From now on this process passes SIGTERM and SIGUSR1 on to the ranks as SIGUSR1, and Ctrl-C as Ctrl-C.

    SIGUSR1 is blocked here, and the ranks inherit that: a signal that comes while the model is built waits until they can
    save (`StopWatcher.install`). SIGTERM isn't blocked: when one rank has failed, the agent ends the others with it.
    """
    import psutil

    def pass_on(number: int, frame: FrameType | None = None) -> None:
        for rank in psutil.Process().children():
            try:
                rank.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGUSR1)
            except psutil.NoSuchProcess:
                continue

    def wait_for_usr1() -> None:
        while True:
            number = signal.sigwait([signal.SIGUSR1])
            if _has_started_ranks():
                pass_on(number)
            else:
                os.kill(os.getpid(), signal.SIGTERM)

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)
    ignore_at_exit([signal.SIGTERM, signal.SIGINT])
    threading.Thread(target=wait_for_usr1, daemon=True).start()


def _end_while_there_is_no_rank() -> None:
    """From now on Ctrl-C and SIGTERM end this process at once, with code 130 or 143, if it has started no rank yet.

    Until the nodes have met, which may take minutes, there is nothing to wait for. The main thread may be inside torch's store
    then, where Python calls no signal handler; so a thread reads the signals' numbers.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing)

    def watch() -> None:
        while True:
            for number in os.read(reading, 1):
                if number in (signal.SIGINT, signal.SIGTERM) and not _has_started_ranks():
                    os.write(2, f"stopped by {signal.Signals(number).name} before there was a rank\n".encode())
                    os._exit(128 + number)

    threading.Thread(target=watch, daemon=True).start()


def _has_started_ranks() -> bool:
    """torch handles SIGQUIT from the moment at which it starts the ranks, so also after they have ended."""
    return callable(signal.getsignal(signal.SIGQUIT))


def ignore_at_exit(numbers: Iterable[signal.Signals]) -> None:
    """These signals no longer count once the exit code is known. Python gives every handled signal its default action back
    while it ends, so that a second Ctrl-C would end a run that has saved with another exit code."""

    def ignore() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    atexit.register(ignore)


def under_torchrun() -> bool:
    """Whether this process is a rank that torchrun, or `launch`, started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launched_s() -> float | None:
    """time.monotonic() when `launch` began that started this rank; None without it. (The clock is the machine's.)"""
    text = os.environ.get(_LAUNCHED)
    return None if text is None else float(text)


def world_size() -> int:
    """Ranks of this run, as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def last_words(text: str, stream: IO[str]) -> None:
    """Print why this rank ends. Under torchrun, also write it where torchrun looks: it ends every failed run with a
    traceback and a table of failed ranks, and shows the text there."""
    print(text, file=stream, flush=True)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if under_torchrun() and file is not None and not os.path.exists(file):
        with open(file, "w", encoding="utf-8") as writing:
            shown = {"py_callstack": text, "timestamp": str(int(time.time()))}
            json.dump({"message": {"message": text, "extraInfo": shown}}, writing)
