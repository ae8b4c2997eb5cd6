"""A process that gets signals while Python ends, when its exit code is known."""

from __future__ import annotations

import subprocess
import sys

from tests.helpers.distributed import REPOSITORY

SCRIPT = """
import signal, sys
{setup}
class Late:
    def __del__(self, raise_signal=signal.raise_signal, numbers={numbers}):
        for number in numbers:
            raise_signal(number)
late = Late()
sys.exit(143)
"""


def exit_code_when_signalled_late(setup: str, *numbers: int) -> int:
    """The exit code of a process that runs `setup` and ends with 143. Modules, and `late` with them, are cleared after Python
    has given signals back their default actions."""
    script = SCRIPT.format(setup=setup, numbers=tuple(map(int, numbers)))
    return subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, timeout=120).returncode
