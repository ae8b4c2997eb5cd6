"""What is shown while rollouts are collected."""

from __future__ import annotations

import io

from rich.console import Console

from megadpo.collect.progress import LINE_EVERY_S, CollectProgress


def test_lines_in_a_file_with_the_mean_reward_so_far():
    now = [0.0]
    shown = io.StringIO()
    progress = CollectProgress(4, done=1, reward_sum=1.0, console=Console(file=shown), clock=lambda: now[0])
    with progress:
        progress.finished(0.0)
        now[0] = LINE_EVERY_S
        progress.finished(0.5)
        progress.retry("HTTP 500")
        progress.retry("HTTP 500, again")
        progress.failure()
    lines = shown.getvalue().splitlines()
    assert lines[0] == "Collecting rollouts:  75%  3/4  reward 0.5000  0.07/s"
    assert lines[1] == "retrying: HTTP 500"
    assert lines[2].endswith("failed 1  retries 2") and len(lines) == 3


def test_a_bar_in_a_terminal():
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100)
    with CollectProgress(2, console=console) as progress:
        progress.finished(0.25)
        progress.message("a word")
    assert "Collecting rollouts" in shown.getvalue() and "reward 0.2500" in shown.getvalue()
    assert "1/2" in shown.getvalue() and "a word" in shown.getvalue()
