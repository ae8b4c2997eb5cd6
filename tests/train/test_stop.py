"""Signals: one request to stop, however often it is delivered; a later one means at once."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import signal
from megadpo.train import stop
stop.SAME_SIGNAL_S = {window_s}
stop.StopWatcher(None, None).install()
for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
    signal.raise_signal(number)
print("alive")
"""


@pytest.mark.parametrize(("window_s", "code", "words"), [(10.0, 0, "alive"), (-1.0, -signal.SIGTERM, "")])
def test_only_a_later_signal_ends_the_process(window_s, code, words):
    program = [sys.executable, "-c", PROGRAM.format(window_s=window_s)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (code, words), done.stderr
