"""One rank of tests/helpers/distributed.py."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import pickle
import signal
import sys
import traceback
from pathlib import Path


def be_rank(folder: Path, environment: dict[str, str]) -> None:
    """Runs the call that `folder` holds and leaves its result or error there; ends the process with 0 or 1."""
    os.environ.clear()
    os.environ.update(environment)
    os.setsid()  # so that a rank's own children (checkpoint writers) die with it
    output = os.open(folder / f"output_{environment['RANK']}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.exit(_run(folder))


def _run(folder: Path) -> int:
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)  # a killed pytest leaves no ranks behind
    rank = os.environ["RANK"]
    try:
        name, args, init_process_group = pickle.loads((folder / "call.pkl").read_bytes())
        module, function = name.split(":")
        import torch

        torch.set_num_threads(1)
        if init_process_group:
            torch.distributed.init_process_group("gloo")
        result = getattr(importlib.import_module(module), function)(*args)
        (folder / f"result_{rank}.pkl").write_bytes(pickle.dumps(result))
    except BaseException:
        # Written aside and renamed: the parent sees a whole traceback or none.
        aside = folder / f"error_{rank}.part"
        aside.write_text(traceback.format_exc())
        aside.rename(folder / f"error_{rank}.txt")
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0
